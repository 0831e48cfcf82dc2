"""The ERNIE-Image transformer: 36 single-stream blocks that share one modulation.

Parameter names and arithmetic are those of the published checkpoint (https://huggingface.co/baidu/ERNIE-Image).

Shapes: S samples, N image and M text tokens of a sample, D = hidden_size. Tokens of all samples stand one after
another, the image of each sample before its text: no padding, no mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.attention import packed_attention
from ...ops.embed import timestep_embedding
from ...ops.linear import Linear
from ...ops.norm import RMSNorm, gated_residual, modulated_layer_norm, modulated_rms_norm
from ...ops.packing import Packing
from ...ops.rope import rotary_angles, rotate_half

_MLP_CHUNK = 4096  # tokens whose wide hidden states exist at once, outside autograd


@dataclass(frozen=True)
class TransformerConfig:
    """Numbers of the published model."""

    hidden_size: int = 4096
    num_attention_heads: int = 32
    num_layers: int = 36
    ffn_hidden_size: int = 12288
    in_channels: int = 128
    out_channels: int = 128
    patch_size: int = 1
    text_in_dim: int = 3072
    rope_theta: float = 256.0
    rope_axes_dim: tuple[int, int, int] = (32, 48, 48)
    eps: float = 1e-6
    qk_layernorm: bool = True

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def text_width(self) -> int:
        """Width of a text condition."""
        return self.text_in_dim


@dataclass(frozen=True)
class Layout:
    """Which tokens belong together and where they are: fixed for a run."""

    packing: Packing
    cos: Tensor
    """fp32 `[sum(N + M), head_dim]`, image before text in each sample."""
    sin: Tensor
    """Same shape."""


@dataclass(frozen=True)
class ModulationTable:
    """Everything the transformer derives from timesteps alone."""

    layers: Tensor
    """`[steps, 6 D]`: shift, scale, gate of attention, then of the MLP; the same for every layer."""
    out: Tensor
    """`[steps, 2 D]`: scale, shift of the final norm."""

    def step(self, index: int) -> "ModulationTable":
        """The rows of one step, which every sample shares."""
        rows = slice(index, index + 1)
        return ModulationTable(self.layers[rows], self.out[rows])


class PatchEmbedding(nn.Module):
    """A 1x1 convolution in the checkpoint: a linear layer over tokens here."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[T, in_channels]` to `[T, D]`."""
        return F.linear(tokens, self.proj.weight.flatten(1), self.proj.bias)


class TimestepEmbedding(nn.Module):
    """Two linear layers over the sinusoids of the timestep."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = Linear(width, width)
        self.linear_2 = Linear(width, width)

    def forward(self, timestep: Tensor) -> Tensor:
        """Embed `timestep [S]` in 0..1000 as `[S, D]`."""
        dim = self.linear_1.in_features
        sinusoids = timestep_embedding(timestep, dim, cos_first=False).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


class SelfAttention(nn.Module):
    """Attention over image and text together, one set of projections for both."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.head_dim = config.head_dim
        self.to_q, self.to_k, self.to_v = (Linear(width, width, bias=False) for _ in range(3))
        self.norm_q, self.norm_k = RMSNorm(config.head_dim, config.eps), RMSNorm(config.head_dim, config.eps)
        self.to_out = nn.ModuleList([Linear(width, width, bias=False)])

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """`x [T, D]` to `[T, D]`."""
        q, k, v = (to(x).unflatten(-1, (-1, self.head_dim)) for to in (self.to_q, self.to_k, self.to_v))
        q = rotate_half(self.norm_q(q, inplace=True), layout.cos, layout.sin)
        k = rotate_half(self.norm_k(k, inplace=True), layout.cos, layout.sin)
        return self.to_out[0](packed_attention(q, k, v, layout.packing.lengths).flatten(1))


class MLP(nn.Module):
    """`linear_fc2(up_proj(x) * gelu(gate_proj(x)))` with the exact (erf) GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, hidden, bias=False)
        self.up_proj = Linear(width, hidden, bias=False)
        self.linear_fc2 = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[T, D]` to `[T, D]`; long inputs pass in chunks when nothing has to be kept for a backward."""
        if torch.is_grad_enabled():
            return self.linear_fc2(self.up_proj(x) * F.gelu(self.gate_proj(x)))
        out = torch.empty_like(x)
        for source, target in zip(x.split(_MLP_CHUNK), out.split(_MLP_CHUNK), strict=True):
            hidden = torch.ops.aten.gelu_(self.gate_proj(source))
            target.copy_(self.linear_fc2(hidden.mul_(self.up_proj(source))))
        return out


