"""Apply a convolutional network to overlapping tiles and blend the seams."""

from collections.abc import Callable

import torch
from torch import Tensor


def tile_starts(size: int, tile: int, stride: int) -> list[int]:
    """First positions of the tiles that cover `0..size`; the last one ends at the border."""
    if size <= tile:
        return [0]
    return [*range(0, size - tile, stride), size - tile]


def tiled_apply(
    network: Callable[[Tensor], Tensor], x: Tensor, tile: int, stride: int, scale: float, align: int = 1
) -> Tensor:
    """Run `network` tile by tile and average overlaps with weights that rise linearly from each tile's border.

    Args:
        network: maps `[B, C, h, w]` to `[B, C', h * scale, w * scale]`.
        x: `[B, C, H, W]`.
        tile: side of a tile, in the units of `x`.
        stride: distance of neighbouring tiles, at most `tile`.
        scale: size of the output over the size of the input.
        align: starts and sizes of tiles are multiples of this.

    Returns:
        fp32 `[B, C', H * scale, W * scale]`. Where one tile covers everything this is `network(x)`, exactly.
    """
    tile, stride = max(tile // align, 1) * align, max(stride // align, 1) * align
    rows, columns = tile_starts(x.shape[-2], tile, stride), tile_starts(x.shape[-1], tile, stride)
    if len(rows) == len(columns) == 1:
        return network(x).float()
    total = weights = None
    for row in rows:
        for column in columns:
            part = network(x[..., row : row + tile, column : column + tile]).float()
            ramp = _ramp(part.shape[-2], part.device).unsqueeze(1) * _ramp(part.shape[-1], part.device)
            if total is None or weights is None:
                height, width = round(x.shape[-2] * scale), round(x.shape[-1] * scale)
                total = part.new_zeros(*part.shape[:-2], height, width)
                weights = part.new_zeros(height, width)
            window = (
                ...,
                slice(round(row * scale), round(row * scale) + part.shape[-2]),
                slice(round(column * scale), round(column * scale) + part.shape[-1]),
            )
            total[window] += part * ramp
            weights[window] += ramp
    assert total is not None
    assert weights is not None
    return total.div_(weights)


def _ramp(length: int, device: torch.device) -> Tensor:
    """`[length]`: rises from the border to the middle and falls again, never 0."""
    distance = torch.arange(length, dtype=torch.float32, device=device)
    return torch.minimum(distance, distance.flip(0)) + 1
