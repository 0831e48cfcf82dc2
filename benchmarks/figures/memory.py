"""Activation peaks at full published size for one 1024x1024 image in bf16, on fake tensors: exact and repeatable.

Counted are all tensors alive at once but the weights, for both sides by the same counter. What kernels take for
themselves (workspaces of convolutions and matrix products) is not seen.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Comparison, Figure, Samples
from benchmarks.figures import Options
from benchmarks.peers import ERNIE_IMAGE, QWEN_IMAGE, Peer
from diffsynth.families.ernie_image import transformer as ernie
from diffsynth.families.qwen_image import transformer as qwen
from diffsynth.memory.measure import activation_peak, fake_weights
from diffsynth.ops.packing import Packing

MIB = 2**20
BF16 = torch.bfloat16
TEXT_TOKENS = 100
TARGETS = {"Qwen-Image decode": 720.0, "Qwen-Image guided block": 300.0, "ERNIE-Image guided layer": 450.0}
"""MiB."""


def _peak(build: Callable[[], nn.Module], run: Callable[..., Any], inputs: Callable[[], tuple[Tensor, ...]]) -> float:
    """MiB at the peak of `run(module, *inputs)`."""
    with torch.device("meta"):
        module = build()
    with fake_weights(module, BF16):
        return activation_peak(module, lambda *tensors: run(module, *tensors), *inputs()) / MIB


def _decode(peer: Peer, side: int) -> tuple[float, float]:
    vae = peer.family.spec.component("vae")
    config = vae.parse_config({})
    shape = (1, *peer.family.latent_shape(side, side))
    ours = _peak(lambda: vae.build(config), lambda module, z: module.decode(z, BF16), lambda: (torch.empty(shape),))
    theirs = _peak(
        lambda: peer.build("vae", config),
        lambda module, z: module.decode(z, return_dict=False)[0],
        lambda: (torch.empty(_unfolded(peer, side), dtype=BF16),),
    )
    return ours, theirs


def _unfolded(peer: Peer, side: int) -> tuple[int, ...]:
    """What the peer's decoder itself takes; its pipelines prepare it with a few tensors of that small size."""
    return (1, 16, 1, side // 8, side // 8) if peer is QWEN_IMAGE else (1, 32, side // 8, side // 8)


def _qwen_block(img: int) -> tuple[float, float]:
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

    config = qwen.TransformerConfig()
    width, pairs = config.width, config.attention_head_dim // 2
    packing = Packing((img, img), (TEXT_TOKENS, TEXT_TOKENS))

    def our_block(block: Any, x: Tensor, txt: Tensor, modulation: Tensor, rotary: Tensor) -> Any:
        return block(x, txt, modulation, modulation, qwen.Layout(packing, rotary))

    def their_block(block: Any, x: Tensor, txt: Tensor, temb: Tensor, *rotary: Tensor) -> Any:
        return block(x, txt, encoder_hidden_states_mask=None, temb=temb, image_rotary_emb=rotary)

    ours = _peak(
        lambda: qwen.TransformerBlock(config),
        our_block,
        lambda: (
            torch.empty(2 * img, width, dtype=BF16),
            torch.empty(2 * TEXT_TOKENS, width, dtype=BF16),
            torch.empty(1, 6 * width, dtype=BF16),
            torch.empty(sum(packing.lengths), pairs, dtype=torch.complex64),
        ),
    )
    theirs = _peak(
        lambda: QwenImageTransformerBlock(width, config.num_attention_heads, config.attention_head_dim),
        their_block,
        lambda: (
            torch.empty(2, img, width, dtype=BF16),
            torch.empty(2, TEXT_TOKENS, width, dtype=BF16),
            torch.empty(2, width, dtype=BF16),
            torch.empty(img, pairs, dtype=torch.complex64),
            torch.empty(TEXT_TOKENS, pairs, dtype=torch.complex64),
        ),
    )
    return ours, theirs


def _ernie_layer(img: int) -> tuple[float, float]:
    from diffusers.models.transformers.transformer_ernie_image import ErnieImageSharedAdaLNBlock

    config = ernie.TransformerConfig()
    width, length = config.hidden_size, img + TEXT_TOKENS
    packing = Packing((img, img), (TEXT_TOKENS, TEXT_TOKENS))

    def our_layer(layer: Any, x: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return layer(x, modulation, ernie.Layout(packing, cos, sin))

    def their_layer(layer: Any, x: Tensor, rotary: Tensor, mask: Tensor, *modulation: Tensor) -> Any:
        return layer(x, rotary, modulation, mask)

    ours = _peak(
        lambda: ernie.TransformerLayer(config),
        our_layer,
        lambda: (
            torch.empty(2 * length, width, dtype=BF16),
            torch.empty(1, 6 * width, dtype=BF16),
            torch.empty(2 * length, config.head_dim, dtype=BF16),
            torch.empty(2 * length, config.head_dim, dtype=BF16),
        ),
    )
    theirs = _peak(
        lambda: ErnieImageSharedAdaLNBlock(width, config.num_attention_heads, config.ffn_hidden_size, config.eps),
        their_layer,
        lambda: (
            torch.empty(length, 2, width, dtype=BF16),
            torch.empty(2, length, 1, config.head_dim),
            torch.empty(2, 1, 1, length, dtype=torch.bool),
            *(torch.empty(length, 2, width, dtype=BF16) for _ in range(6)),  # its model expands them once per forward
        ),
    )
    return ours, theirs


def measure(options: Options) -> list[Figure]:
    """Decoders, and one block with both guidance branches."""
    side = 256 if options.tiny else 1024
    img = (side // 16) ** 2
    peaks = {
        "Qwen-Image decode": _decode(QWEN_IMAGE, side),
        "ERNIE-Image decode": _decode(ERNIE_IMAGE, side),
        "Qwen-Image guided block": _qwen_block(img),
        "ERNIE-Image guided layer": _ernie_layer(img),
    }
    comparisons = [
        Comparison(case, Samples((ours,)), Samples((theirs,)), "MiB", at_most=TARGETS.get(case))
        for case, (ours, theirs) in peaks.items()
    ]
    title = f"activation peaks at full published size, {side}x{side}, bf16, texts of {TEXT_TOKENS} tokens"
    return [Figure("memory", title, comparisons)]
