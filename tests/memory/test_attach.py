"""Wherever weights rest, the result is that of the plain module; fp8 storage keeps to its stated bound."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

from diffsynth.load import load_components
from diffsynth.memory.attach import Attachment, Residence, attach, attachment_of, in_use
from diffsynth.memory.quantized import FP8_DTYPES, QuantizedWeight
from diffsynth.recognise import module_shapes
from diffsynth.registry import FAMILIES
from diffsynth.runtime.errors import InvalidInputError
from diffsynth.tiny.checkpoint import write_tiny_checkpoint
from diffsynth.weights.model_config import ModelConfig

CPU, META = torch.device("cpu"), torch.device("meta")
BF16, FP32, E4M3 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
GIB = 2**30
APART = ("blocks.*.mod.*",)  # of the toy: runs apart from its block


def residence(dtype: torch.dtype = FP32, **fields: Any) -> Residence:
    made = Residence.of(ModelConfig("x", **fields), dtype, CPU)
    assert made is not None
    return made


# --- What the fields of a ModelConfig mean ------------------------------------------------------------------------


def test_no_field_means_no_arrangement() -> None:
    assert Residence.of(ModelConfig("x"), BF16, CPU) is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"offload_device": "cpu"}, [(CPU, BF16)] * 4),
        ({"offload_dtype": E4M3}, [(CPU, E4M3), (CPU, E4M3), (CPU, E4M3), (CPU, BF16)]),
        ({"offload_device": "disk"}, [("disk", BF16), ("disk", BF16), (CPU, BF16), (CPU, BF16)]),
        ({"offload_dtype": "disk"}, [("disk", BF16), ("disk", BF16), (CPU, BF16), (CPU, BF16)]),
        (
            {"offload_device": "disk", "onload_dtype": E4M3},
            [("disk", BF16), (CPU, E4M3), (CPU, E4M3), (CPU, BF16)],
        ),
        (
            {"offload_device": torch.device("cpu"), "offload_dtype": E4M3, "onload_dtype": BF16},
            [(CPU, E4M3), (CPU, BF16), (CPU, BF16), (CPU, BF16)],
        ),
        ({"computation_dtype": FP32}, [(CPU, FP32)] * 4),
        ({"preparing_dtype": E4M3}, [(CPU, BF16), (CPU, BF16), (CPU, E4M3), (CPU, BF16)]),
    ],
)
def test_fields_left_out_follow_their_neighbours(fields: dict[str, Any], expected: list[Any]) -> None:
    made = residence(BF16, **fields)
    assert [made.offload, made.onload, made.preparing, made.computation] == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"offload_device": "disk", "offload_dtype": BF16}, "offload_device='disk' and offload_dtype=.* disagree"),
        ({"onload_device": "cpu", "onload_dtype": "disk"}, "onload_device='cpu' and onload_dtype='disk' disagree"),
        ({"offload_dtype": "bfloat16"}, "offload_dtype='bfloat16' is no floating-point torch.dtype"),
        ({"onload_dtype": torch.int8}, "onload_dtype=torch.int8 is no floating-point"),
        ({"offload_device": "gpu"}, "offload_device='gpu' is no device"),
        ({"offload_device": "meta"}, "offload_device='meta' holds no tensors"),
        ({"computation_device": "disk"}, "computation_device='disk' is no device"),
        ({"computation_dtype": "disk"}, "computation_dtype='disk' is no floating-point"),
        ({"computation_dtype": E4M3}, "is a storage type; use torch.bfloat16"),
        ({"offload_device": "cpu", "onload_device": "disk"}, "Set offload_device='disk' too"),
        ({"offload_device": "cpu", "preparing_dtype": "disk"}, "Set onload_device='disk' too"),
        ({"offload_dtype": E4M3, "preparing_dtype": torch.float8_e5m2}, "Two kinds of fp8 storage"),
    ],
)
def test_contradictions_name_the_field_and_the_fix(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Residence.of(ModelConfig("x", **fields), BF16, CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_absent_device_is_refused_by_the_name_of_its_field() -> None:
    with pytest.raises(InvalidInputError, match="preparing_device='cuda': this machine has no CUDA device"):
        Residence.of(ModelConfig("x", offload_device="cpu", preparing_device="cuda"), BF16, CPU)


# --- A toy with everything that matters ---------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mod = nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.scale = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        return x + self.scale * self.mlp(x + modulation)


class Toy(nn.Module):
    """Blocks in a list and a dict, a part on its own schedule, statistics, a constant and a parameter at the root."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.rand(8))
        self.inlet = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.extra = nn.ModuleDict({"a": nn.Linear(8, 8)})
        self.bn = nn.BatchNorm1d(8, affine=False)
        self.register_buffer("constant", torch.full((8,), 0.5), persistent=False)
        self.explode = False

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.inlet.weight.dtype  # models ask for it before the layer runs
        x = self.inlet(x.to(dtype)) + self.bias
        modulations = [block.mod(x.mean(0, keepdim=True)) for block in self.blocks]
        for block, modulation in zip(self.blocks, modulations, strict=True):
            x = block(x, modulation)
        if self.explode:
            raise ArithmeticError("on purpose")
        return self.bn((self.extra["a"](x) + self.constant).float())


