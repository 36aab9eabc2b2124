"""`python -m sparselearning` is the command `sparselearning`."""

from sparselearning.commands import main

if __name__ == "__main__":
    main()
