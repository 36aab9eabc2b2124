"""Train a sparse language model on text.

    python main.py                                             on the source code of this Python, without a download
    python main.py --method rigl --layer-density attention=0.3,mlp=0.1 --weights sparse
    python main.py --data shakespeare --tokens characters --arch llama --sample "ROMEO:"
    torchrun --nproc_per_node 2 main.py --data FILE --arch transformers:gpt2 --amp bf16

A run leaves runs/<data>-<model>-<density>-<seed>-<hash>/ with args.json, log.txt, metrics.jsonl, checkpoint.pt,
checkpoint-best.pt, curves.png and density.png; a second run with the same arguments is refused while it lives.
`--resume <that folder>` goes on where it was stopped, with the same arguments and on any number of processes; a command
with `--resume auto` goes on if its run has begun, and begins it if not. `--resume <that folder> --evaluate` prints the
loss of its checkpoint, and with `--sample TEXT` a text, and writes nothing. On SIGTERM and SIGINT (Ctrl-C) the run
writes a checkpoint after the running step, and exits with status 143 or 130.

An epoch is --eval-every steps. The masks move at the end of every epoch but the last (or every --prune-every-k-steps
steps): a weight that has just grown is still zero, and after the last epoch no step would train it.
"""

import logging
import math
import os
from functools import partial

# Before torch loads: threads that spin for long fight for shared cores, and one that sleeps at once is slow to wake.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000")}

import torch
from command_line import build_parser, exclusions, fill_in
from networks import build_model
from torch.nn import functional as F

from sparselearning.experiments.data import tokens as data
from sparselearning.experiments.data.text import data_folder
from sparselearning.experiments.report.text_plots import plot_losses
from sparselearning.experiments.run import resuming, session
from sparselearning.experiments.run.arguments import check
from sparselearning.experiments.run.costs import describe, flops_of_run
from sparselearning.experiments.run.folder import RunFolder, place
from sparselearning.experiments.run.lock import locked
from sparselearning.experiments.run.precision import choose_precision
from sparselearning.experiments.run.pretrained import load_pretrained
from sparselearning.experiments.run.start import build_masking, load_first_weights
from sparselearning.experiments.run.stopping import StopRequests
from sparselearning.experiments.run.training import Progress, evaluate, progress_bar, seed_generators, train_epoch
from sparselearning.flops import forward_flops
from sparselearning.models.generation import generate
from sparselearning.processes import distributed
from sparselearning.start.maskable import maskable_parameters
from sparselearning.weights.optimizer import torch_optimizer

logger = logging.getLogger("language")


def parse_arguments(argv=None):
    """Return the arguments; end with one line and exit status 2 where they exclude each other."""
    parser = build_parser(__doc__)
    args = parser.parse_args(argv)
    fill_in(args)
    check(parser, args, exclusions(args))
    return args


def run(args):
    """Make one run, and return its folder."""
    device = session.start(args)
    corpus = data.load(args.data, args.tokens, data_folder(args.data_dir), args.context)
    args.text_sha256 = corpus.digest  # a run goes on with the same text
    if args.sample is not None:
        corpus.tokens.encode(args.sample.encode())  # an unknown character is an error before the training, not after
    if args.evaluate:
        return evaluate_weights(args, corpus, device)
    with locked(place(args)) as lock:
        return train(args, corpus, device, lock)


def evaluate_weights(args, corpus, device):
    """Evaluate weights as they are on the held-out text, log the result and return it; write nothing."""
    weights = resuming.weights_to_evaluate(args)
    model = build_model(args, corpus.tokens.vocabulary)
    load_pretrained(weights, model)
    model = model.to(device)
    if args.compile:
        model.compile()
    precision, _ = choose_precision(args, model, build_optimizer(args, model), device)
    result = evaluate(model, held_out(args, corpus, device), precision, loss_of)
    bits = data.bits_per_byte(result.loss, corpus.bytes_per_token)
    logger.info("Validation loss: %.4f nats, %.4f bits per byte; next token right: %s", result.loss, bits, result)
    write_sample(args, model, corpus)
    return result


