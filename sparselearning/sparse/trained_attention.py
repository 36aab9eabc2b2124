"""nn.MultiheadAttention that trains on the active weights of its input projections."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselearning.sparse import ops
from sparselearning.sparse.held import Held
from sparselearning.sparse.trained import Rows, Trained, in_autocast

PROJECTIONS: tuple[str, ...] = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class TrainedAttention(Rows, nn.MultiheadAttention):
    """nn.MultiheadAttention, Vaswani et al. 2017, Attention Is All You Need, https://arxiv.org/abs/1706.03762.

    With E = embed_dim, the packed weight (3 E, E) is held as one, and also its parts, of E rows for the queries, keys
    and values each, are multiplied with alone. Unbatched or nested inputs, `bias_k`, `bias_v` and `add_zero_attn` are
    left to torch's own layer, which reads the dense weights.
    """

    plain, names = nn.MultiheadAttention, PROJECTIONS
    parts: tuple[Tensor, dict[tuple[int, int], tuple[Tensor, ...]]] | None = None  # see `indices_of`

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        masks = [mask for mask in (key_padding_mask, attn_mask) if mask is not None]
        if not self.has_kernel(query, key, value) or not self.take_masks(query, key, key_padding_mask, attn_mask):
            settings = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return super().forward(query, key, value, *settings)
        if is_causal and attn_mask is None:
            raise RuntimeError("Expected attn_mask with is_causal=True, which only says what that mask is.")
        parts = self.projected(query, key, value)
        q, k, v = (part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for part in parts)
        hinted = is_causal and key_padding_mask is None and not need_weights
        mask = None if hinted or not masks else self.merged(q, key_padding_mask, attn_mask)
        heads, weights = self.attended(q, k, v, mask, hinted, need_weights)
        y = heads.transpose(1, 2).flatten(2)
        y = self.output(y if self.batch_first else y.transpose(0, 1))
        return y, weights.mean(1) if weights is not None and average_attn_weights else weights

    def has_kernel(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Return whether the kernels and this class compute the output; torch says what is wrong with other inputs."""
        usual = self.bias_k is None and self.bias_v is None and not self.add_zero_attn
        if not self.holds or not usual or any(x.is_nested or x.dim() != 3 for x in (query, key, value)):
            return False
        batch = 0 if self.batch_first else 1
        sizes = (query.shape[2], key.shape[2], value.shape[2]) == (self.embed_dim, self.kdim, self.vdim)
        alike = key.shape[:2] == value.shape[:2] and key.shape[batch] == query.shape[batch]
        inputs: dict[str, Tensor] = dict(zip(PROJECTIONS, (query, query, key, value), strict=True))
        return sizes and alike and all(self.can_multiply(held, name, inputs[name]) for name, held in self.holds.items())

    def take_masks(self, query: Tensor, key: Tensor, padding: Tensor | None, mask: Tensor | None) -> bool:
        """Return whether the masks have shapes and dtypes that attention takes."""
        batch, length = (0, 1) if self.batch_first else (1, 0)
        targets, sources, images = query.shape[length], key.shape[length], query.shape[batch]
        shapes = ((targets, sources), (images * self.num_heads, targets, sources))
        given = [each for each in (padding, mask) if each is not None]
        return (
            all(each.dtype in (torch.bool, query.dtype) for each in given)
            and len({each.dtype for each in given}) < 2  # torch warns of others
            and (padding is None or padding.shape == (images, sources))
            and (mask is None or mask.shape in shapes)
        )

    def projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values, (N, L, E) each."""
        same, alike = query is key and key is value, key is value
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        size, bias = self.embed_dim, self.in_proj_bias
        if not self._qkv_same_embed_dim:
            biases = (None, None, None) if bias is None else bias.chunk(3)
            inputs = zip(PROJECTIONS[1:], (query, key, value), biases, strict=True)
            return tuple(self.multiplied(name, x, part, 0, size) for name, x, part in inputs)
        if same:
            return self.multiplied("in_proj_weight", query, bias, 0, 3 * size).chunk(3, -1)
        first = self.multiplied("in_proj_weight", query, bias, 0, size)
        if alike:
            return first, *self.multiplied("in_proj_weight", key, bias, size, 3 * size).chunk(2, -1)
        last = self.multiplied("in_proj_weight", value, bias, 2 * size, 3 * size)
        return first, self.multiplied("in_proj_weight", key, bias, size, 2 * size), last

    def multiplied(self, name: str, x: Tensor, bias: Tensor | None, first: int, last: int) -> Tensor:
        """Return the product of (N, L, inputs) with the rows from `first` to `last` - 1 of a weight."""
        weight = self._parameters[name]
        assert weight is not None
        rows, held = len(weight), self.holds.get(name)
        bias = bias if bias is None or len(bias) == last - first else bias[first:last]
        if held is None:
            return F.linear(x, weight[first:last], bias)
        flat, narrow = x.reshape(-1, x.shape[-1]), in_autocast(held)
        flat = flat.float() if narrow else flat
        begin, end = int(held.entries.start[first]), int(held.entries.start[last])
        values = held.value if last - first == rows else held.value[begin:end]
        y = ops.run("linear", flat, values, bias, *self.indices_of(held, first, last), False)
        y = held.watch(flat, y, lambda dy: F.pad(dy, (first, rows - last)))
        y = y.reshape(*x.shape[:-1], last - first)
        return y.to(torch.get_autocast_dtype("cpu")) if narrow else y

    def indices_of(self, held: Held, first: int, last: int) -> tuple[Tensor, ...]:
        """Return the places of the values in some rows, as the kernels take them; of a part once until they move."""
        entries = held.entries
        if last - first == entries.shape[0]:
            return held.indices()
        if self.parts is None or self.parts[0] is not entries.start:
            vars(self)["parts"] = entries.start, {}
        assert self.parts is not None
        known = self.parts[1]
        if (first, last) not in known:
            begin, end = int(entries.start[first]), int(entries.start[last])
            start, column = entries.start[first : last + 1] - begin, entries.column[begin:end].clone()
            shape = torch.Size((last - first, entries.width))
            known[first, last] = start, column, *ops.transposed(start, column, self.as_convolution(shape))
        return known[first, last]

    def merged(self, q: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return what is added to the scores of q (N, heads, L, E / heads), of a shape that broadcasts to theirs."""
        parts = []
        if mask is not None:
            parts.append(added(mask, q.dtype).view(-1 if mask.dim() == 2 else len(q), *self._heads(mask)))
        if padding is not None:
            parts.append(added(padding, q.dtype)[:, None, None])
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def _heads(self, mask):
        return (1 if mask.dim() == 2 else self.num_heads), *mask.shape[-2:]

    def attended(self, q, k, v, mask, is_causal, need_weights) -> tuple[Tensor, Tensor | None]:
        """Return the output of each head, (N, heads, L, E / heads), and the weights if they are needed."""
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal), None
        scores = (q * math.sqrt(1 / self.head_dim)) @ k.transpose(-2, -1)
        weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
        return weights @ v, weights

    def output(self, y: Tensor) -> Tensor:
        """Return the output projection of y; torch's own layer does not call the module, whose hooks are not called."""
        projection = self.out_proj
        return (
            projection.forward(y)
            if isinstance(projection, Trained)
            else F.linear(y, projection.weight, projection.bias)
        )

    def __getstate__(self):
        return {name: entry for name, entry in super().__getstate__().items() if name != "parts"}

    def _apply(self, fn, recurse=True):
        vars(self).pop("parts", None)
        return super()._apply(fn, recurse)


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as what is added to scores: -inf where a bool is True."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
