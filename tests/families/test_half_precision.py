"""In bf16 the in-place and chunked paths do what fp32 does, to the precision of bf16."""

import pytest
import torch

from diffsynth.ops import norm, rope
from diffsynth.recognise import module_shapes
from diffsynth.registry import FAMILIES


def filled(component, dtype):
    """The tiny component with weights large enough that every term matters."""
    module = component.build(component.parse_config(component.tiny)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, shape in module_shapes(module).items():
        tensor = module.state_dict()[name]
        if tensor.is_floating_point():
            values = torch.randn(shape, generator=generator) * (0.1 if len(shape) == 1 else shape[-1] ** -0.5)
            gain = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            tensor.copy_((values + gain).to(torch.bfloat16))  # the same numbers in both dtypes
    return module.to(dtype)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.spec.name)
def test_bf16_follows_fp32(family, chunk, monkeypatch):
    if chunk is not None:
        monkeypatch.setattr(rope, "_CHUNK", chunk)
        monkeypatch.setattr(norm, "_CHUNK_ELEMENTS", 16 * chunk)
    component = family.spec.component("dit")
    generator = torch.Generator().manual_seed(1)
    height, width = 64, 96
    sigmas = family.spec.scheduler.sigmas(3, 24)
    latents = torch.randn(2, *family.latent_shape(height, width), generator=generator)
    text_width = component.tiny.get("joint_attention_dim") or component.tiny["text_in_dim"]
    branches = [[torch.randn(n, text_width, generator=generator) for n in lengths] for lengths in ((7, 4), (1, 2))]
    velocities = {}
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad():
            sampler = family.prepare(filled(component, dtype), branches, sigmas, height, width)
            velocities[dtype] = sampler.velocity(family.pack(latents), 1).float()
    exact, rounded = velocities[torch.float32], velocities[torch.bfloat16]
    assert torch.isfinite(rounded).all()
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).norm() / exact.norm() < 0.03
