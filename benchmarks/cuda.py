"""Measure both families at their full published size on one CUDA device, with random bf16 weights made there.

    python benchmarks/cuda.py [--family qwen-image] [--size 1024] [--steps 20] [--no-diffusers] [--save]
    python benchmarks/cuda.py --dry-run      (any machine: tiny models on the CPU; proves only that the script works)

No checkpoint is needed, and 80 GB of device memory are enough: one component is there at a time. diffusers is measured
in the same process with the same weights where it is installed. Random weights suit timing. See README.md.
"""

import argparse
import gc
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: this file would hide NVIDIA's package `cuda` from torch
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

from benchmarks.common import (
    Comparison,
    Figure,
    Report,
    Samples,
    clock_of,
    command_line,
    finish,
    hardware,
    largest_difference,
    time_in_turns,
)
from benchmarks.figures.step import MEASURED_STEP, PIXELS_PER_TOKEN, Run
from benchmarks.peers import PEERS, Peer
from diffsynth.families.ernie_image.transformer import TransformerConfig as ErnieConfig
from diffsynth.families.qwen_image.text import PREFIX_TOKENS
from diffsynth.families.qwen_image.transformer import TransformerConfig as QwenConfig
from diffsynth.recognise import meta_build
from diffsynth.spec import ComponentSpec

BF16 = torch.bfloat16
GIB = 2**30
DIFFERENCE = 0.25
"""Relative, of the outputs in bf16. Rounding alone moves them by percents through dozens of layers of random weights
and a guidance that magnifies it; a wrong operation moves them by their whole size."""


@dataclass(frozen=True)
class Settings:
    """What to measure, and where."""

    device: torch.device
    size: int
    steps: int
    text_lengths: tuple[int, int]
    repeats: int
    tiny: bool
    diffusers: bool

    @property
    def grid(self) -> tuple[int, int]:
        """Image tokens, rows and columns."""
        return self.size // PIXELS_PER_TOKEN, self.size // PIXELS_PER_TOKEN

    def time(self, runs: Mapping[str, Callable[[], Any]]) -> dict[str, Samples]:
        """Seconds on the device, in turns, after two rounds to warm up."""
        return time_in_turns(runs, self.repeats, warmup=2, clock=clock_of(self.device))

    def config(self, component: ComponentSpec) -> Any:
        """The published numbers, or the tiny ones."""
        if self.tiny:
            return component.parse_config(component.tiny)
        if component.name == "text_encoder":
            return component.infer_config(_PUBLISHED_EMBEDDING[component.class_names[0]])
        return component.parse_config({})


_PUBLISHED_EMBEDDING = {
    "Qwen2_5_VLForConditionalGeneration": {"embed_tokens.weight": (152064, 3584)},
    "Mistral3Model": {"embed_tokens.weight": (131072, 3072)},
}
"""What tells the published text encoders from others of their architecture."""


# The device


def random_on_device(component: ComponentSpec, settings: Settings) -> nn.Module:
    """The component with random bf16 weights, made where it runs: nothing of its size passes through host memory."""
    module = meta_build(component, settings.config(component))
    generator = torch.Generator(settings.device).manual_seed(0)
    for owner in module.modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is None:
                continue
            weight = torch.empty(parameter.shape, dtype=BF16, device=settings.device)
            if leaf == "gamma" or (leaf == "weight" and weight.dim() == 1):  # scales of norms
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, 0.02, generator=generator)
            owner._parameters[leaf] = nn.Parameter(weight, requires_grad=False)
    return module.to(settings.device)  # the buffers are small and already real


def shared_peer(peer: Peer, name: str, ours: nn.Module, settings: Settings) -> nn.Module | None:
    """diffusers' module over the very same weights, or None where it is not installed or not wanted."""
    if not settings.diffusers or importlib.util.find_spec("diffusers") is None:
        return None
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        theirs = peer.build(name, settings.config(peer.family.spec.component(name)))
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)
    return theirs.to(settings.device)


@contextmanager
def freed_afterwards() -> Any:
    """A component's turn: what it left on the device is given back at the end."""
    try:
        yield
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def peaks(settings: Settings, run: Callable[[], Any]) -> tuple[float, float]:
    """GiB allocated and reserved at the peak of `run`, weights included; zeros on the CPU."""
    if settings.device.type != "cuda":
        run()
        return 0.0, 0.0
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB


