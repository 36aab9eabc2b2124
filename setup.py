"""Package metadata of sparselearning; tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

root = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (root / "sparselearning/__init__.py").read_text())[1]

scripts = ["torchvision", "scikit-learn", "matplotlib", "tqdm", "tabulate"]
export = ["onnx", "onnxscript", "safetensors"]
test = ["pytest", "pytest-xdist", "hypothesis", "ruff", "pyright"]

# Plain C++ behind a C interface, loaded with ctypes: one build serves every Python and torch. Optional: without a
# compiler everything but the sparse kernels works.
kernels = Path("sparselearning/sparse/kernels")
sparse_kernels = Extension(
    "sparselearning.sparse._kernels",
    [str(kernels / "kernels.cpp")],
    depends=[str(kernels / name) for name in ("geometry.h", "parallel.h", "vector.inc")],
    extra_compile_args=["-std=c++17", "-O3", "-fvisibility=hidden", "-Wno-psabi"],
    py_limited_api=True,
    optional=True,
)

# Applies the masks after a step; without it numpy does, in about twice the time.
zero_kernel = Extension(
    "sparselearning.native._zero",
    ["sparselearning/native/zero.cpp"],
    extra_compile_args=["-std=c++17", "-O3", "-fvisibility=hidden"],
    py_limited_api=True,
    optional=True,
)

setup(
    name="sparselearning",
    version=version,
    description="Train sparse networks from scratch, in any PyTorch loop",
    long_description=(root / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["sparselearning", "sparselearning.*"]),
    ext_modules=[sparse_kernels, zero_kernel],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    install_requires=["torch>=2.6", "numpy"],
    extras_require={"scripts": scripts, "export": export, "test": scripts + export + test},
)
