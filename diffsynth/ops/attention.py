"""Attention over packed sequences: no padding, no mask."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Full attention inside each sample of a packed sequence.

    Args:
        q, k, v: `[T, heads, head_dim]`, the tokens of all samples one after another.
        lengths: tokens of each sample; they sum to `T`.

    Returns:
        `[T, heads, head_dim]`. Without autograd the result takes `q`'s memory: a sample's queries are not needed once
        its output is known, so no second tensor of that size ever exists.
    """
    outputs = (
        F.scaled_dot_product_attention(*(t.transpose(0, 1).unsqueeze(0) for t in sample)).squeeze(0).transpose(0, 1)
        for sample in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    )
    if len(lengths) == 1:
        return next(outputs)
    if torch.is_grad_enabled():
        return torch.cat(list(outputs))
    for queries, output in zip(q.split(lengths), outputs, strict=True):
        queries.copy_(output)
    return q
