"""Small runs of imagenet/main.py on a few photographs."""

from script import load_main

script = load_main("imagenet")
SMALL = "--arch resnet18 --image-size 32 --batch-size 8 --workers 0 --print-freq 1 --epochs 1 --device cpu"


def parsed(folder, place, *more):
    """Return the arguments of a small run on the photographs in `folder`."""
    return script.parse_arguments([str(folder), "--run-dir", str(place), *SMALL.split(), *map(str, more)])
