"""Activation peaks at full published size, on fake tensors: no gigabyte is allocated."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffsynth.families.ernie_image import transformer as ernie
from diffsynth.families.ernie_image.vae import Flux2VAE
from diffsynth.families.qwen_image import transformer as qwen
from diffsynth.families.qwen_image.vae import QwenImageVAE
from diffsynth.memory.measure import PeakMemory, activation_peak, fake_weights
from diffsynth.ops.packing import Packing

MIB = 2**20
BF16 = torch.bfloat16
GUIDED = Packing((4096, 4096), (100, 100))
"""Both guidance branches of one 1024x1024 image."""


def on_meta(build):
    with torch.device("meta"):
        return build()


def test_a_chain_of_tensors_counts_what_is_alive_and_no_more():
    with FakeTensorMode(), PeakMemory() as counter:
        x = torch.empty(MIB, dtype=torch.uint8)
        for _ in range(10):
            x = x + 1
    assert counter.peak == 2 * MIB


def test_views_are_counted_once_and_ignored_tensors_never():
    with FakeTensorMode():
        weight = torch.empty(MIB, dtype=torch.uint8)
        with PeakMemory([weight]) as counter:
            x = torch.empty(MIB, dtype=torch.uint8)
            views = [x[1:], x.view(2, -1), weight.view(4, -1)]
    assert len(views) == 3
    assert counter.peak == MIB


@pytest.mark.parametrize(
    ("build", "latents", "limit"), [(QwenImageVAE, (1, 16, 128, 128), 720), (Flux2VAE, (1, 128, 64, 64), 1300)]
)
def test_decoding_1024_squared_stays_within(build, latents, limit):
    with fake_weights(on_meta(build), BF16) as vae:
        peak = activation_peak(vae, lambda z: vae.decode(z, BF16), torch.empty(latents))
    print(f"{build.__name__} decode 1024x1024: {peak / MIB:.0f} MiB")
    assert peak <= limit * MIB


def test_one_guided_qwen_block_stays_within_300_mib():
    config = qwen.TransformerConfig()
    with fake_weights(on_meta(lambda: qwen.TransformerBlock(config)), BF16) as block:
        layout = qwen.Layout(GUIDED, torch.empty(sum(GUIDED.lengths), 64, dtype=torch.complex64))
        img, txt = (torch.empty(n, config.width, dtype=BF16) for n in (8192, 200))
        mod = torch.empty(1, 6 * config.width, dtype=BF16)
        peak = activation_peak(
            block, lambda img, txt, mod, _: block(img, txt, mod, mod, layout), img, txt, mod, layout.rotary
        )
    print(f"Qwen-Image block, guided, 1024x1024: {peak / MIB:.0f} MiB")
    assert peak <= 300 * MIB


def test_one_guided_ernie_layer_stays_within_450_mib():
    config = ernie.TransformerConfig()
    with fake_weights(on_meta(lambda: ernie.TransformerLayer(config)), BF16) as layer:
        tokens = sum(GUIDED.lengths)
        cos, sin = (torch.empty(tokens, config.head_dim) for _ in range(2))
        layout = ernie.Layout(GUIDED, cos, sin)
        x = torch.empty(tokens, config.hidden_size, dtype=BF16)
        mod = torch.empty(1, 6 * config.hidden_size, dtype=BF16)
        peak = activation_peak(layer, lambda x, mod, *_: layer(x, mod, layout), x, mod, cos, sin)
    print(f"ERNIE-Image layer, guided, 1024x1024: {peak / MIB:.0f} MiB")
    assert peak <= 450 * MIB
