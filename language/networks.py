"""The language models of main.py by name: gpt, llama, and those of transformers."""

import argparse
import inspect
from pathlib import Path

from torch import Tensor, nn

from sparselearning.models.gpt import GPT
from sparselearning.models.llama import Llama

NETWORKS = {"gpt": GPT, "llama": Llama}
TRANSFORMERS = "transformers:"
# Words of --layer-density, and the patterns that mean their layers here and in most models of transformers.
PARTS = {"attention": "*[Aa]tt*n*", "mlp": "*mlp*"}


def architecture(text: str) -> str:
    """Parse the name of a network."""
    if text in NETWORKS or (text.startswith(TRANSFORMERS) and text != TRANSFORMERS):
        return text
    names = ", ".join(NETWORKS)
    raise argparse.ArgumentTypeError(f"expected {names} or transformers:CONFIG, got {text!r}")


def build_model(args: argparse.Namespace, vocabulary: int) -> nn.Module:
    """Return a newly initialised network, which maps tokens [batch, n] to logits [batch, n, vocabulary].

    Raises:
        ValueError: if the sizes do not fit together, or transformers has no such model.
    """
    if args.model.startswith(TRANSFORMERS):
        return OfTransformers(args.model.removeprefix(TRANSFORMERS), vocabulary, args.context)
    sizes = dict(layers=args.layers, width=args.width, heads=args.heads, context=args.context)
    more = dict(kv_heads=args.kv_heads) if args.model == "llama" else {}
    return NETWORKS[args.model](vocabulary, **sizes, dropout=args.dropout, tied=args.tied_head, **more)


class OfTransformers(nn.Module):
    """A language model of the package transformers with random weights, with the face of `sparselearning.models.gpt`.

    Args:
        config: a model type such as gpt2, whose usual sizes it has, or a JSON file with a configuration. The
            vocabulary is that of the tokens, and the context at least `context`.

    Raises:
        ValueError: if transformers is missing, or has no such model.
    """

    def __init__(self, config: str, vocabulary: int, context: int):
        super().__init__()
        try:
            import transformers  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ValueError(
                f"--arch transformers:{config} needs the package transformers: pip install transformers."
            ) from None
        own = dict(vocab_size=vocabulary, bos_token_id=None, eos_token_id=None, pad_token_id=None)
        try:
            if config.endswith(".json"):
                read = transformers.PretrainedConfig.get_config_dict(str(Path(config).resolve()))[0]
                if "model_type" not in read:
                    raise ValueError("it has no model_type")
                settings = transformers.AutoConfig.for_model(**{**read, **own})
            else:
                settings = transformers.AutoConfig.for_model(config, **own)
            most = getattr(settings, "max_position_embeddings", context)
            if most < context:
                raise ValueError(f"it reads at most {most} tokens: take --context {most} or less")
            self.network = transformers.AutoModelForCausalLM.from_config(settings)
        except (ValueError, OSError, KeyError, TypeError) as error:
            raise ValueError(f"--arch transformers:{config} cannot be built: {error}") from error
        self.cache_of = transformers.DynamicCache
        named = inspect.signature(self.network.forward).parameters
        self.name_of_cache = "cache" if "cache" in named else "past_key_values"  # before transformers 5.40

    def new_cache(self):
        """Return an empty cache for `forward`, which then gets new tokens alone."""
        return self.cache_of()

    def forward(self, tokens: Tensor, cache=None) -> Tensor:
        given = {self.name_of_cache: cache} if cache is not None else {}
        return self.network(input_ids=tokens, use_cache=cache is not None, **given).logits
