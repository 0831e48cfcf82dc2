"""The Qwen-Image autoencoder on its two-dimensional path.

The network is the causal video autoencoder of Wan 2.1 (https://arxiv.org/abs/2503.20314), fine-tuned. A still image is
a video of one frame, and for one frame a causal convolution sees its own frame through its last temporal tap and zeros
through the others: every 3x3x3 convolution *is* the 3x3 convolution of that tap, and the temporal convolutions
(`time_conv`) are never reached. This file computes just that; parameters keep their published names and shapes.

Shapes: pixels `[B, 3, H, W]` in -1..1, latents `[B, z_dim, H/8, W/8]`. Activations are kept channels-last, where the
norm over channels is a norm over the last, contiguous dimension.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.norm import rms_norm


@dataclass(frozen=True)
class VAEConfig:
    """Numbers of the published model."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    input_channels: int = 3
    latents_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )  # fmt: skip

    @property
    def downscale(self) -> int:
        """Pixels of an image per latent, along one side."""
        return 2 ** len(self.temperal_downsample)


class FrameConv(nn.Conv3d):
    """A causal 3-D convolution applied to a single frame: the 2-D convolution of its last temporal tap."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int, int]) -> None:
        super().__init__(in_channels, out_channels, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C_in, H, W]` to `[B, C_out, H, W]`."""
        return F.conv2d(x, self.weight[:, :, -1], self.bias, padding=self.kernel_size[-1] // 2)


class ChannelNorm(nn.Module):
    """`x / ||x||_2 * sqrt(C) * gamma` over channels, then SiLU where asked; in fp32 whatever the dtype."""

    def __init__(self, dim: int, spatial_dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * spatial_dims))

    def forward(self, x: Tensor, *, silu: bool = False) -> Tensor:
        """Normalise `x [B, C, H, W]`."""
        b, c, h, w = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(b * h * w, c)
        # The reference divides by max(||x||, 1e-12); as a mean of squares that floor is 1e-24 / C.
        out = rms_norm(rows, self.gamma.flatten(), eps=1e-24 / c)
        out = F.silu(out, inplace=not torch.is_grad_enabled()) if silu else out
        return out.view(b, h, w, c).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, and a shortcut."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(in_dim)
        self.conv1 = FrameConv(in_dim, out_dim, 3)
        self.norm2 = ChannelNorm(out_dim)
        self.conv2 = FrameConv(out_dim, out_dim, 3)
        self.conv_shortcut = FrameConv(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_dim, H, W]` to `[B, out_dim, H, W]`."""
        h = self.conv1(self.norm1(x, silu=True))
        h = self.norm2(h, silu=True)  # rebinding drops the convolution's output before the next one is made
        h = self.conv2(h)
        shortcut = self.conv_shortcut(x)
        return h + shortcut if torch.is_grad_enabled() else h.add_(shortcut)


class AttentionBlock(nn.Module):
    """One attention head over all positions of the frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim, spatial_dims=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same shape."""
        b, c, h, w = x.shape
        qkv = self.to_qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(b, 1, h * w, 3 * c)
        out = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))
        return x + self.proj(out.reshape(b, h, w, c).permute(0, 3, 1, 2))


class Resample(nn.Module):
    """Halve or double the frame; `time_conv` belongs to the checkpoint and to video, a single frame never meets it."""

    def __init__(self, dim: int, *, up: bool, temporal: bool) -> None:
        super().__init__()
        self.up = up
        # Index 0 stands for the parameter-free half (padding or upsampling), so that the convolution is `resample.1`.
        conv = nn.Conv2d(dim, dim // 2, 3, padding=1) if up else nn.Conv2d(dim, dim, 3, stride=2)
        self.resample = nn.Sequential(nn.Identity(), conv)
        if temporal:
            self.time_conv = FrameConv(dim, 2 * dim if up else dim, (3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C/2, 2H, 2W]` or `[B, C, H/2, W/2]`."""
        if self.up:
            return self.resample[1](F.interpolate(x, scale_factor=2.0, mode="nearest-exact"))
        return self.resample[1](F.pad(x, (0, 1, 0, 1)))


class MidBlock(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim), ResidualBlock(dim, dim)])
        self.attentions = nn.ModuleList([AttentionBlock(dim)])

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same shape."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """Pixels to the moments of the posterior."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        dims = [config.base_dim * mult for mult in (1, *config.dim_mult)]
        self.conv_in = FrameConv(config.input_channels, dims[0], 3)
        blocks: list[nn.Module] = []
        for level, (in_dim, out_dim) in enumerate(pairwise(dims)):
            for index in range(config.num_res_blocks):
                blocks.append(ResidualBlock(in_dim if index == 0 else out_dim, out_dim))
            if level < len(config.temperal_downsample):
                blocks.append(Resample(out_dim, up=False, temporal=config.temperal_downsample[level]))
        self.down_blocks = nn.ModuleList(blocks)
        self.mid_block = MidBlock(dims[-1])
        self.norm_out = ChannelNorm(dims[-1])
        self.conv_out = FrameConv(dims[-1], 2 * config.z_dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 3, H, W]` to `[B, 2 z_dim, H/8, W/8]`."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.norm_out(self.mid_block(x), silu=True))


class UpBlock(nn.Module):
    """Residual blocks and, but for the last level, an upsampler that halves the channels."""

    def __init__(self, in_dim: int, out_dim: int, num_res_blocks: int, *, up: bool, temporal: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResidualBlock(in_dim if index == 0 else out_dim, out_dim) for index in range(num_res_blocks + 1)
        )
        self.upsamplers = nn.ModuleList([Resample(out_dim, up=True, temporal=temporal)] if up else [])

    def layers(self) -> Iterator[nn.Module]:
        """Its layers in order. The caller runs them: a forward of this block would keep its input alive to the end."""
        return chain(self.resnets, self.upsamplers)


class Decoder(nn.Module):
    """Latents to pixels."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        dims = [config.base_dim * mult for mult in (config.dim_mult[-1], *reversed(config.dim_mult))]
        temporal = tuple(reversed(config.temperal_downsample))
        self.conv_in = FrameConv(config.z_dim, dims[0], 3)
        self.mid_block = MidBlock(dims[0])
        self.up_blocks = nn.ModuleList(
            UpBlock(
                in_dim if level == 0 else in_dim // 2,  # the upsampler before has halved them
                out_dim,
                config.num_res_blocks,
                up=level < len(temporal),
                temporal=level < len(temporal) and temporal[level],
            )
            for level, (in_dim, out_dim) in enumerate(pairwise(dims))
        )
        self.norm_out = ChannelNorm(dims[-1])
        self.conv_out = FrameConv(dims[-1], config.input_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, z_dim, H/8, W/8]` to `[B, 3, H, W]`."""
        x = self.mid_block(self.conv_in(x))
        for layer in chain.from_iterable(cast(UpBlock, block).layers() for block in self.up_blocks):
            x = layer(x)
        return self.conv_out(self.norm_out(x, silu=True))


class QwenImageVAE(nn.Module):
    """Encodes images to normalised latents and back."""

    def __init__(self, config: VAEConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VAEConfig()
        self.encoder = Encoder(config)
        self.quant_conv = FrameConv(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = FrameConv(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(v, device=like.device) for v in (self.config.latents_mean, self.config.latents_std))
        return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)

    def encode(self, pixels: Tensor) -> Tensor:
        """Mean of the posterior, normalised channel by channel.

        Args:
            pixels: `[B, 3, H, W]` in -1..1, sides multiples of 8.

        Returns:
            fp32 `[B, z_dim, H/8, W/8]`.
        """
        moments = self.quant_conv(self.encoder(pixels.contiguous(memory_format=torch.channels_last)))
        mean, std = self._statistics(moments)
        return (moments.chunk(2, dim=1)[0].float() - mean) / std

    def decode(self, latents: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Inverse of `encode`.

        Args:
            latents: normalised, fp32 `[B, z_dim, h, w]`.
            dtype: in which the decoder computes.

        Returns:
            `[B, 3, 8h, 8w]` of that dtype, about -1..1 (not clamped).
        """
        mean, std = self._statistics(latents)
        z = (latents * std + mean).to(dtype)
        return self.decoder(self.post_quant_conv(z.contiguous(memory_format=torch.channels_last)))