def train(args, corpus, device, lock):
    """Make the run in its folder, which nobody else writes into."""
    found = resuming.find(args)

    steps_per_epoch = args.eval_every

    def batches_of(steps):
        cut = dict(batch_size=args.batch_size, parts=args.accumulate, share=share())
        return on(device, data.batches(corpus.train, args.context, steps, args.seed, **cut))

    def batches_to_score():
        return list(batches_of(range(args.score_batches)))

    model = build_model(args, corpus.tokens.vocabulary)
    load_first_weights(args, model)
    model = model.to(device)
    flops = forward_flops(model, torch.zeros(1, args.context, dtype=torch.int64, device=device))
    if args.compile:
        model.compile()
    precision, optimizer = choose_precision(args, model, build_optimizer(args, model), device)
    scheduler = torch.optim.lr_scheduler.LambdaLR(torch_optimizer(optimizer), learning_rate(args))
    weights = sum(weight.numel() for _, weight in maskable_parameters(model))
    masking = None
    if not args.dense:
        masking = build_masking(args, model, optimizer, args.steps, batches_to_score, loss_function=loss_of)

    parts = resuming.parts_of_checkpoint(model, torch_optimizer(optimizer), scheduler, precision, masking)
    network = distributed.replicate(model)
    if rank := distributed.rank():  # each process drops out units of its own
        seed_generators(args.seed + 1000 * args.start_epoch + rank)
    first_epoch, begun, metrics = resuming.take(args, found, parts, model)
    folder = RunFolder(args, metrics, lock)

    with folder.log():
        session.log_head(folder, args, masking, flops, steps_per_epoch, example=f"{args.context} tokens")
        logger.info("%d processes on %s, %d tokens a step", distributed.processes(), device.type, tokens_of_step(args))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        active = parameters - (masking.total_zero if masking is not None else 0)
        logger.info("the whole network: %d of %d parameters, %.4f", active, parameters, active / parameters)
        logger.info("text: %d tokens of %d kinds, %d held out", *sizes_of(corpus))

        with StopRequests() as stop:
            checkpoints = resuming.Checkpoints(folder, parts, model, args, stop, steps_per_epoch)
            if metrics and begun is None:
                checkpoints.copy(found[0], copies_of(metrics))
            for epoch in range(first_epoch, args.epochs + 1):
                progress, begun = begun or Progress(), None
                first = (epoch - 1) * steps_per_epoch
                batches = batches_of(range(first + progress.steps, first + steps_per_epoch))
                after_step = partial(checkpoints.after_step, epoch, progress)
                with session.naming_errors(epoch, folder):
                    with progress_bar(f"step {first}", steps_per_epoch) as report:
                        shown = dict(report=report, report_every=args.print_freq)
                        settings = dict(loss_function=loss_of, accumulate=args.accumulate)
                        settings |= dict(progress=progress, after_step=after_step, **shown)
                        loss = train_epoch(network, batches, masking or optimizer, scheduler, precision, **settings)
                    training_seconds = progress.seconds
                    watched = checkpoints.watch(held_out(args, corpus, device), epoch, progress)
                    valid = evaluate(model, watched, precision, loss_of)
                    bits = data.bits_per_byte(valid.loss, corpus.bytes_per_token)
                    results = dict(train_loss=loss, valid_loss=valid.loss, valid_bits_per_byte=bits)
                    results |= dict(valid_accuracy=valid.accuracy)
                    results |= best_of(folder.metrics, valid.loss, epoch * steps_per_epoch)
                    lr = scheduler.get_last_lr()[0]
                    record = session.record_of(epoch, steps_per_epoch, results, lr, flops, masking, weights)
                    if masking is not None and epoch < args.epochs:
                        masking.at_end_of_epoch()
                record |= dict(tokens_per_second=steps_per_epoch * tokens_of_step(args) / training_seconds)
                folder.add(**record, seconds=progress.seconds)
                logger.info(folder.line())
                checkpoints.after_epoch(epoch, copies_of(folder.metrics))

        session.check_agreement(masking)
        session.draw_pictures(folder, masking, plot_losses)
        logger.info(describe(flops, flops_of_run(folder.metrics), example=f"{args.context} tokens"))
        last = folder.metrics[-1]
        logger.info("Validation loss: %.4f nats, %.4f bits per byte", last["valid_loss"], last["valid_bits_per_byte"])
        logger.info("Best step: %d, %.4f nats", last["best_step"], last["best_valid_loss"])
        if folder.writes:
            write_sample(args, model, corpus)
    return folder


