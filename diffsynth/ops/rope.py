"""Rotary position embedding over several axes (https://arxiv.org/abs/2104.09864, one band of frequencies per axis)."""

from collections.abc import Sequence

import torch
from torch import Tensor

_CHUNK = 1024  # tokens rotated at a time: bounds the fp32 copies that half-precision inputs need


def rotary_angles(positions: Tensor, axes_dims: Sequence[int], theta: float) -> Tensor:
    """Angles of every token: `[T, sum(axes_dims) / 2]`, fp32.

    Args:
        positions: `[T, axes]`, the position of each token on each axis.
        axes_dims: real dimensions of the head given to each axis (even numbers).
        theta: base of the geometric series of frequencies.
    """
    bands = []
    for axis, dim in enumerate(axes_dims):
        exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
        bands.append(positions[:, axis].float().unsqueeze(1) * (1.0 / theta**exponent))
    return torch.cat(bands, dim=1)


def rotate_pairs(x: Tensor, table: Tensor) -> Tensor:
    """Rotate neighbouring dimensions `(2k, 2k+1)` of `x` as complex numbers, in fp32.

    Args:
        x: `[T, heads, head_dim]`.
        table: complex64 `[T, head_dim / 2]`, unit complex numbers (`torch.polar` of `rotary_angles`).

    Returns:
        `[T, heads, head_dim]` in `x`'s dtype; without autograd a half-precision `x` is overwritten chunk by chunk.
    """
    if x.dtype == torch.float32 or torch.is_grad_enabled():
        return _rotate_pairs(x, table)
    for part, rows in zip(x.split(_CHUNK), table.split(_CHUNK), strict=True):
        part.copy_(_rotate_pairs(part, rows))
    return x


def _rotate_pairs(x: Tensor, table: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table.unsqueeze(1)).flatten(-2).to(x.dtype)


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return `x * cos + [-x2, x1] * sin`, where `x1, x2` are the two halves of the last dimension.

    Args:
        x: `[T, heads, head_dim]`.
        cos, sin: fp32 `[T, head_dim]`, rounded to `x`'s dtype before the product as the reference does. Partners `d`
            and `d + head_dim/2` may carry different angles, so this is not always a rotation.

    Returns:
        `[T, heads, head_dim]`; without autograd `x` is overwritten chunk by chunk.
    """
    if torch.is_grad_enabled():
        return _rotate_half(x, cos, sin)
    for part, c, s in zip(x.split(_CHUNK), cos.split(_CHUNK), sin.split(_CHUNK), strict=True):
        part.copy_(_rotate_half(part, c, s))
    return x


def _rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)
    rotated = torch.cat([-x2, x1], dim=-1).mul_(sin.unsqueeze(1))
    return torch.addcmul(rotated, x, cos.unsqueeze(1))