def make_toy() -> Toy:
    torch.manual_seed(0)
    toy = Toy().eval()
    toy.bn.running_mean.normal_()
    toy.bn.running_var.uniform_(0.5, 1.5)
    toy.bn.num_batches_tracked.fill_(7)
    return toy.requires_grad_(False)


def on_meta(toy: Toy) -> Toy:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        empty = Toy().eval()
    empty.explode = toy.explode
    return empty.requires_grad_(False)


def attached_toy(res: Residence, limit: float | None = None) -> tuple[Toy, Toy, Attachment]:
    """(plain toy in the computation dtype, the same toy attached, its attachment)."""
    plain = make_toy()
    source = plain.state_dict()
    toy = on_meta(plain)
    attachment = attach(toy, lambda name: source[name], res, separate=APART, quantizable=["blocks."], limit=limit)
    for parameter in plain.parameters():
        parameter.data = parameter.data.to(res.computation[1])
    return plain, toy, attachment


X = torch.linspace(-1, 1, 40).reshape(5, 8)
EXACT: dict[str, dict[str, Any]] = {
    "cpu": {"offload_device": "cpu"},
    "disk": {"offload_device": "disk"},
    "disk, cpu while in use": {"offload_device": "disk", "onload_device": "cpu"},
    "disk at every stage but the last": {"offload_dtype": "disk", "onload_dtype": "disk", "preparing_dtype": "disk"},
    "fp32 at rest, bf16 computing": {"offload_dtype": FP32, "offload_device": "cpu", "computation_dtype": BF16},
}
FP8: dict[str, dict[str, Any]] = {
    "fp8 at rest": {"offload_dtype": E4M3, "offload_device": "cpu"},
    "disk, then fp8": {"offload_device": "disk", "onload_dtype": E4M3, "onload_device": "cpu"},
    "disk, fp8 kept": {"offload_device": "disk", "onload_device": "disk", "preparing_dtype": E4M3},
    "fp8 while in use only": {"offload_device": "cpu", "onload_dtype": E4M3, "preparing_dtype": FP32},
}
LIMITS = [None, 0.0, 500 / GIB, 2000 / GIB]


def all_meta(module: nn.Module, but: tuple[str, ...] = ("bias",)) -> bool:
    return all(parameter.is_meta for name, parameter in module.named_parameters() if name not in but)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("mode", EXACT)
def test_result_is_that_of_the_plain_module(mode: str, limit: float | None) -> None:
    plain, toy, attachment = attached_toy(residence(**EXACT[mode]), limit)
    expected = plain(X)
    assert all_meta(toy)
    for _ in range(2):
        with attachment.in_use():
            assert toy(X).equal(expected)
            assert toy(X).equal(expected)
            assert all_meta(toy), "weights are dropped after each unit"
    assert toy(X).equal(expected), "outside of a phase too"