def weight_gib(module: nn.Module) -> float:
    """Of the parameters."""
    return sum(parameter.nbytes for parameter in module.parameters()) / GIB


def memory_fact(settings: Settings, module: nn.Module, run: Callable[[], Any]) -> str:
    """Weights and peaks in words."""
    allocated, reserved = peaks(settings, run)
    weights = weight_gib(module)
    return f"{allocated:.2f} GiB allocated, {reserved:.2f} GiB reserved; {weights:.2f} GiB of it weights"


def milliseconds(samples: Samples) -> str:
    """Min and median."""
    return f"{samples.min * 1000:.4g} ms / {samples.median * 1000:.4g} ms (min / median)"


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do at best, measured in the same run, since both drift."""

    matmul_tflops: float
    host_to_device_gb: float
    device_copy_gb: float

    @classmethod
    @torch.no_grad()
    def measure(cls, settings: Settings) -> "Ceilings":
        """A large bf16 matrix product on random data (on zeros it would be faster), and two copies."""
        device = settings.device
        on_gpu = device.type == "cuda"
        side, nbytes = (256, 2**20) if settings.tiny else (8192, 2**30)
        a, b = (torch.randn(side, side, dtype=BF16, device=device) for _ in range(2))
        host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=on_gpu).random_()
        target, other = torch.empty(nbytes, dtype=torch.uint8, device=device), host.to(device)
        times = settings.time({
            "matmul": lambda: torch.matmul(a, b),
            "host": lambda: target.copy_(host, non_blocking=True),
            "copy": lambda: target.copy_(other),
        })  # fmt: skip
        return cls(
            matmul_tflops=2 * side**3 / times["matmul"].min / 1e12,
            host_to_device_gb=nbytes / times["host"].min / 1e9,
            device_copy_gb=2 * nbytes / times["copy"].min / 1e9,  # read and written
        )

    def figure(self, side: int) -> Figure:
        """For the report."""
        facts = {
            f"bf16 matrix product {side}^3, random data": f"{self.matmul_tflops:.4g} TFLOP/s",
            "host to device, pinned": f"{self.host_to_device_gb:.4g} GB/s",
            "device memory, read and written": f"{self.device_copy_gb:.4g} GB/s",
        }
        return Figure("ceilings", "what the machine can do at best", facts=facts)


# The components


def forward_flops(config: Any, img: int, txt: int) -> float:
    """Floating-point operations of one forward over one sequence of `img` image and `txt` text tokens.

    A multiply-add counts two. Per layer, T = img + txt tokens of width D: linear layers cost 2 T times their weights,
    attention 4 T^2 D (scores and weighted sum). The weights a token meets are 12 D^2 in Qwen-Image (q, k, v, out: 4;
    MLP: 8) and 4 D^2 + 3 D F in ERNIE-Image (F the MLP's width). To these come the projections in and out. Norms,
    rotary embedding and the layers that see only the timestep are left out: below a thousandth. At 1024x1024 with 100
    text tokens this gives 70.0e12 and 76.3e12.
    """
    tokens = img + txt
    if isinstance(config, QwenConfig):
        width, layers = config.width, config.num_layers
        weights = 12 * width**2
        ends = img * (config.in_channels + config.patch_size**2 * config.out_channels)
        ends += txt * config.joint_attention_dim
    else:
        assert isinstance(config, ErnieConfig)
        width, layers = config.hidden_size, config.num_layers
        weights = 4 * width**2 + 3 * width * config.ffn_hidden_size
        ends = img * (config.in_channels + config.out_channels) + txt * config.text_in_dim
    return layers * (2 * tokens * weights + 4 * tokens**2 * width) + 2 * width * ends


@torch.no_grad()
def transformer_figure(peer: Peer, settings: Settings, ceilings: Ceilings) -> Figure:
    """The guided step: ours in one pass, theirs as its pipeline does it."""
    spec = peer.family.spec
    component = spec.component("dit")
    ours = random_on_device(component, settings)
    config: Any = ours.config
    text_width = config.joint_attention_dim if isinstance(config, QwenConfig) else config.text_in_dim
    run = Run.random(peer, settings.grid, text_width, settings.text_lengths, settings.steps, settings.device, BF16)
    step = min(MEASURED_STEP, settings.steps - 1)
    sampler = run.prepare(ours)
    tokens = peer.family.pack(run.latents)
    timesteps = run.sigmas[:-1].to(settings.device) * 1000
    model: Any = ours
    runs: dict[str, Callable[[], Any]] = {
        "ours": lambda: run.our_step(sampler, tokens, step),
        "prepare": lambda: run.prepare(ours),
        "table": lambda: model.modulation(timesteps),
    }
    facts = {"peak of a guided step": memory_fact(settings, ours, runs["ours"])}
    theirs = shared_peer(peer, "dit", ours, settings)
    difference, note = None, ""
    if theirs is not None:
        their_step = peer.step(theirs, run.positive, run.negative, run.grid)
        state = tokens if peer.keeps_tokens else run.latents
        runs = {"theirs": lambda: their_step(state, run.sigmas[step], run.sigmas[step + 1]), **runs}
        difference, note = judge(runs["ours"]() - tokens, run.tokens(runs["theirs"]()) - tokens)
        facts["peak of diffusers' guided step"] = memory_fact(settings, theirs, runs["theirs"])
    times = settings.time(runs)
    flops = sum(forward_flops(config, settings.grid[0] * settings.grid[1], txt) for txt in settings.text_lengths)
    for name in ("ours", "theirs"):
        if name in times:
            rate = flops / times[name].min / 1e12
            share = f"{100 * rate / ceilings.matmul_tflops:.1f} % of the matrix product above"
            facts[f"{name}: rate in the best step"] = f"{rate:.4g} TFLOP/s, {share}"
    facts["floating-point operations of a step"] = f"{flops / 1e12:.4g} TFLOP"
    facts[f"modulation table of {settings.steps} steps"] = milliseconds(times["table"])
    facts["all preparation of a run, the table included"] = milliseconds(times["prepare"])
    pairs = zip(times["ours"].values, times["prepare"].values, strict=True)
    whole = Samples(tuple(s + p / settings.steps for s, p in pairs))
    case = f"{spec.title} {settings.size}x{settings.size}: guided step"
    comparisons = [
        Comparison(
            f"{case} + 1/{settings.steps} of the preparation", whole, times.get("theirs"),
            difference=difference, note=note,
        ),
        Comparison(f"{case} alone", times["ours"], times.get("theirs")),
    ]  # fmt: skip
    texts = " and ".join(str(length) for length in settings.text_lengths)
    return Figure("transformer", f"{spec.title}, bf16, texts of {texts} tokens", comparisons, facts)


@torch.no_grad()
def text_encoder_figure(peer: Peer, settings: Settings) -> Figure:
    """One prompt: bound by reading the weights, so the rate is in bytes."""
    spec = peer.family.spec
    encoder: Any = random_on_device(spec.component("text_encoder"), settings)
    length = settings.text_lengths[0] + (PREFIX_TOKENS if spec.name == "qwen-image" else 0)
    ids = torch.randint(0, encoder.config.vocab_size, (1, length), device=settings.device)

    def run() -> Tensor:
        return encoder(input_ids=ids, use_cache=False).last_hidden_state

    memory = memory_fact(settings, encoder, run)
    times = settings.time({"ours": run})
    read = sum(p.nbytes for name, p in encoder.named_parameters() if "embed_tokens" not in name)
    facts = {
        "peak": memory,
        "rate of reading its weights": f"{read / times['ours'].min / 1e9:.4g} GB/s",
    }
    comparison = Comparison(f"{spec.title}: text encoder, {length} tokens", times["ours"])
    return Figure("text encoder", f"{spec.title}, bf16, one prompt", [comparison], facts)


@torch.no_grad()
def vae_figure(peer: Peer, settings: Settings) -> Figure:
    """Decoding and encoding one image."""
    spec, size = peer.family.spec, settings.size
    ours = random_on_device(spec.component("vae"), settings)
    theirs = shared_peer(peer, "vae", ours, settings)
    latents = torch.randn(1, *peer.family.latent_shape(size, size), device=settings.device)
    pixels = torch.rand(1, 3, size, size, device=settings.device) * 2 - 1
    cases = {
        "decode": (lambda: peer.family.decode(ours, latents), lambda: peer.decode(theirs, latents)),
        "encode": (lambda: peer.family.encode_image(ours, pixels), lambda: peer.encode(theirs, pixels)),
    }
    comparisons, facts = [], {}
    for name, (our_run, their_run) in cases.items():
        runs: dict[str, Callable[[], Tensor]] = {"ours": our_run}
        facts[f"{name}: peak"] = memory_fact(settings, ours, our_run)
        difference, note = None, ""
        if theirs is not None:
            runs = {"theirs": their_run, "ours": our_run}
            facts[f"{name}: peak of diffusers"] = memory_fact(settings, theirs, their_run)
            clamp = 1.0 if name == "decode" else float("inf")
            difference, note = judge(our_run().clamp(-clamp, clamp), their_run().clamp(-clamp, clamp))
        times = settings.time(runs)
        case = f"{spec.title} {size}x{size}: VAE {name}"
        comparisons.append(Comparison(case, times["ours"], times.get("theirs"), difference=difference, note=note))
    return Figure("vae", f"{spec.title}, bf16", comparisons, facts)


def judge(ours: Tensor, theirs: Tensor) -> tuple[float, str]:
    """Relative difference, and a warning where it is too large: hours of device time are not thrown away for it."""
    difference = largest_difference(ours, theirs, relative=True)
    return difference, "" if difference <= DIFFERENCE else WARNING


WARNING = "OUTPUTS DIFFER: not a valid comparison"


# The command


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Options of the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", choices=sorted(PEERS), help="one of them; both by default")
    parser.add_argument("--size", type=int, default=1024, help="side of the image in pixels (default 1024)")
    parser.add_argument("--steps", type=int, default=20, help="of a run, which shares its preparation (default 20)")
    parser.add_argument("--text-tokens", type=int, default=100, help="of the prompt (default 100)")
    parser.add_argument("--negative-tokens", type=int, default=100, help="of the negative prompt (default 100)")
    parser.add_argument("--repeats", type=int, default=10, help="rounds per case (default 10)")
    parser.add_argument("--no-diffusers", action="store_true", help="measure ours alone")
    parser.add_argument("--device", default="cuda", help="default cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models: see that everything runs")
    parser.add_argument("--dry-run", action="store_true", help="short for --device cpu --tiny --size 64 --repeats 1")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-cuda-<gpu>.md")
    options = parser.parse_args(arguments)
    if options.dry_run:
        options.device, options.tiny, options.size, options.repeats = "cpu", True, 64, 1
    if options.size < 16 or options.size % 16 or min(options.steps, options.repeats, options.text_tokens) < 1:
        parser.error("--size must be a multiple of 16; --steps, --repeats and --text-tokens at least 1")
    if options.negative_tokens < 1:
        parser.error("--negative-tokens must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, print; 1 where the outputs of the two sides differ."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "Nothing measured: torch sees no CUDA device here (--dry-run shows on any machine that the script works)."
        )
        return 0
    if device.type == "cpu" and not options.tiny:
        print("Nothing measured: the published sizes are for a CUDA device; add --tiny to see that the script works.")
        return 0
    settings = Settings(
        device=device,
        size=options.size,
        steps=options.steps,
        text_lengths=(options.text_tokens, options.negative_tokens),
        repeats=options.repeats,
        tiny=options.tiny,
        diffusers=not options.no_diffusers,
    )
    machine = hardware()
    ceilings = Ceilings.measure(settings)
    figures = [ceilings.figure(256 if settings.tiny else 8192)]
    print(f"{figures[0].markdown()}\n", flush=True)
    for name in [options.family] if options.family else sorted(PEERS, reverse=True):
        peer = PEERS[name]
        for measure in (
            lambda peer=peer: transformer_figure(peer, settings, ceilings),
            lambda peer=peer: text_encoder_figure(peer, settings),
            lambda peer=peer: vae_figure(peer, settings),
        ):
            with freed_afterwards():
                figures.append(measure())
            print(f"{figures[-1].markdown()}\n", flush=True)
    said = {"device": str(device), "repeats": str(settings.repeats)}
    if settings.tiny:
        said["tiny"] = "yes: the numbers mean nothing"
    report = Report("CUDA benchmarks", command_line("cuda.py", arguments), figures, said, machine)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "dry-run"
    finish(report, f"cuda-{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}", save=options.save)
    return int(any(comparison.note == WARNING for figure in figures for comparison in figure.comparisons))


if __name__ == "__main__":
    sys.exit(main())
