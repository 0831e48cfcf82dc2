"""The Qwen-Image transformer: 60 double-stream blocks over packed text and image tokens.

Architecture: MMDiT (https://arxiv.org/abs/2403.03206) as described in the Qwen-Image report
(https://arxiv.org/abs/2508.02324). Parameter names are those of the published checkpoint.

Shapes: S samples, N image and M text tokens of a sample, D = heads * head_dim. Tokens of all samples stand one after
another (`img [sum N, .]`, `txt [sum M, .]`): prompts of different lengths and images of different shapes share a pass
without padding or mask. A modulation has one row per sample, or one row where all share a timestep.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.attention import packed_attention
from ...ops.embed import timestep_embedding
from ...ops.linear import Linear, linear_gelu_tanh
from ...ops.norm import RMSNorm, gated_residual, modulated_layer_norm
from ...ops.packing import Packing
from ...ops.rope import rotary_angles, rotate_pairs

_MLP_CHUNK = 4096  # tokens whose 4x wide hidden state exists at once, outside autograd


@dataclass(frozen=True)
class TransformerConfig:
    """Numbers of the published model."""

    patch_size: int = 2
    in_channels: int = 64
    out_channels: int = 16
    num_layers: int = 60
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 3584
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)

    @property
    def width(self) -> int:
        """D, the width of both streams."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def text_width(self) -> int:
        """Width of a text condition."""
        return self.joint_attention_dim


@dataclass(frozen=True)
class Layout:
    """Which tokens belong together and where they are: fixed for a run."""

    packing: Packing
    rotary: Tensor
    """complex64 `[sum(M + N), head_dim / 2]`, text before image in each sample."""


@dataclass(frozen=True)
class ModulationTable:
    """Everything the transformer derives from timesteps alone, evaluated for a whole schedule at once."""

    img: Tensor
    """`[layers, steps, 6 D]`: shift, scale, gate of attention, then of the MLP."""
    txt: Tensor
    """`[layers, steps, 6 D]`."""
    out: Tensor
    """`[steps, 2 D]`: scale, shift of the final norm."""

    def step(self, index: int) -> "ModulationTable":
        """The rows of one step, which every sample shares."""
        rows = slice(index, index + 1)
        return ModulationTable(self.img[:, rows], self.txt[:, rows], self.out[rows])


class TimestepEmbedder(nn.Module):
    """Two linear layers over the sinusoids of the timestep."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = Linear(256, width)
        self.linear_2 = Linear(width, width)

    def forward(self, timestep: Tensor) -> Tensor:
        """Embed `timestep [S]` in 0..1000 as `[S, D]`."""
        sinusoids = timestep_embedding(timestep, 256, cos_first=True).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


class TimestepProjection(nn.Module):
    """Holds the embedder under its published name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedder(width)

    def forward(self, timestep: Tensor) -> Tensor:
        """Embed `timestep [S]` as `[S, D]`."""
        return self.timestep_embedder(timestep)


class GELUProjection(nn.Module):
    """Linear to four times the width, then tanh GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = Linear(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """`[T, D]` to `[T, 4 D]`."""
        return linear_gelu_tanh(self.proj, x)


class FeedForward(nn.Module):
    """The MLP of one stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GELUProjection(width), nn.Identity(), Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """`[T, D]` to `[T, D]`; long inputs pass in chunks when nothing has to be kept for a backward."""
        if torch.is_grad_enabled() or len(x) <= _MLP_CHUNK:
            return self.net(x)
        out = torch.empty_like(x)
        for source, target in zip(x.split(_MLP_CHUNK), out.split(_MLP_CHUNK), strict=True):
            target.copy_(self.net(source))
        return out