@pytest.mark.parametrize("mode", FP8)
def test_fp8_result_is_the_same_for_every_limit_and_within_its_bound(mode: str) -> None:
    results = []
    for limit in LIMITS:
        plain, toy, attachment = attached_toy(residence(**FP8[mode]), limit)
        results.append(toy(X))
        with attachment.in_use():
            results += [toy(X), toy(X)]
        attachment.detach()
        results.append(toy(X))
    assert all(result.equal(results[0]) for result in results)
    expected = plain(X)
    assert not results[0].equal(expected)
    assert (results[0] - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("mode", [*EXACT, *FP8])
@pytest.mark.parametrize("limit", [None, 0.0])
def test_statistics_counters_and_constants_are_those_of_the_file(mode: str, limit: float | None) -> None:
    plain, toy, attachment = attached_toy(residence(**(EXACT | FP8)[mode]), limit)
    for leave in (lambda: toy(X), attachment.detach):
        leave()
        buffers = dict(toy.named_buffers())
        assert buffers.keys() == dict(plain.named_buffers()).keys()
        for name, buffer in plain.named_buffers():
            assert buffers[name].equal(buffer)
            assert buffers[name].dtype == buffer.dtype
    assert toy.bn.num_batches_tracked.item() == 7


@pytest.mark.parametrize("mode", FP8)
def test_fp8_touches_only_matrices_inside_the_blocks(mode: str) -> None:
    plain, toy, attachment = attached_toy(residence(**FP8[mode]))
    attachment.detach()
    changed = {name for name, value in plain.state_dict().items() if not toy.state_dict()[name].equal(value)}
    assert changed == {f"blocks.{index}.mlp.{layer}.weight" for index in range(3) for layer in (0, 2)}


def test_every_parameter_belongs_to_one_unit() -> None:
    _, toy, attachment = attached_toy(residence(offload_device="cpu"))
    names = [name for unit in attachment._units for name in unit.owners]
    assert sorted(names) == sorted(set(dict(toy.named_parameters())) - {"bias"})
    assert toy.get_parameter("bias").equal(make_toy().bias)


@pytest.mark.parametrize("interrupt", [ArithmeticError, KeyboardInterrupt])
def test_exception_inside_forward_releases_the_weights(interrupt: type[BaseException]) -> None:
    plain, toy, attachment = attached_toy(residence(offload_device="disk"))
    block = toy.blocks[1]
    block.mlp[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(interrupt("on purpose")))
    with pytest.raises(interrupt), attachment.in_use():
        toy(X)
    assert all_meta(toy)
    assert attachment._kept_bytes == 0
    block.mlp[1]._forward_hooks.clear()
    assert toy(X).equal(plain(X))


def test_reading_that_fails_at_the_start_of_a_phase_leaves_nothing_behind() -> None:
    plain, toy, attachment = attached_toy(residence(offload_device="disk", onload_device="cpu"))
    read, count = attachment._read, 0

    def failing(name: str) -> Tensor:
        nonlocal count
        count += 1
        if count == 5:
            raise OSError("disk gone")
        return read(name)

    attachment._read = failing
    with pytest.raises(OSError, match="disk gone"), attachment.in_use():
        pass
    assert not attachment._onloaded
    with attachment.in_use():
        assert toy(X).equal(plain(X))


def test_kept_weights_hold_to_the_limit_and_go_after_the_phase() -> None:
    _, toy, attachment = attached_toy(residence(offload_device="disk"), limit=2000 / GIB)
    toy(X)
    assert attachment._kept_bytes == 0, "outside of a phase nothing is kept"
    with attachment.in_use():
        toy(X)
        kept = sum(value.nbytes for unit in attachment._units for value in (unit.kept or {}).values())
        assert 0 < kept == attachment._kept_bytes <= 2000
    assert all(unit.kept is None for unit in attachment._units)


def test_kept_units_are_read_once_in_a_phase_and_others_each_time() -> None:
    for limit, reads in ((None, 1), (0.0, 3)):
        _, toy, attachment = attached_toy(residence(offload_device="disk"), limit)
        names: list[str] = []
        read = attachment._read
        attachment._read = lambda name, read=read, names=names: names.append(name) or read(name)
        with attachment.in_use():
            for _ in range(3):
                toy(X)
        assert {names.count(name) for name in names} == {reads}


def test_phases_nest_and_the_outermost_counts() -> None:
    plain, toy, attachment = attached_toy(residence(offload_device="disk", onload_device="cpu"))
    with in_use(toy):
        with in_use(toy):
            toy(X)
        assert attachment._onloaded
        assert attachment._kept_bytes
        assert toy(X).equal(plain(X))
    assert not attachment._onloaded
    with in_use(plain):
        assert plain(X).equal(toy(X)), "a module that is not attached needs nothing"


@pytest.mark.parametrize("mode", EXACT)
def test_detach_gives_a_plain_module_with_equal_weights(mode: str) -> None:
    plain, toy, attachment = attached_toy(residence(**EXACT[mode]))
    with attachment.in_use():
        toy(X)
        attachment.detach()
        assert toy(X).equal(plain(X))
    assert attachment_of(toy) is None
    assert not hasattr(toy, "compute_placement")
    assert "load_state_dict" not in vars(toy)
    for module in toy.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for name, value in plain.state_dict().items():
        assert toy.state_dict()[name].equal(value)
        assert toy.state_dict()[name].dtype == value.dtype
    assert toy(X).equal(plain(X))


def test_attaching_twice_is_refused_until_detached() -> None:
    plain, toy, attachment = attached_toy(residence(offload_device="cpu"))
    source = plain.state_dict()
    with pytest.raises(InvalidInputError, match=r"attachment\.detach"):
        attach(toy, lambda name: source[name], residence(offload_device="disk"))
    attachment.detach()
    attach(toy, lambda name: source[name], residence(offload_device="disk"), separate=APART)
    assert toy(X).equal(plain(X))


@pytest.mark.parametrize("mode", EXACT)
def test_load_state_dict_of_an_attached_module_takes_effect(mode: str) -> None:
    plain, toy, attachment = attached_toy(residence(**EXACT[mode]))
    new = {name: value + 1 for name, value in make_toy().state_dict().items()}
    before = {name: value.clone() for name, value in new.items()}
    plain.load_state_dict(new)
    with attachment.in_use():
        toy(X)
        toy.load_state_dict(new)
        assert toy(X).equal(plain(X)), "also in the middle of a phase"
    assert toy(X).equal(plain(X))
    assert toy.load_state_dict({}, strict=False).missing_keys
    assert toy(X).equal(plain(X))
    with pytest.raises(RuntimeError, match="Missing key"):
        toy.load_state_dict({"bias": new["bias"]})
    toy(X)
    assert all(new[name].equal(value) for name, value in before.items())


def test_moving_the_limit_takes_effect_without_changing_the_result() -> None:
    plain, toy, attachment = attached_toy(residence(offload_device="disk"), limit=0.0)
    with attachment.in_use():
        toy(X)
        assert attachment._kept_bytes == 0
        attachment.limit = None
        assert toy(X).equal(plain(X))
        assert attachment._kept_bytes > 0


# --- Any order of events ------------------------------------------------------------------------------------------


class AnyOrder(RuleBasedStateMachine):
    """Random sequences of phases, runs, failures, limits, new weights and detaching."""

    @initialize(mode=st.sampled_from([*EXACT, *FP8]), limit=st.sampled_from(LIMITS))
    def start(self, mode: str, limit: float | None) -> None:
        self.mode, self.phases = mode, []  # type: ignore[var-annotated]
        self.plain, self.toy, self.attachment = attached_toy(residence(**(EXACT | FP8)[mode]), limit)
        if mode in FP8:  # the plain module with the rounded weights
            for name, parameter in self.plain.named_parameters():
                if ".mlp." in name and parameter.ndim == 2:
                    parameter.data = QuantizedWeight.of(parameter.data, E4M3).to(CPU, FP32)
        self.expected = self.plain(X)

    @property
    def attached(self) -> bool:
        return attachment_of(self.toy) is not None

    @rule()
    def forward(self) -> None:
        assert self.toy(X).equal(self.expected)

    @rule()
    def fail(self) -> None:
        self.toy.explode = True
        with pytest.raises(ArithmeticError):
            self.toy(X)
        self.toy.explode = False

    @rule()
    def enter(self) -> None:
        phase = in_use(self.toy)
        phase.__enter__()
        self.phases.append(phase)

    @precondition(lambda self: self.phases)
    @rule()
    def leave(self) -> None:
        self.phases.pop().__exit__(None, None, None)

    @rule(limit=st.sampled_from(LIMITS))
    def change_limit(self, limit: float | None) -> None:
        self.attachment.limit = limit

    @precondition(lambda self: self.attached and self.mode in EXACT)
    @rule(offset=st.integers(-1, 1))
    def new_weights(self, offset: int) -> None:
        new = {name: value + offset for name, value in self.plain.state_dict().items() if "blocks.1" in name}
        self.plain.load_state_dict(new, strict=False)
        self.toy.load_state_dict(new, strict=False)
        self.expected = self.plain(X)

    @precondition(lambda self: self.attached)
    @rule()
    def detach(self) -> None:
        self.attachment.detach()

    @precondition(lambda self: not self.attached and not self.phases)
    @rule(mode=st.sampled_from([*EXACT]))
    def attach_again(self, mode: str) -> None:
        dtype = self.plain.inlet.weight.dtype
        res = residence(dtype, **{key: value for key, value in EXACT[mode].items() if key != "computation_dtype"})
        source = self.plain.state_dict()
        self.mode, self.attachment = mode, attach(self.toy, lambda name: source[name], res, separate=APART)

    @invariant()
    def units_are_empty_between_runs(self) -> None:
        if hasattr(self, "toy") and self.attached:
            assert all_meta(self.toy)
            if not self.phases:
                assert self.attachment._kept_bytes == 0

    def teardown(self) -> None:
        while getattr(self, "phases", None):
            self.leave()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=100, stateful_step_count=25, deadline=None, database=None)