def loss_of(logits, targets, **settings):
    """Return the cross entropy of logits [..., vocabulary] and the numbers of the next tokens [...]."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), **settings)


def build_optimizer(args, model):
    """Return AdamW with weight decay on matrices alone."""
    parameters = list(model.parameters())
    groups = [
        dict(params=[p for p in parameters if p.dim() > 1], weight_decay=args.wd),
        dict(params=[p for p in parameters if p.dim() <= 1], weight_decay=0.0),
    ]
    settings = dict(lr=args.lr, betas=(0.9, 0.99), fused=args.device.startswith(("cpu", "cuda")))
    return torch.optim.AdamW([group for group in groups if group["params"]], **settings)


def learning_rate(args):
    """Return the function from the step to the factor of the learning rate: linear warm-up, then a cosine to 10%."""

    def factor(step):
        if step < args.warmup:
            return (step + 1) / (args.warmup + 1)
        done = min((step - args.warmup) / max(args.steps - args.warmup, 1), 1)
        return 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2

    return factor


def held_out(args, corpus, device):
    """Return this process's windows of held-out text, the same in every evaluation."""
    at_a_time = args.batch_size // distributed.processes() // args.accumulate
    windows = data.windows_to_evaluate(corpus.valid, args.context, args.eval_windows, at_a_time, share())
    return on(device, windows)


def on(device, batches):
    """Yield the batches on a device."""
    for tokens, targets in batches:
        yield tokens.to(device, non_blocking=True), targets.to(device, non_blocking=True)


def share():
    """Return this process's number and the number of all."""
    return distributed.rank(), distributed.processes()


def tokens_of_step(args):
    """Return how many tokens a step trains on."""
    return args.batch_size * args.context


def sizes_of(corpus):
    """Return the number of tokens, of kinds of tokens, and of those held out."""
    return len(corpus.train) + len(corpus.valid), corpus.tokens.vocabulary, len(corpus.valid)


def best_of(metrics, loss, step):
    """Return the lowest validation loss so far and its step."""
    before = metrics[-1] if metrics else {}
    if loss < before.get("best_valid_loss", math.inf):
        return dict(best_valid_loss=loss, best_step=step)
    return {name: before[name] for name in ("best_valid_loss", "best_step")}


def copies_of(metrics):
    """Return the names that the checkpoint of the last epoch has besides checkpoint.pt."""
    return ["checkpoint-best.pt"] * (metrics[-1]["best_step"] == metrics[-1]["steps"])


def write_sample(args, model, corpus):
    """Log a text that goes on from --sample, where it is given."""
    if args.sample is None:
        return
    model.eval()
    choice = dict(temperature=args.temperature, top_k=args.top_k)
    prompt = corpus.tokens.encode(args.sample.encode()).tolist()
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        written = [*generate(model, prompt, args.sample_tokens, args.context, **choice)]
    logger.info("Sample:\n%s", corpus.tokens.decode([*prompt, *written]))


def main(argv=None):
    session.main("main.py", partial(parse_arguments, argv), run)


if __name__ == "__main__":
    main()