class TransformerLayer(nn.Module):
    """Modulated attention, then a modulated MLP."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.adaLN_sa_ln = RMSNorm(config.hidden_size, config.eps)
        self.self_attention = SelfAttention(config)
        self.adaLN_mlp_ln = RMSNorm(config.hidden_size, config.eps)
        self.mlp = MLP(config.hidden_size, config.ffn_hidden_size)

    def forward(self, x: Tensor, modulation: Tensor, layout: Layout) -> Tensor:
        """Apply the layer; outside autograd `x` is updated in place.

        Args:
            x: `[sum(N + M), D]`.
            modulation: `[1 or S, 6 D]`.
            layout: see `Layout`.
        """
        lengths = layout.packing.lengths
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        attended = self.self_attention(
            modulated_rms_norm(x, self.adaLN_sa_ln.weight, shift1, scale1, lengths, self.eps), layout
        )
        x = gated_residual(x, attended, gate1, lengths)
        del attended
        hidden = self.mlp(modulated_rms_norm(x, self.adaLN_mlp_ln.weight, shift2, scale2, lengths, self.eps))
        return gated_residual(x, hidden, gate2, lengths)


class OutputNorm(nn.Module):
    """Holds the linear layer of the final modulation under its published name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = Linear(width, 2 * width)

    def forward(self, temb: Tensor) -> Tensor:
        """`[S, D]` to `[S, 2 D]`: scale, then shift (no SiLU before it in this model)."""
        return self.linear(temb)


class ErnieImageTransformer(nn.Module):
    """Predicts the velocity `noise - clean` of image tokens."""

    def __init__(self, config: TransformerConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or TransformerConfig()
        width = config.hidden_size
        self.x_embedder = PatchEmbedding(config.in_channels, width)
        self.text_proj = Linear(config.text_in_dim, width, bias=False)
        self.time_embedding = TimestepEmbedding(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.num_layers))
        self.final_norm = OutputNorm(width)
        self.final_linear = Linear(width, config.out_channels)

    def layout(self, grids: Sequence[tuple[int, int]], txt_lengths: Sequence[int], device: torch.device) -> Layout:
        """Positions of a run.

        Args:
            grids: rows and columns of each sample's image, in tokens.
            txt_lengths: text tokens of each sample.
            device: where the tables are needed.
        """
        packing = Packing(tuple(rows * columns for rows, columns in grids), tuple(txt_lengths))
        positions = torch.cat([_positions(*grid, txt) for grid, txt in zip(grids, txt_lengths, strict=True)])
        angles = rotary_angles(positions, self.config.rope_axes_dim, self.config.rope_theta)
        angles = angles.repeat_interleave(2, dim=-1)
        return Layout(packing, angles.cos().to(device), angles.sin().to(device))

    def project_text(self, txt: Tensor) -> Tensor:
        """Text embeddings `[sum M, text_in_dim]` to the width of the layers; the same for every step of a run."""
        return self.text_proj(txt)

    def modulation(self, timesteps: Tensor) -> ModulationTable:
        """Evaluate every timestep-only layer for `timesteps [steps]` (0..1000)."""
        temb = self.time_embedding(timesteps)
        return ModulationTable(layers=self.adaLN_modulation(temb), out=self.final_norm(temb))

    def forward(self, img: Tensor, txt: Tensor, modulation: ModulationTable, layout: Layout) -> Tensor:
        """Velocity of every image token.

        Args:
            img: noisy tokens `[sum N, in_channels]`.
            txt: projected text `[sum M, D]` from `project_text`.
            modulation: rows of `modulation(timesteps)`, one for all samples or one per sample.
            layout: from `layout`.

        Returns:
            `[sum N, out_channels]`.
        """
        packing = layout.packing
        x = packing.join_img_txt(self.x_embedder(img), txt)
        for layer in self.layers:
            x = layer(x, modulation.layers, layout)
        img, _ = packing.split_img_txt(x)
        scale, shift = modulation.out.chunk(2, dim=-1)
        return self.final_linear(modulated_layer_norm(img, shift, scale, packing.img_lengths, self.config.eps))


def _positions(rows: int, columns: int, txt_length: int) -> Tensor:
    """`[N + M, 3]`: image tokens at `(M, row, column)`, text token i at `(i, 0, 0)`."""
    index = torch.tensor([txt_length])
    grid = torch.stack(torch.meshgrid(index, torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1)
    txt = torch.zeros(txt_length, 3, dtype=torch.long)
    txt[:, 0] = torch.arange(txt_length)
    return torch.cat([grid.reshape(-1, 3), txt])