# --- fp8 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FP8_DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-4, 0.02, 30.0])
@pytest.mark.parametrize("shape", [(64, 128), (16, 8, 3, 3)])
def test_fp8_error_is_bounded_whatever_the_size_of_the_weights(
    dtype: torch.dtype, scale: float, shape: tuple[int, ...]
) -> None:
    weight = torch.randn(shape) * scale * torch.logspace(-3, 0, shape[0]).reshape(-1, *(1,) * (len(shape) - 1))
    stored = QuantizedWeight.of(weight, dtype)
    restored = stored.to(CPU, FP32)
    assert isinstance(restored, Tensor)
    bound = 0.04 if dtype == E4M3 else 0.08
    for row, kept in zip(weight, restored, strict=True):
        assert (row - kept).norm() < bound * row.norm()
    assert stored.nbytes == QuantizedWeight.nbytes_of(weight) == weight.numel() + 4 * shape[0]


def test_fp8_of_zeros_and_of_fp8_is_exact() -> None:
    assert not torch.any(QuantizedWeight.of(torch.zeros(4, 4), E4M3).to(CPU, FP32))
    already = torch.randn(4, 4).to(E4M3)
    restored = QuantizedWeight.of(already, E4M3).to(CPU, FP32)
    torch.testing.assert_close(restored, already.float(), rtol=0.07, atol=0)


