"""Random noise that depends on the seed and the kind of device, on nothing else."""

import logging
from functools import cache

import torch
from torch import Tensor

from .device import is_available

logger = logging.getLogger(__name__)


@cache
def _warn_fallback(device: str) -> None:
    logger.warning(
        "rand_device=%r is not available on this machine; noise is drawn on the CPU instead, which gives other images "
        "than that device would for the same seed.",
        device,
    )


def noise_device(rand_device: str | torch.device) -> torch.device:
    """The device to draw noise on: `rand_device`, or the CPU (with one warning) where it does not exist."""
    device = torch.device(rand_device)
    if not is_available(device):
        _warn_fallback(str(rand_device))
        return torch.device("cpu")
    return device


def noise(shape: tuple[int, ...], seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Standard normal noise of one image, `[1, *shape]`.

    Args:
        shape: of the latents of the image.
        seed: of the image's own generator.
        device: where the generator lives; generators of different kinds of device give different numbers.
        dtype: drawn in this dtype, as the stream of numbers depends on it.
    """
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn((1, *shape), generator=generator, device=device, dtype=dtype)
