"""The loss of a language model after its masks have moved, by what Adam's state of regrown weights starts from.

    python benchmarks/language_updates.py                  # half an hour
    python benchmarks/language_updates.py --quick

trains a small GPT on the source code of this Python (4 layers, width 128, attention 0.3 and MLP 0.1, AdamW). The masks
move every 100 steps: the 20% smallest weights of a layer leave, and as many random ones grow. Each start of regrown
weights sees the same batches from the same first weights as a network whose masks stay. Measured is how much higher the
training loss is, 1 to 100 steps after an update, than it was in the 20 steps before, both beside the network whose
masks stay. Writes results/language_updates-cpu.json and the picture results/language_updates.png.
"""

import logging
import os
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import common
import torch
from regrown_steps import STARTS
from torch.nn import functional as F

from sparselearning import Masking
from sparselearning.experiments.data import tokens
from sparselearning.experiments.report import plots
from sparselearning.models.gpt import GPT

STAYS = "masks stay"
EVERY, BEFORE = 100, 20
DENSITY = {"*attention*": 0.3, "*mlp*": 0.1}


def losses_of(corpus, start, seed, args):
    """Return the training loss of each step."""
    torch.manual_seed(seed)
    model = GPT(corpus.tokens.vocabulary, layers=args.layers, width=args.width, heads=4, context=args.context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.1)
    parts = dict(prune_every_k_steps=EVERY, regrown_warm_up=0, lr_by_density=False, prune_rate=0.2)
    parts |= start if start is not None else dict(prune_rate=0.0, decay_schedule="constant", reset_state=False)
    masking = Masking.from_method("smet", model, optimizer, args.steps, DENSITY, **parts)
    torch.manual_seed(seed)
    losses = []
    for inputs, targets in tokens.batches(corpus.train, args.context, range(args.steps), seed, 16):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    masking.check()
    return losses


def after_updates(losses, stays, args):
    """Return by the number of steps after an update, from 1: how much higher the loss is than before it, on average."""
    extra = [one - other for one, other in zip(losses, stays, strict=True)]
    risen = defaultdict(list)
    for update in range(args.first, args.steps - EVERY, EVERY):  # after so many steps the masks move
        before = fmean(extra[update - BEFORE : update])
        for step in range(EVERY):
            risen[step].append(extra[update + step] - before)
    return [fmean(risen[step]) for step in range(EVERY)]


def draw(rows, path):
    """Draw the loss after updates, smoothed over five steps."""
    figure, (axes,) = plots._figure(6, 4)
    for row, colour in zip(rows, plots.COLOURS, strict=False):
        risen = row["risen"]
        smooth = [fmean(risen[max(i - 2, 0) : i + 3]) for i in range(len(risen))]
        axes.plot(range(1, len(risen) + 1), smooth, color=colour, label=row["start"])
    axes.axhline(0, color="0.6", linewidth=0.8)
    plots._label(axes, "steps after an update of the masks", "training loss above that before it, nats")
    plots._legend(axes)
    plots._write(figure, path)


def main():
    """Train, log, save and draw."""
    args = common.parse(
        __doc__, rounds=3, steps=(2000, "steps of a run"), layers=(4, "blocks"), width=(128, "width of the network"),
        context=(128, "tokens that the network reads"), lr=(1e-3, "learning rate"),
        first=(500, "updates that count, from this step on"),
    )  # fmt: skip
    if args.quick:
        args.steps, args.layers, args.width, args.context, args.first = 600, 1, 32, 32, 200
    corpus = tokens.load("python", "bytes", Path(os.environ.get("SPARSELEARNING_DATA") or "data"), args.context)
    risen = {name: [] for name in STARTS}
    last = {name: [] for name in (*STARTS, STAYS)}
    for seed in range(17, 17 + args.rounds):
        stays = losses_of(corpus, None, seed, args)
        last[STAYS].append(fmean(stays[-100:]))
        for name, start in STARTS.items():
            losses = losses_of(corpus, start, seed, args)
            risen[name].append(after_updates(losses, stays, args))
            last[name].append(fmean(losses[-100:]))
            logging.info("seed %d, %s: %.4f nats in the last 100 steps", seed, name, last[name][-1])
    rows = [
        dict(
            start=name,
            risen=[round(fmean(at), 5) for at in zip(*runs, strict=True)],
            highest=round(max(map(fmean, zip(*runs, strict=True))), 4),
            last_loss=round(fmean(last[name]), 4),
            seeds=args.rounds,
        )
        for name, runs in risen.items()
    ]
    for row in rows:
        logging.info("%-34s risen by at most %+.4f nats, at last %.4f", row["start"], row["highest"], row["last_loss"])
    logging.info("%-34s at last %.4f", STAYS, fmean(last[STAYS]))
    common.save(args, "language_updates", rows)
    picture = Path(args.output).with_suffix(".png") if args.output else common.RESULTS / "language_updates.png"
    draw(rows, picture)
    logging.info("Drew %s", picture)


if __name__ == "__main__":
    main()
