"""Packed samples: attention, packing and adaptive norms give each sample what it would get alone."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffsynth.ops.attention import packed_attention
from diffsynth.ops.norm import RMSNorm, gated_residual, modulated_layer_norm, modulated_rms_norm
from diffsynth.ops.packing import Packing

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=4)
modes = pytest.mark.parametrize("gradients", [False, True], ids=["inference", "autograd"])


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`softmax(q k^T / sqrt(d)) v` in fp64, head by head."""
    q, k, v = (t.double().transpose(0, 1) for t in (q, k, v))
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(0, 1)


@modes
@settings(deadline=None, max_examples=30)
@given(lengths=LENGTHS)
def test_packed_attention_is_attention_sample_by_sample(gradients: bool, lengths: list[int]) -> None:
    q, k, v = torch.randn(3, sum(lengths), 2, 8).unbind()
    samples = zip(*(t.split(lengths) for t in (q, k, v)), strict=True)
    expected = torch.cat([plain_attention(*sample) for sample in samples])
    with torch.set_grad_enabled(gradients):
        found = packed_attention(q.clone(), k, v, lengths)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


def test_packed_attention_keeps_samples_apart() -> None:
    q, k, v = torch.randn(3, 7, 2, 8).unbind()
    first = packed_attention(q.clone(), k, v, [3, 4])[:3]
    k[3:], v[3:] = 100.0, -100.0
    assert torch.equal(packed_attention(q.clone(), k, v, [3, 4])[:3], first)


def test_packed_attention_under_autograd_leaves_its_inputs_alone() -> None:
    q, k, v = (torch.randn(7, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    kept = q.detach().clone()
    assert torch.autograd.gradcheck(lambda *qkv: packed_attention(*qkv, [3, 4]), (q, k, v))
    assert torch.equal(q, kept)


@settings(deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4))
def test_joining_and_splitting_are_inverse(pairs: list[tuple[int, int]]) -> None:
    packing = Packing(*zip(*pairs, strict=True))
    img = torch.arange(sum(packing.img_lengths)).unsqueeze(1)
    txt = -1 - torch.arange(sum(packing.txt_lengths)).unsqueeze(1)
    for joined, split, order in (
        (packing.join_txt_img(txt, img), packing.split_txt_img, (txt, img)),
        (packing.join_img_txt(img, txt), packing.split_img_txt, (img, txt)),
    ):
        assert [len(sample) for sample in joined.split(packing.lengths)] == [i + t for i, t in pairs]
        assert all(torch.equal(*both) for both in zip(split(joined), order, strict=True))
    for sample, (images, _) in zip(packing.join_img_txt(img, txt).split(packing.lengths), pairs, strict=True):
        assert (sample[:images] >= 0).all()
        assert (sample[images:] < 0).all()


NORMS = {
    "layer norm": modulated_layer_norm,
    "rms norm": lambda x, shift, scale, lengths: modulated_rms_norm(
        x, torch.linspace(0.5, 2, x.shape[-1]), shift, scale, lengths
    ),
    "gate": lambda x, shift, scale, lengths: gated_residual(x.clone(), 2 * x, shift, lengths),
}


@pytest.mark.parametrize("norm", NORMS)
@modes
def test_one_row_for_all_is_that_row_for_each_sample(norm: str, gradients: bool) -> None:
    lengths = [3, 1, 5]
    x, shift, scale = torch.randn(9, 16), torch.randn(1, 16), torch.randn(1, 16)
    with torch.set_grad_enabled(gradients):
        shared = NORMS[norm](x, shift, scale, lengths)
        repeated = NORMS[norm](x, shift.repeat(3, 1), scale.repeat(3, 1), lengths)
    torch.testing.assert_close(shared, repeated, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_each_sample_gets_its_own_row(norm: str) -> None:
    lengths = [3, 1, 5]
    x, shift, scale = torch.randn(9, 16), torch.randn(3, 16), torch.randn(3, 16)
    packed = NORMS[norm](x, shift, scale, lengths).split(lengths)
    for index, part in enumerate(x.split(lengths)):
        row = slice(index, index + 1)
        alone = NORMS[norm](part, shift[row], scale[row], [len(part)])
        torch.testing.assert_close(packed[index], alone, atol=1e-6, rtol=1e-6)


def test_modulated_norms_are_their_formulas() -> None:
    x, weight, shift, scale = torch.randn(6, 16) * 3, torch.randn(16), torch.randn(1, 16), torch.randn(1, 16)
    normal = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(modulated_layer_norm(x, shift, scale, [6]), normal * (1 + scale) + shift)
    normal = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(modulated_rms_norm(x, weight, shift, scale, [6]), normal * weight * (1 + scale) + shift)
    torch.testing.assert_close(RMSNorm(16)(x), normal)


@pytest.mark.parametrize("rows", [1, 2])
def test_gradients_reach_tokens_and_modulation(rows: int) -> None:
    lengths = [2, 3]
    inputs = [torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (5, rows, rows)]
    assert torch.autograd.gradcheck(lambda x, a, b: modulated_layer_norm(x, a, b, lengths), inputs)
    assert torch.autograd.gradcheck(lambda x, a, b: gated_residual(x, x.square(), a + b, lengths), inputs)
    x, shift, scale = (tensor.detach().float().requires_grad_() for tensor in inputs)
    modulated_rms_norm(x, torch.ones(4), shift, scale, lengths).square().sum().backward()
    y, a, b = (tensor.detach().clone().requires_grad_() for tensor in (x, shift, scale))
    samples = torch.tensor([0, 0, 1, 1, 1]) if rows == 2 else torch.zeros(5, dtype=torch.long)
    (F.rms_norm(y, (4,), eps=1e-6) * (1 + b[samples]) + a[samples]).square().sum().backward()
    for mine, other in ((x, y), (shift, a), (scale, b)):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-4, rtol=1e-4)


def test_without_autograd_the_residual_is_updated_in_place() -> None:
    x, y, gate = torch.randn(5, 4), torch.randn(5, 4), torch.randn(1, 4)
    expected = x + gate * y
    with torch.no_grad():
        assert gated_residual(x, y, gate, [5]) is x
    torch.testing.assert_close(x, expected)