def test_not_a_number_stays_visible() -> None:
    weight = torch.ones(2, 2)
    weight[0, 0] = float("nan")
    assert QuantizedWeight.of(weight, E4M3).to(CPU, BF16).isnan().any()


# --- Both families ------------------------------------------------------------------------------------------------

CONTRACT = {  # vram_config of the ERNIE-Image document, on a machine without CUDA
    f"{stage}_{what}": value
    for stage in ("offload", "onload", "preparing", "computation")
    for what, value in (("dtype", BF16), ("device", "cpu"))
}
LOW_VRAM = {
    "offload_dtype": "disk", "offload_device": "disk", "onload_dtype": E4M3, "onload_device": "cpu",
    "preparing_dtype": E4M3, "preparing_device": "cpu", "computation_dtype": BF16, "computation_device": "cpu",
}  # fmt: skip
MODES: dict[str, tuple[dict[str, Any], float | None]] = {
    "cpu": ({"offload_device": "cpu"}, None),
    "cpu, nothing kept": ({"offload_device": "cpu"}, 0.0),
    "contract": (CONTRACT, 1e-5),
    "disk": ({"offload_device": "disk"}, None),
    "disk, nothing kept": ({"offload_device": "disk"}, 0.0),
    "disk, a little kept": ({"offload_dtype": "disk", "offload_device": "disk"}, 5e-5),
}
Folders = Callable[[str], Path]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.spec.name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = write_tiny_checkpoint(name, tmp_path_factory.mktemp(name) / "model")
        return made[name]

    return get


def pipeline_of(family: Any) -> Any:
    module, _, name = family.spec.pipeline.partition(":")
    return getattr(__import__(module, fromlist=[name]), name)


