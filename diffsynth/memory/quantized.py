"""fp8 storage: weights rest in 8 bits with one scale per output channel, and compute in the compute dtype."""

from dataclasses import dataclass

import torch
from torch import Tensor

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix or convolution kernel in fp8.

    The scale of an output channel maps its largest magnitude to the largest fp8 number, so channels of small weights
    lose no more than those of large ones (storing them unscaled rounds a good part of a small channel to zero).
    """

    data: Tensor
    scale: Tensor
    """fp32 `[out, 1, ...]`."""

    @classmethod
    def of(cls, weight: Tensor, dtype: torch.dtype) -> "QuantizedWeight":
        """Quantize `weight [out, ...]`."""
        values = weight.float()
        largest = values.abs().flatten(1).amax(dim=1).clamp_min(1e-12)
        scale = (largest / torch.finfo(dtype).max).reshape(-1, *(1,) * (weight.ndim - 1))
        return cls((values / scale).to(dtype), scale)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Tensor | QuantizedWeight":
        """Move the small bytes; an fp8 `dtype` keeps them quantized, any other restores the weight there."""
        ahead = device.type != "cpu"  # a copy to the host must have ended before it is read
        data, scale = self.data.to(device, non_blocking=ahead), self.scale.to(device, non_blocking=ahead)
        if dtype in FP8_DTYPES:
            return QuantizedWeight(data, scale)
        return (data.float() * scale).to(dtype)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.data.device

    @staticmethod
    def nbytes_of(weight: Tensor) -> int:
        """Bytes that `weight` would take."""
        return weight.numel() + 4 * len(weight)

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.data.nbytes + self.scale.nbytes
