"""Latents to tokens and back: 2x2 patches, row-major order, channel index `c*4 + row*2 + column`."""

from torch import Tensor


def patchify(latents: Tensor) -> Tensor:
    """`[B, C, H, W]` (H, W even) to `[B, C*4, H/2, W/2]`."""
    b, c, h, w = latents.shape
    patches = latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return patches.reshape(b, c * 4, h // 2, w // 2)


def unpatchify(patches: Tensor) -> Tensor:
    """Inverse of `patchify`: `[B, C*4, h, w]` to `[B, C, 2h, 2w]`."""
    b, c, h, w = patches.shape
    latents = patches.reshape(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
    return latents.reshape(b, c // 4, h * 2, w * 2)


def to_tokens(grid: Tensor) -> Tensor:
    """`[B, C, h, w]` to `[B, h*w, C]`, row-major."""
    return grid.flatten(2).transpose(1, 2)


def from_tokens(tokens: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `to_tokens`: `[B, height*width, C]` to `[B, C, height, width]`."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], height, width)
