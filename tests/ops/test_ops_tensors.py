"""Linear layers, rotary and timestep embeddings, patches and tiles against direct formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffsynth.ops.embed import timestep_embedding
from diffsynth.ops.linear import Linear, linear_gelu_tanh
from diffsynth.ops.patchify import from_tokens, patchify, to_tokens, unpatchify
from diffsynth.ops.rope import rotary_angles, rotate_half, rotate_pairs
from diffsynth.ops.tiling import tile_starts, tiled_apply

modes = pytest.mark.parametrize("gradients", [False, True], ids=["inference", "autograd"])


# Linear


@modes
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (33, 64), (2, 3, 64), (0, 64)])
def test_linear_is_a_linear_map(gradients: bool, bias: bool, shape: tuple[int, ...]) -> None:
    layer, x = Linear(64, 48, bias=bias), torch.randn(shape)
    expected = F.linear(x, layer.weight, layer.bias).detach()
    with torch.set_grad_enabled(gradients):
        found = layer(x).detach()
    assert found.shape == expected.shape
    assert (found - expected).abs().max().item() <= 1e-5 * expected.abs().max().item() if expected.numel() else True


@modes
def test_gelu_after_a_linear_layer_is_the_tanh_kind(gradients: bool) -> None:
    layer, x = Linear(64, 48), torch.randn(33, 64) * 5
    expected = F.gelu(F.linear(x.double(), layer.weight.double(), layer.bias.double()), approximate="tanh").detach()
    with torch.set_grad_enabled(gradients):
        found = linear_gelu_tanh(layer, x).detach()
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    exact = F.gelu(layer(x)).detach()
    assert (found - exact).abs().max() > 1e-4  # and the two kinds can be told apart


def test_gradients_of_linear_layers() -> None:
    layer, x = Linear(16, 8), torch.randn(5, 16, requires_grad=True)
    reference, y = torch.nn.Linear(16, 8), x.detach().clone().requires_grad_()
    reference.load_state_dict(layer.state_dict())
    linear_gelu_tanh(layer, x).square().sum().backward()
    F.gelu(reference(y), approximate="tanh").square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(layer.weight.grad, reference.weight.grad)
    torch.testing.assert_close(layer.bias.grad, reference.bias.grad)


def test_a_wrapped_linear_layer_is_called_as_it_is() -> None:
    class Adapted(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    with torch.no_grad():
        torch.testing.assert_close(
            linear_gelu_tanh(Adapted(), torch.zeros(2)), F.gelu(torch.ones(2), approximate="tanh")
        )


def test_half_precision_linear_layers_stay_in_their_dtype() -> None:
    layer = Linear(16, 8).bfloat16()
    with torch.no_grad():
        assert layer(torch.randn(3, 16).bfloat16()).dtype == torch.bfloat16


# Rotary embedding


def direct_angles(position: tuple[float, ...], axes: tuple[int, ...], theta: float) -> list[float]:
    return [where * theta ** (-2 * j / dim) for where, dim in zip(position, axes, strict=True) for j in range(dim // 2)]


def test_rotary_angles_are_their_formula() -> None:
    positions = [(0, 0, 0), (1, 2, 3), (-4, 7, 30)]
    found = rotary_angles(torch.tensor(positions), (4, 6, 6), theta=256.0)
    expected = torch.tensor([direct_angles(position, (4, 6, 6), 256.0) for position in positions])
    torch.testing.assert_close(found, expected)


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotating_pairs_turns_each_pair_by_its_angle(
    gradients: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffsynth.ops.rope._CHUNK", 3)
    x, angles = torch.randn(7, 2, 16).to(dtype), torch.randn(7, 8)
    even, odd = x.double()[..., 0::2], x.double()[..., 1::2]
    cos, sin = angles.double().cos().unsqueeze(1), angles.double().sin().unsqueeze(1)
    expected = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    with torch.set_grad_enabled(gradients):
        found = rotate_pairs(x.clone(), torch.polar(torch.ones_like(angles), angles))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)


@modes
def test_rotating_halves_is_its_formula(gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffsynth.ops.rope._CHUNK", 3)
    x, angles = torch.randn(7, 2, 16), torch.randn(7, 16)
    cos, sin = angles.cos(), angles.sin()
    expected = torch.empty_like(x)
    for d in range(8):
        expected[..., d] = x[..., d] * cos[:, None, d] - x[..., d + 8] * sin[:, None, d]
        expected[..., d + 8] = x[..., d + 8] * cos[:, None, d + 8] + x[..., d] * sin[:, None, d + 8]
    with torch.set_grad_enabled(gradients):
        found = rotate_half(x.clone(), cos, sin)
    torch.testing.assert_close(found, expected)


def test_rotation_makes_attention_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 16).unbind()

    def score(at_q: int, at_k: int) -> float:
        def turned(x: Tensor, at: int) -> Tensor:
            angles = rotary_angles(torch.tensor([[at, 2 * at, -at]]), (4, 6, 6), theta=100.0)
            return rotate_pairs(x.clone(), torch.polar(torch.ones_like(angles), angles))

        return (turned(q, at_q) * turned(k, at_k)).sum().item()

    assert score(3, 5) == pytest.approx(score(13, 15), abs=1e-4)
    assert score(3, 5) != pytest.approx(score(3, 6), abs=1e-2)


# Timestep embedding


@pytest.mark.parametrize("cos_first", [True, False])
@pytest.mark.parametrize("dim", [256, 4096, 48])
def test_timestep_embedding_is_its_formula(dim: int, cos_first: bool) -> None:
    timesteps = torch.tensor([0.0, 20.0, 333.3, 1000.0])
    half = dim // 2
    angles = timesteps.double()[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    halves = (angles.cos(), angles.sin()) if cos_first else (angles.sin(), angles.cos())
    found = timestep_embedding(timesteps, dim, cos_first=cos_first)
    assert found.dtype == torch.float32
    error = (found - torch.cat(halves, 1)).abs().amax(1)
    assert (error <= 1e-7 + 2e-7 * timesteps).all()  # what fp32 angles can hold


@pytest.mark.parametrize("dim", [256, 4096])
def test_timestep_embedding_of_published_width_is_bit_equal_to_diffusers(dim: int) -> None:
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    timesteps = torch.rand(50) * 1000
    for cos_first in (True, False):
        theirs = embeddings.get_timestep_embedding(timesteps, dim, flip_sin_to_cos=cos_first, downscale_freq_shift=0)
        assert torch.equal(timestep_embedding(timesteps, dim, cos_first=cos_first), theirs)


# Patches


@settings(deadline=None)
@given(b=st.integers(1, 3), c=st.integers(1, 4), h=st.integers(1, 5), w=st.integers(1, 5))
def test_patches_and_tokens_are_inverse_pairs(b: int, c: int, h: int, w: int) -> None:
    latents = torch.arange(b * c * h * w * 4.0).view(b, c, 2 * h, 2 * w)
    patches = patchify(latents)
    assert patches.shape == (b, 4 * c, h, w)
    assert torch.equal(unpatchify(patches), latents)
    assert torch.equal(patches, F.pixel_unshuffle(latents, 2))  # channel c * 4 + row * 2 + column
    tokens = to_tokens(patches)
    assert tokens.shape == (b, h * w, 4 * c)
    assert torch.equal(from_tokens(tokens, h, w), patches)
    assert torch.equal(tokens[0, (h - 1) * w], patches[0, :, h - 1, 0])  # row by row


# Tiles


@settings(deadline=None)
@given(size=st.integers(1, 200), tile=st.integers(1, 100), data=st.data())
def test_tiles_cover_everything_and_stay_inside(size: int, tile: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, tile))
    starts = tile_starts(size, tile, stride)
    covered = {position for start in starts for position in range(start, min(start + tile, size))}
    assert covered == set(range(size))
    assert starts == sorted(set(starts))
    assert starts[0] == 0
    assert len(starts) == 1 or starts[-1] + tile == size


@settings(deadline=None, max_examples=60)
@given(
    h=st.integers(1, 20), w=st.integers(1, 20), tile=st.integers(1, 12), factor=st.sampled_from([1, 2]), data=st.data()
)
def test_a_pointwise_network_in_tiles_is_the_network(
    h: int, w: int, tile: int, factor: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, tile))
    x = torch.randn(1, 2, h, w)

    def network(part: Tensor) -> Tensor:
        return 3 * part.repeat_interleave(factor, -1).repeat_interleave(factor, -2) + 1

    torch.testing.assert_close(tiled_apply(network, x, tile, stride, factor), network(x))


def test_a_shrinking_network_gets_aligned_tiles() -> None:
    x = torch.randn(1, 2, 64, 96)
    shapes: set[tuple[int, int]] = set()

    def network(part: Tensor) -> Tensor:
        shapes.add(tuple(part.shape[-2:]))
        return F.avg_pool2d(part, 16)

    found = tiled_apply(network, x, 40, 20, 1 / 16, align=16)
    torch.testing.assert_close(found, F.avg_pool2d(x, 16))
    assert shapes == {(32, 32)}


def test_a_tile_that_covers_everything_is_the_network_itself() -> None:
    x, calls = torch.randn(1, 2, 8, 8), []
    found = tiled_apply(lambda part: calls.append(part.shape) or part.sin(), x, 8, 1, 1)
    assert torch.equal(found, x.sin())
    assert len(calls) == 1


def test_seams_are_blended_and_not_cut() -> None:
    """Two tiles that disagree meet in a ramp: no step between neighbours is larger than the ramp makes it."""
    counter = iter(range(10))
    found = tiled_apply(lambda part: torch.full_like(part, next(counter)), torch.zeros(1, 1, 4, 24), 16, 8, 1)[0, 0, 0]
    assert found[0] == 0
    assert found[-1] == 1
    steps = found.diff()
    assert (steps >= 0).all()
    assert steps.max() < 0.3
    assert math.isclose(found.mean().item(), 0.5, abs_tol=1e-6)