def image_of(pipe: Any) -> Tensor:
    return pipe("a red ball", negative_prompt="x", height=16, width=32, num_inference_steps=2, cfg_scale=3.0, seed=5,
                progress_bar_cmd=lambda steps: steps, output_type="pt")  # fmt: skip


@pytest.fixture(scope="module")
def plain_images(folders: Folders) -> dict[str, Tensor]:
    return {
        family.spec.name: image_of(pipeline_of(family).from_folder(folders(family.spec.name), device="cpu"))
        for family in FAMILIES
    }


@every_family
@pytest.mark.parametrize("mode", MODES)
def test_image_is_bit_equal_wherever_the_weights_rest(
    folders: Folders, plain_images: dict[str, Tensor], family: Any, mode: str
) -> None:
    fields, limit = MODES[mode]
    folder = folders(family.spec.name)
    pipe = pipeline_of(family).from_folder(folder, device="cpu", vram_limit=limit, **fields)
    assert image_of(pipe).equal(plain_images[family.spec.name])
    for module in pipe.modules().values():
        assert attachment_of(module) is not None
        assert all_meta(module)
        attachment_of(module).detach()  # type: ignore[union-attr]
    assert image_of(pipe).equal(plain_images[family.spec.name])


@every_family
def test_low_vram_recipe_with_fp8_gives_a_near_image_whatever_the_limit(
    folders: Folders, plain_images: dict[str, Tensor], family: Any
) -> None:
    images = []
    for limit in (None, 0.0, 2e-5):
        pipe = pipeline_of(family).from_folder(folders(family.spec.name), device="cpu", vram_limit=limit, **LOW_VRAM)
        images.append(image_of(pipe))
    assert all(image.equal(images[0]) for image in images)
    assert torch.isfinite(images[0]).all()
    plain = plain_images[family.spec.name]
    assert (images[0] - plain).norm() < 0.2 * plain.norm()


@every_family
def test_enable_vram_management_sets_the_limit_less_the_buffer(
    folders: Folders, plain_images: dict[str, Tensor], family: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = pipeline_of(family).from_folder(folders(family.spec.name), device="cpu", offload_device="cpu")
    pipe.enable_vram_management(vram_limit=2.0, vram_buffer=0.5)
    assert {attachment_of(module).limit for module in pipe.modules().values()} == {1.5}  # type: ignore[union-attr]
    pipe.enable_vram_management(vram_limit=0)
    assert {attachment_of(module).limit for module in pipe.modules().values()} == {0.0}  # type: ignore[union-attr]
    assert image_of(pipe).equal(plain_images[family.spec.name])
    pipe.enable_vram_management()
    assert {attachment_of(module).limit for module in pipe.modules().values()} == {None}  # type: ignore[union-attr]
    assert not caplog.records
    plain = pipeline_of(family).from_folder(folders(family.spec.name), device="cpu")
    plain.enable_vram_management(vram_limit=1)
    assert "nothing to manage" in caplog.text


@every_family
@pytest.mark.parametrize("fields", [{"offload_device": "disk"}, {"offload_dtype": E4M3}, LOW_VRAM])
def test_buffers_and_sensitive_tensors_of_real_components_are_kept(
    folders: Folders, family: Any, fields: dict[str, Any]
) -> None:
    def load(**fields: Any) -> dict[str, nn.Module]:
        configs = [ModelConfig(folders(family.spec.name) / c.folder, **fields) for c in family.spec.components]
        return load_components(family, configs, dtype=BF16, device=CPU)

    plain, managed = load(), load(**fields)
    for name, module in managed.items():
        component = family.spec.component(name)
        attachment = attachment_of(module)
        assert attachment is not None
        buffers = dict(module.named_buffers())
        for key, buffer in plain[name].named_buffers():
            assert buffers[key].equal(buffer)
        attachment.detach()
        assert module_shapes(module) == module_shapes(plain[name])
        weights = module.state_dict()
        for key, value in plain[name].state_dict().items():
            if not weights[key].equal(value):
                assert value.ndim >= 2
                assert component.blocks is not None
                assert key.startswith(f"{component.blocks}.")
                assert "_mod." not in key
                assert (weights[key] - value).float().norm() < 0.05 * value.float().norm()
