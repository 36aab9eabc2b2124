"""Which parameters of a model a mask is put on."""

from collections.abc import Iterator

from torch import nn

NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def maskable_parameters(module: nn.Module, *, sparse_embeddings: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield name and parameter of the weights that are made sparse, tied ones once.

    Left out are biases, whatever has fewer than two dimensions or no entries, all parameters of
    normalisation layers, frozen ones, and embeddings (and what is tied to them) unless asked for.
    """
    dense = NORMALISATIONS if sparse_embeddings else (*NORMALISATIONS, nn.Embedding, nn.EmbeddingBag)
    kept_dense = {
        id(parameter)
        for part in module.modules()
        if isinstance(part, dense)
        for parameter in part.parameters(recurse=False)
    }
    for name, parameter in module.named_parameters():
        is_bias = "bias" in name.rpartition(".")[2]
        is_weight = parameter.dim() >= 2 and parameter.numel() > 0 and not is_bias
        if is_weight and parameter.requires_grad and id(parameter) not in kept_dense:
            yield canonical_name(name), parameter


def canonical_name(name: str) -> str:
    """Return the name without what DDP and torch.compile put into it.

    >>> canonical_name("module._orig_mod.fc1.weight")
    'fc1.weight'
    """
    return name.replace("_orig_mod.", "").removeprefix("module.")
