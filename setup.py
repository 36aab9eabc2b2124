"""Package metadata of sparselearning; tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (root / "sparselearning/__init__.py").read_text())[1]

scripts = ["torchvision", "scikit-learn", "matplotlib", "tqdm", "tabulate"]
test = ["pytest", "pytest-xdist", "hypothesis", "ruff", "pyright"]

setup(
    name="sparselearning",
    version=version,
    description="Train sparse networks from scratch, in any PyTorch loop",
    long_description=(root / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["sparselearning", "sparselearning.*"]),
    install_requires=["torch>=2.6", "numpy"],
    extras_require={"scripts": scripts, "test": scripts + test},
)
