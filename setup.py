"""Package metadata of sparselearning; tool settings live in pyproject.toml."""

import re
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (root / "sparselearning/__init__.py").read_text())[1]

# Where the repository is shown: links of the package's page on an index lead there.
repository = "https://github.com/TimDettmers/sparse_learning"

scripts = ["torchvision", "scikit-learn", "matplotlib", "tqdm", "tabulate"]
export = ["onnx", "onnxscript", "onnxruntime", "safetensors"]
# Their tests skip by name without them, as do those of the trainers.
models = ["timm", "transformers", "tokenizers", "peft"]
trainers = ["transformers", "lightning", "accelerate"]  # sparselearning.integrations
docs = [*scripts, "mkdocs-material", "mkdocstrings-python"]  # `make docs`; the scripts' parsers are read
docs += ['pymdown-extensions<12; python_version < "3.11"']  # the last mkdocstrings for Python 3.10 takes no newer one
test = ["pytest", "pytest-xdist", "hypothesis", "ruff", "pyright"]


def with_absolute_links(text):
    """Return a page whose links and pictures lead into the repository at this version, wherever it is shown."""

    def absolute(match):
        place = "raw" if match[1].endswith((".png", ".svg")) else "blob"
        return f"]({repository}/{place}/v{version}/{match[1]})"

    return re.sub(r"\]\((?!https?://|#)([^)\s]+)\)", absolute, text)


# Plain C++ behind a C interface, loaded with ctypes: one build serves every Python and torch. Optional: without a
# compiler numpy applies the masks, in about twice the time, and sparse layers compute with dense weights.
kernels = Path("sparselearning/native/kernels")
native = Extension(
    "sparselearning.native._native",
    [str(path) for path in sorted(kernels.glob("*.cpp"))],
    depends=[str(path) for path in sorted(kernels.iterdir())],
    extra_compile_args=["-std=c++17", "-O3", "-fvisibility=hidden", "-Wno-psabi", "-g0"],  # no symbols for debuggers
    extra_link_args=["-Wl,--strip-all"] if sys.platform == "linux" else [],
    py_limited_api=True,
    optional=True,
)


class BuildWithScripts(build_py):
    """Puts the folders of the scripts into the package, where `sparselearning train` finds them."""

    def run(self):
        super().run()
        if self.editable_mode:  # there the command runs the scripts of the repository
            return
        for main in root.glob("*/main.py"):
            target = Path(self.build_lib, "sparselearning/scripts", main.parent.name)
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(main.parent, target, ignore=lambda _, names: [n for n in names if not n.endswith(".py")])


setup(
    name="sparselearning",
    version=version,
    description="Train sparse networks from scratch, in any PyTorch loop",
    long_description=with_absolute_links((root / "README.md").read_text()),
    long_description_content_type="text/markdown",
    author="sparselearning contributors",
    url=repository,
    project_urls={
        "Source": repository,
        "Changelog": f"{repository}/blob/v{version}/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    },
    keywords="sparse training, sparsity, pruning, sparse momentum, SET, RigL, dynamic sparse training, PyTorch",
    classifiers=[
        "Development Status :: 5 - Production/Stable",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["sparselearning", "sparselearning.*"]),
    package_data={"sparselearning": ["py.typed"]},
    ext_modules=[native],
    cmdclass={"build_py": BuildWithScripts},
    entry_points={"console_scripts": ["sparselearning = sparselearning.commands:main"]},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    install_requires=["torch>=2.6", "numpy"],
    extras_require={
        "scripts": scripts,
        "export": export,
        "models": models,
        "trainers": trainers,
        **{trainer: [trainer] for trainer in ("lightning", "accelerate")},
        "transformers": ["transformers", "accelerate"],
        "language": ["transformers", "tokenizers"],  # --arch transformers:CONFIG, --tokens FILE.json
        "tensorboard": ["tensorboard"],  # --tensorboard
        "docs": docs,
        "test": [*docs, *export, "tensorboard", *test],
    },
)
