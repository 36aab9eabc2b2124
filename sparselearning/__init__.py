"""Train sparse networks from scratch, in any PyTorch loop."""

__version__ = "2.0.0.dev0"
