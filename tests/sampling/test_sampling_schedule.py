"""Sigmas, guidance and steps against published numbers, diffusers and their formulas."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsynth.registry import FAMILIES, family_named
from diffsynth.sampling.guidance import classifier_free
from diffsynth.sampling.schedule import FlowMatchScheduler, interpolate_mu
from diffsynth.sampling.solvers import euler_step, mix

QWEN = family_named("qwen-image").spec.scheduler
ERNIE = family_named("ernie-image").spec.scheduler
SCHEDULERS = {
    **{family.spec.name: family.spec.scheduler for family in FAMILIES},
    "Lightning": FlowMatchScheduler(shift=3.0),
    "Turbo": FlowMatchScheduler(shift=4.0),
    "unshifted": FlowMatchScheduler(),
}
every_scheduler = pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)


def tokens(height: int, width: int) -> int:
    return (height // 16) * (width // 16)


@pytest.mark.parametrize(
    ("height", "width", "mu"), [(1328, 1328, 0.834325), (1024, 1024, 0.693548), (928, 1664, 0.791129)]
)
def test_the_shift_of_qwen_image_grows_with_the_image(height: int, width: int, mu: float) -> None:
    assert QWEN.mu_line is not None
    assert interpolate_mu(tokens(height, width), *QWEN.mu_line) == pytest.approx(mu, abs=1e-6)


def test_qwen_image_in_30_steps_at_1328_pixels() -> None:
    sigmas = QWEN.sigmas(30, tokens(1328, 1328)).tolist()
    assert len(sigmas) == 31
    assert sigmas[:3] == pytest.approx([1.0, 0.9844, 0.96818], abs=1e-5)
    assert sigmas[-3:] == pytest.approx([0.09161, 0.02, 0.0], abs=1e-5)


KNOWN: list[tuple[str, FlowMatchScheduler, list[float]]] = [
    ("Lightning in 4", FlowMatchScheduler(shift=3.0), [1, 0.9, 0.75, 0.5, 0]),
    (
        "Lightning in 8",
        FlowMatchScheduler(shift=3.0),
        [1, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3, 0],
    ),
    (
        "Turbo in 8",
        FlowMatchScheduler(shift=4.0),
        [1, 0.965517, 0.923077, 0.869565, 0.8, 0.705882, 0.571429, 0.363636, 0],
    ),
    ("ERNIE-Image in 4", ERNIE, [1, 0.9, 0.75, 0.5, 0]),
]


@pytest.mark.parametrize(("scheduler", "expected"), [pytest.param(s, e, id=name) for name, s, e in KNOWN])
def test_known_schedules(scheduler: FlowMatchScheduler, expected: list[float]) -> None:
    for image_tokens in (16, 6889):  # whatever the size
        assert scheduler.sigmas(len(expected) - 1, image_tokens).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("steps", [2, 4, 30, 50, 200])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (928, 1664), (1328, 1328)])
def test_qwen_image_schedules_are_those_of_diffusers(steps: int, height: int, width: int) -> None:
    module: Any = pytest.importorskip("diffusers")
    theirs = module.FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256, base_shift=0.5, max_image_seq_len=8192, max_shift=0.9, num_train_timesteps=1000,
        shift=1.0, shift_terminal=0.02, time_shift_type="exponential", use_dynamic_shifting=True,
    )  # fmt: skip
    mu = interpolate_mu(tokens(height, width), (256, 0.5), (8192, 0.9))
    theirs.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=mu)
    ours = QWEN.sigmas(steps, tokens(height, width))
    torch.testing.assert_close(ours, theirs.sigmas.float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(ours[:-1] * 1000, theirs.timesteps.float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("steps", [1, 4, 8, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 4.0])
def test_shifted_schedules_are_those_of_diffusers(steps: int, shift: float) -> None:
    module: Any = pytest.importorskip("diffusers")
    theirs = module.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    theirs.set_timesteps(sigmas=torch.linspace(1, 0, steps + 1)[:-1].tolist())
    torch.testing.assert_close(FlowMatchScheduler(shift).sigmas(steps, 4096), theirs.sigmas, atol=1e-6, rtol=0)


@every_scheduler
@settings(deadline=None)
@given(steps=st.integers(1, 200), image_tokens=st.integers(1, 16384), strength=st.floats(0.01, 1))
def test_noise_only_falls_and_ends_at_zero(
    scheduler: FlowMatchScheduler, steps: int, image_tokens: int, strength: float
) -> None:
    sigmas = scheduler.sigmas(steps, image_tokens, strength)
    assert sigmas.dtype == torch.float32
    assert sigmas.shape == (steps + 1,)
    assert sigmas.isfinite().all()
    assert sigmas[0] <= 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


@every_scheduler
@settings(deadline=None)
@given(steps=st.integers(1, 200), image_tokens=st.integers(1, 16384))
def test_a_full_run_starts_from_pure_noise(scheduler: FlowMatchScheduler, steps: int, image_tokens: int) -> None:
    assert scheduler.sigmas(steps, image_tokens)[0] == 1


@every_scheduler
def test_at_strength_0_there_is_nothing_to_do(scheduler: FlowMatchScheduler) -> None:
    assert scheduler.sigmas(10, 4096, 0.0).tolist() == [0.0]


@every_scheduler
@settings(deadline=None)
@given(strengths=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), steps=st.integers(2, 50))
def test_more_strength_starts_noisier(
    scheduler: FlowMatchScheduler, strengths: tuple[float, float], steps: int
) -> None:
    less, more = sorted(strengths)
    # A stretched schedule depends on its end as well as on its start: it is compared between clearly different ones.
    if more - less > 0.05:
        assert scheduler.sigmas(steps, 4096, less)[0] < scheduler.sigmas(steps, 4096, more)[0]


@pytest.mark.parametrize("normalize", [False, True])
def test_guidance_of_scale_1_is_the_positive_prediction(normalize: bool) -> None:
    positive, negative = torch.randn(2, 3, 5, 8).unbind()
    torch.testing.assert_close(classifier_free(positive, negative, 1.0, normalize=normalize), positive)


def test_guidance_is_its_formula() -> None:
    positive, negative = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])
    assert classifier_free(positive, negative, 2.0).tolist() == [[5.0, 8.0]]
    normal = classifier_free(positive, negative, 2.0, normalize=True)
    assert normal.norm().item() == pytest.approx(5.0)  # the length of the positive prediction
    assert (normal[0, 1] / normal[0, 0]).item() == pytest.approx(8 / 5)  # in the guided direction


@settings(deadline=None)
@given(scale=st.floats(1.01, 30))
def test_normalised_guidance_keeps_the_length_of_every_token(scale: float) -> None:
    draw = torch.Generator().manual_seed(1)
    positive, negative = torch.randn(2, 3, 5, 8, generator=draw).unbind()
    guided = classifier_free(positive, negative, scale, normalize=True)
    torch.testing.assert_close(guided.norm(dim=-1), positive.norm(dim=-1))


def test_guidance_between_predictions_of_zero_stays_finite() -> None:
    zero = torch.zeros(1, 2, 4)
    assert torch.equal(classifier_free(zero, zero, 4.0, normalize=True), zero)


def test_guidance_and_steps_are_computed_in_fp32() -> None:
    half = torch.randn(1, 2, 4).bfloat16()
    assert classifier_free(half, half, 4.0, normalize=True).dtype == torch.float32
    x = torch.randn(1, 2, 4)
    assert euler_step(x, half, torch.tensor(1.0), torch.tensor(0.5)).dtype == torch.float32


@every_scheduler
def test_euler_steps_along_a_straight_path_arrive_exactly(scheduler: FlowMatchScheduler) -> None:
    """The velocity of a straight path is `noise - clean`: any number of steps leads from the noise to the picture."""
    clean, drawn = torch.randn(2, 4, 4).unbind()
    for steps in (1, 7, 30):
        sigmas = scheduler.sigmas(steps, 4096)
        x = mix(clean, drawn, sigmas[0])
        assert torch.equal(x, drawn)
        for now, after in pairwise(sigmas):
            x = euler_step(x, drawn - clean, now, after)
            torch.testing.assert_close(x, mix(clean, drawn, after), atol=1e-5, rtol=0)
        torch.testing.assert_close(x, clean, atol=1e-5, rtol=0)


def test_mixing_keeps_the_picture_at_noise_0_and_the_noise_at_1() -> None:
    clean, drawn = torch.randn(2, 3, 3).unbind()
    assert torch.equal(mix(clean, drawn, torch.tensor(0.0)), clean)
    assert torch.equal(mix(clean, drawn, torch.tensor(1.0)), drawn)
    assert mix(torch.ones(1), torch.zeros(1), torch.tensor(0.25)).item() == pytest.approx(0.75)
    assert math.isfinite(mix(clean, drawn, torch.tensor(0.5)).sum())
