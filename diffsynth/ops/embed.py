"""Sinusoidal embedding of timesteps."""

import math

import torch
from torch import Tensor


def timestep_embedding(timesteps: Tensor, dim: int, *, cos_first: bool) -> Tensor:
    """Sinusoids of frequencies `10000**(-j / (dim/2))` (https://arxiv.org/abs/2006.11239), computed in fp32.

    Args:
        timesteps: `[S]`, in units of the 0..1000 training grid.
        dim: width of the embedding, even.
        cos_first: order of the halves, `[cos | sin]` or `[sin | cos]`.

    Returns:
        fp32 `[S, dim]`.
    """
    half = dim // 2
    # In this order of operations: the usual implementations round like it, and a large timestep magnifies the last bit.
    exponent = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float().unsqueeze(1) * torch.exp(exponent)
    halves = (angles.cos(), angles.sin()) if cos_first else (angles.sin(), angles.cos())
    return torch.cat(halves, dim=1)
