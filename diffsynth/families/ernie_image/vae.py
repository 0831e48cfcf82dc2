"""The FLUX.2 autoencoder, as ERNIE-Image uses it.

A convolutional KL autoencoder (https://arxiv.org/abs/2112.10752) with 32 latent channels at 1/8 of the size, whose
latents are folded 2x2 into 128 channels at 1/16 and normalised by the running statistics of a batch norm
(https://huggingface.co/black-forest-labs/FLUX.2-dev). Parameters and buffers keep their published names.

Shapes: pixels `[B, 3, H, W]` in -1..1, latents `[B, 128, H/16, W/16]`. Activations stay channels-first: channels-last
was no faster on the CPU, and its group norm rounds four times as coarsely.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.linear import Linear
from ...ops.patchify import patchify, unpatchify

BATCH_NORM_EPS = 1e-5
"""The value ERNIE-Image was trained with; the `config.json` of its hub repository says 1e-4."""


@dataclass(frozen=True)
class VAEConfig:
    """Numbers of the published model."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 32
    norm_num_groups: int = 32

    @property
    def downscale(self) -> int:
        """Pixels of an image per latent before folding, along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


def _norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


class ResidualBlock(nn.Module):
    """Group norm, SiLU, convolution, twice, and a shortcut."""

    def __init__(self, in_dim: int, out_dim: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_dim, eps=1e-6)
        self.conv1 = nn.Conv2d(in_dim, out_dim, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_dim, eps=1e-6)
        self.conv2 = nn.Conv2d(out_dim, out_dim, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_dim, H, W]` to `[B, out_dim, H, W]`."""
        h = self.conv1(_norm_silu(self.norm1, x))
        h = _norm_silu(self.norm2, h)  # rebinding drops the convolution's output before the next one is made
        h = self.conv2(h)
        shortcut = self.conv_shortcut(x)
        return h + shortcut if torch.is_grad_enabled() else h.add_(shortcut)


class AttentionBlock(nn.Module):
    """One attention head over all positions."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, dim, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([Linear(dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same shape."""
        b, c, h, w = x.shape
        tokens = self.group_norm(x).permute(0, 2, 3, 1).reshape(b, 1, h * w, c)
        out = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out[0](out).reshape(b, h, w, c).permute(0, 3, 1, 2)


class MidBlock(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim, groups), ResidualBlock(dim, dim, groups)])
        self.attentions = nn.ModuleList([AttentionBlock(dim, groups)])

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same shape."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Resample(nn.Module):
    """Halve or double the size."""

    def __init__(self, dim: int, *, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(dim, dim, 3, padding=1) if up else nn.Conv2d(dim, dim, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C, 2H, 2W]` or `[B, C, H/2, W/2]`."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """Residual blocks at one size, and what leads to the next size."""

    def __init__(self, in_dim: int, out_dim: int, blocks: int, groups: int, *, down: bool = False, up: bool = False):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResidualBlock(in_dim if index == 0 else out_dim, out_dim, groups) for index in range(blocks)
        )
        self.downsamplers = nn.ModuleList([Resample(out_dim, up=False)] if down else [])
        self.upsamplers = nn.ModuleList([Resample(out_dim, up=True)] if up else [])

    def layers(self) -> Iterator[nn.Module]:
        """Its layers in order. The caller runs them: a forward of this level would keep its input alive to the end."""
        return chain(self.resnets, self.downsamplers, self.upsamplers)


class Encoder(nn.Module):
    """Pixels to the moments of the posterior."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        dims, groups = config.block_out_channels, config.norm_num_groups
        last = len(dims) - 1
        self.conv_in = nn.Conv2d(config.in_channels, dims[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(dims[max(level - 1, 0)], dim, config.layers_per_block, groups, down=level < last)
            for level, dim in enumerate(dims)
        )
        self.mid_block = MidBlock(dims[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, dims[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(dims[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 3, H, W]` to `[B, 2 * latent_channels, H/8, W/8]`."""
        x = self.conv_in(x)
        for layer in chain.from_iterable(cast(Level, level).layers() for level in self.down_blocks):
            x = layer(x)
        return self.conv_out(_norm_silu(self.conv_norm_out, self.mid_block(x)))


class Decoder(nn.Module):
    """Latents to pixels."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        dims, groups = tuple(reversed(config.block_out_channels)), config.norm_num_groups
        last = len(dims) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, dims[0], 3, padding=1)
        self.mid_block = MidBlock(dims[0], groups)
        self.up_blocks = nn.ModuleList(
            Level(dims[max(level - 1, 0)], dim, config.layers_per_block + 1, groups, up=level < last)
            for level, dim in enumerate(dims)
        )
        self.conv_norm_out = nn.GroupNorm(groups, dims[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(dims[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, latent_channels, h, w]` to `[B, 3, 8h, 8w]`."""
        x = self.mid_block(self.conv_in(x))
        for layer in chain.from_iterable(cast(Level, level).layers() for level in self.up_blocks):
            x = layer(x)
        return self.conv_out(_norm_silu(self.conv_norm_out, x))


class Flux2VAE(nn.Module):
    """Encodes images to normalised, folded latents and back."""

    def __init__(self, config: VAEConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VAEConfig()
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)
        self.bn = nn.BatchNorm2d(4 * config.latent_channels, affine=False)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        mean, variance = self.bn.running_mean, self.bn.running_var
        assert mean is not None
        assert variance is not None  # tracked by construction
        return mean.float().view(1, -1, 1, 1), (variance.float() + BATCH_NORM_EPS).sqrt().view(1, -1, 1, 1)

    def encode(self, pixels: Tensor) -> Tensor:
        """Mean of the posterior, folded 2x2 and normalised channel by channel.

        Args:
            pixels: `[B, 3, H, W]` in -1..1, sides multiples of 16.

        Returns:
            fp32 `[B, 4 * latent_channels, H/16, W/16]`.
        """
        moments = self.quant_conv(self.encoder(pixels))
        mean, std = self._statistics()
        return (patchify(moments.chunk(2, dim=1)[0].float()) - mean) / std

    def decode(self, latents: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Inverse of `encode`.

        Args:
            latents: normalised, fp32 `[B, 4 * latent_channels, h, w]`.
            dtype: in which the decoder computes.

        Returns:
            `[B, 3, 16h, 16w]` of that dtype, about -1..1 (not clamped).
        """
        mean, std = self._statistics()
        z = unpatchify(latents * std + mean).to(dtype)
        return self.decoder(self.post_quant_conv(z))
