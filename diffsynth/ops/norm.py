"""Normalisation with a scale and shift that come from the timestep (adaptive norm, https://arxiv.org/abs/2212.09748).

A modulation has one row per sample, or a single row for all when every sample is at the same timestep, as in
generation. One row is folded into the norm's own affine step: nothing of the size of the tokens is expanded, and one
kernel does the work of three. Several rows are applied sample by sample, again without expanding them.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CHUNK_ELEMENTS = 1 << 21
"""Elements normalised at a time outside autograd: bounds the fp32 copies that the kernel may make of its input."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, inplace: bool = False) -> Tensor:
    """`x / rms(x) * weight` over the last dimension, statistics in fp32 (https://arxiv.org/abs/1910.07467).

    Args:
        x: `[..., D]`; outside autograd it passes in chunks of its first dimension.
        weight: `[D]`.
        eps: added to the mean square.
        inplace: overwrite `x`; ignored under autograd.
    """
    rows = max(_CHUNK_ELEMENTS * len(x) // max(x.numel(), 1), 1)
    if torch.is_grad_enabled() or (rows >= len(x) and not inplace):
        return F.rms_norm(x, weight.shape, weight, eps)
    out = x if inplace else torch.empty_like(x)
    for source, target in zip(x.split(rows), out.split(rows), strict=True):
        target.copy_(F.rms_norm(source, weight.shape, weight, eps))
    return out


class RMSNorm(nn.Module):
    """`rms_norm` with a learned weight."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, *, inplace: bool = False) -> Tensor:
        """Normalise `x [..., dim]`; `inplace` overwrites it where no autograd needs it."""
        return rms_norm(x, self.weight, self.eps, inplace=inplace)


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, lengths: Sequence[int], eps: float = 1e-6) -> Tensor:
    """Return `layer_norm(x) * (1 + scale) + shift`.

    Args:
        x: `[T, D]`, the tokens of all samples one after another.
        shift, scale: `[1, D]` for all samples or `[samples, D]`.
        lengths: tokens of each sample.
        eps: added to the variance.
    """
    weights = 1 + scale
    if len(weights) == 1:
        return F.layer_norm(x, x.shape[-1:], weights[0], shift[0], eps)
    parts = zip(x.split(lengths), weights, shift, strict=True)
    return torch.cat([F.layer_norm(part, part.shape[-1:], weight, bias, eps) for part, weight, bias in parts])


def modulated_rms_norm(
    x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, lengths: Sequence[int], eps: float = 1e-6
) -> Tensor:
    """Return `rms_norm(x) * weight * (1 + scale) + shift`; arguments as in `modulated_layer_norm`."""
    weights = (weight.float() * (1 + scale.float())).to(x.dtype)
    if len(weights) == 1:
        return rms_norm(x, weights[0], eps).add_(shift[0])
    parts = zip(x.split(lengths), weights, shift, strict=True)
    return torch.cat([rms_norm(part, row, eps).add_(bias) for part, row, bias in parts])


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return `x + gate * y`; without autograd `x` itself is updated.

    Args:
        x, y: `[T, D]`.
        gate: `[1, D]` for all samples or `[samples, D]`.
        lengths: tokens of each sample.
    """
    if len(gate) == 1:
        return torch.addcmul(x, y, gate) if torch.is_grad_enabled() else x.addcmul_(y, gate)
    parts = zip(x.split(lengths), y.split(lengths), gate, strict=True)
    return torch.cat([torch.addcmul(rest, branch, row) for rest, branch, row in parts])
