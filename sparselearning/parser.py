"""How a script is called, and how it ends on a user's mistake: one line, and exit status 2."""

import argparse
import os
import sys
from typing import Any, NoReturn

COMMAND = "SPARSELEARNING_COMMAND"  # environment variable: what the user has typed in place of a script (commands.py)


def program(script: str) -> str:
    """Return what the user has called to run this script: a command such as `sparselearning demo`, or the script."""
    return os.environ.get(COMMAND, script)


class ArgumentParser(argparse.ArgumentParser):
    """A parser that ends on a mistake with one line, without the usage."""

    def __init__(self, prog: str, **settings: Any):
        super().__init__(program(prog), **settings)

    def error(self, message: str) -> NoReturn:
        """Print the message, and exit with status 2."""
        fail(self.prog, message)


def fail(script: str, message: object, status: int = 2) -> NoReturn:
    """Print the message of an error as one line on stderr, and exit; status 2 is a user's mistake."""
    print(f"{program(script)}: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(status)