class JointAttention(nn.Module):
    """Attention over text and image together, with projections of its own for each stream."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, head_dim = config.width, config.attention_head_dim
        self.head_dim = head_dim
        self.to_q, self.to_k, self.to_v = (Linear(width, width) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = RMSNorm(head_dim), RMSNorm(head_dim)
        self.norm_added_q, self.norm_added_k = RMSNorm(head_dim), RMSNorm(head_dim)
        self.to_out = nn.ModuleList([Linear(width, width)])
        self.to_add_out = Linear(width, width)

    def heads(self, x: Tensor) -> Tensor:
        """`[T, D]` to `[T, heads, head_dim]`."""
        return x.unflatten(-1, (-1, self.head_dim))

    def forward(self, img: Tensor, txt: Tensor, layout: Layout, *, last: bool) -> tuple[Tensor, Tensor | None]:
        """Attend jointly; the text output is not computed for the `last` block, where nothing reads it.

        Args:
            img: `[sum N, D]`.
            txt: `[sum M, D]`.
            layout: see `Layout`.
            last: whether this is the final block.
        """
        join = layout.packing.join_txt_img
        # One projection at a time: its two parts are freed before the next is made.
        v = join(self.heads(self.add_v_proj(txt)), self.heads(self.to_v(img)))
        k = join(
            self.norm_added_k(self.heads(self.add_k_proj(txt)), inplace=True),
            self.norm_k(self.heads(self.to_k(img)), inplace=True),
        )
        k = rotate_pairs(k, layout.rotary)
        q = join(
            self.norm_added_q(self.heads(self.add_q_proj(txt)), inplace=True),
            self.norm_q(self.heads(self.to_q(img)), inplace=True),
        )
        q = rotate_pairs(q, layout.rotary)
        attended = packed_attention(q, k, v, layout.packing.lengths)
        del q, k, v
        txt_out, img_out = layout.packing.split_txt_img(attended)
        return self.to_out[0](img_out.flatten(1)), None if last else self.to_add_out(txt_out.flatten(1))


class TransformerBlock(nn.Module):
    """Modulated joint attention, then a modulated MLP for each stream."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.width
        self.img_mod = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))
        self.txt_mod = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))
        self.attn = JointAttention(config)
        self.img_mlp = FeedForward(width)
        self.txt_mlp = FeedForward(width)

    def forward(
        self, img: Tensor, txt: Tensor, img_mod: Tensor, txt_mod: Tensor, layout: Layout, *, last: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Apply the block; outside autograd `img` and `txt` are updated in place.

        Args:
            img: `[sum N, D]`.
            txt: `[sum M, D]`.
            img_mod, txt_mod: `[1 or S, 6 D]`, outputs of the modules of the same names.
            layout: see `Layout`.
            last: skip what only later blocks would read of the text stream.
        """
        img_lengths, txt_lengths = layout.packing.img_lengths, layout.packing.txt_lengths
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = img_mod.chunk(6, dim=-1)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = txt_mod.chunk(6, dim=-1)

        img_attn, txt_attn = self.attn(
            modulated_layer_norm(img, img_shift1, img_scale1, img_lengths),
            modulated_layer_norm(txt, txt_shift1, txt_scale1, txt_lengths),
            layout,
            last=last,
        )
        img = gated_residual(img, img_attn, img_gate1, img_lengths)
        del img_attn
        img_mlp = self.img_mlp(modulated_layer_norm(img, img_shift2, img_scale2, img_lengths))
        img = gated_residual(img, img_mlp, img_gate2, img_lengths)
        if txt_attn is not None:
            txt = gated_residual(txt, txt_attn, txt_gate1, txt_lengths)
            txt_mlp = self.txt_mlp(modulated_layer_norm(txt, txt_shift2, txt_scale2, txt_lengths))
            txt = gated_residual(txt, txt_mlp, txt_gate2, txt_lengths)
        if img.dtype == torch.float16:  # the activations of this model leave fp16's range
            img, txt = img.clamp(-65504, 65504), txt.clamp(-65504, 65504)
        return img, txt


class OutputNorm(nn.Module):
    """Holds the linear layer of the final modulation under its published name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = Linear(width, 2 * width)

    def forward(self, temb: Tensor) -> Tensor:
        """`[S, D]` to `[S, 2 D]`: scale, then shift."""
        return self.linear(F.silu(temb))


class QwenImageTransformer(nn.Module):
    """Predicts the velocity `noise - clean` of packed image tokens."""

    def __init__(self, config: TransformerConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or TransformerConfig()
        width = config.width
        self.time_text_embed = TimestepProjection(width)
        self.txt_norm = RMSNorm(config.joint_attention_dim)
        self.img_in = Linear(config.in_channels, width)
        self.txt_in = Linear(config.joint_attention_dim, width)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))
        self.norm_out = OutputNorm(width)
        self.proj_out = Linear(width, config.patch_size**2 * config.out_channels)

    def layout(self, grids: Sequence[tuple[int, int]], txt_lengths: Sequence[int], device: torch.device) -> Layout:
        """Positions of a run.

        Args:
            grids: rows and columns of each sample's image, in tokens.
            txt_lengths: text tokens of each sample.
            device: where the rotary table is needed.
        """
        packing = Packing(tuple(rows * columns for rows, columns in grids), tuple(txt_lengths))
        positions = torch.cat([_positions(*grid, txt) for grid, txt in zip(grids, txt_lengths, strict=True)])
        angles = rotary_angles(positions, self.config.axes_dims_rope, theta=10000.0)
        return Layout(packing, torch.polar(torch.ones_like(angles), angles).to(device))

    def project_text(self, txt: Tensor) -> Tensor:
        """Text embeddings `[sum M, joint_attention_dim]` to the width of the blocks, once for a whole run."""
        return self.txt_in(self.txt_norm(txt))

    def modulation(self, timesteps: Tensor) -> ModulationTable:
        """Evaluate every timestep-only layer for `timesteps [steps]` (0..1000), each weight read once."""
        temb = self.time_text_embed(timesteps)
        blocks = cast("list[TransformerBlock]", list(self.transformer_blocks))
        return ModulationTable(
            img=torch.stack([block.img_mod(temb) for block in blocks]),
            txt=torch.stack([block.txt_mod(temb) for block in blocks]),
            out=self.norm_out(temb),
        )

    def forward(self, img: Tensor, txt: Tensor, modulation: ModulationTable, layout: Layout) -> Tensor:
        """Velocity of every image token.

        Args:
            img: noisy tokens `[sum N, in_channels]`.
            txt: projected text `[sum M, D]` from `project_text`.
            modulation: rows of `modulation(timesteps)`, one for all samples or one per sample.
            layout: from `layout`.

        Returns:
            `[sum N, in_channels]`.
        """
        img = self.img_in(img)
        if not torch.is_grad_enabled():
            txt = txt.clone()  # the blocks update their streams in place, and `txt` serves every step
        last = len(self.transformer_blocks) - 1
        for index, block in enumerate(self.transformer_blocks):
            img, txt = block(img, txt, modulation.img[index], modulation.txt[index], layout, last=index == last)
        scale, shift = modulation.out.chunk(2, dim=-1)
        return self.proj_out(modulated_layer_norm(img, shift, scale, layout.packing.img_lengths))


def _positions(rows: int, columns: int, txt_length: int) -> Tensor:
    """`[M + N, 3]` frame, row and column: the image is centred on the origin, the text follows on the diagonal."""
    row = torch.arange(rows) - (rows - rows // 2)
    column = torch.arange(columns) - (columns - columns // 2)
    grid = torch.stack(torch.meshgrid(torch.zeros(1, dtype=torch.long), row, column, indexing="ij"), dim=-1)
    txt = torch.arange(txt_length) + max(rows // 2, columns // 2)
    return torch.cat([txt.unsqueeze(1).expand(-1, 3), grid.reshape(-1, 3)])
