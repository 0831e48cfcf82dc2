"""From a request to images: encode, noise, schedule, denoise, decode.

This page knows no family, no file and no place of memory: families come as `spec.Family`, components as modules, and a
phase is named where it begins (`in_use`), so that memory can follow.
"""

import logging
import math
import numbers
import operator
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .memory.attach import in_use
from .ops.tiling import tiled_apply
from .runtime.errors import GenerationCancelled, InvalidInputError, NonFiniteError
from .runtime.rng import noise
from .sampling.guidance import classifier_free
from .sampling.schedule import FlowMatchScheduler
from .sampling.solvers import euler_step, mix
from .spec import Family, Guidance, compute_placement

logger = logging.getLogger(__name__)

PIXEL_MULTIPLE = 16
"""Sides of an image are multiples of this in every family here."""
MAX_SIDE = 16384
"""Pixels; far beyond what the models were trained for."""


@dataclass(frozen=True)
class Step:
    """What a step callback sees."""

    index: int
    """Of the step just done, from 0."""
    total: int
    sigma: float
    """Noise level reached."""
    latents: Tensor
    """fp32 `[images, C, h, w]`, normalised."""
    first_image: int
    """Index in the request of the first of these images."""


StepCallback = Callable[[Step], bool | None]
"""Called after every step; returning False stops the run with `GenerationCancelled`."""


@dataclass(frozen=True)
class Components:
    """What a run needs; those a run does not touch may be None."""

    dit: nn.Module | None
    text_encoder: nn.Module | None
    vae: nn.Module | None
    tokenizer: Any

    def need(self, name: str) -> Any:
        """The component `name`, or an error that says how to get it."""
        component = getattr(self, name)
        if component is None:
            raise InvalidInputError(f"This needs the {name}, which was not loaded: add its ModelConfig.")
        return component


@dataclass(frozen=True)
class Tiling:
    """Blended tiles in the autoencoder; sizes in latents of 8 pixels."""

    size: int = 128
    stride: int = 64

    def __post_init__(self) -> None:
        positive_int("tile_size", self.size)
        positive_int("tile_stride", self.stride)
        if self.stride > self.size:
            raise InvalidInputError(f"tile_stride={self.stride} must be at most tile_size={self.size}.")


@dataclass(frozen=True)
class Request:
    """One image to make per entry of `prompts`, validated."""

    prompts: Sequence[str | Tensor]
    """Texts, or conditions `[M, text width]` made earlier."""
    negative_prompts: Sequence[str | Tensor]
    seeds: Sequence[int]
    height: int
    width: int
    steps: int
    guidance: Guidance
    scheduler: FlowMatchScheduler
    image: Tensor | None = None
    """fp32 `[1, 3, H, W]` in -1..1, the start of image-to-image."""
    strength: float = 1.0
    rand_device: str = "cpu"
    """Where noise is drawn; a device that exists."""
    noise_dtype: torch.dtype = torch.float32
    tiling: Tiling | None = None
    batch_size: int = 1
    progress: Callable[[Iterable[int]], Iterable[int]] = iter
    callback: StepCallback | None = None


@torch.no_grad()
def generate(family: Family, components: Components, request: Request) -> Tensor:
    """Make every image of `request`.

    Returns:
        fp32 pixels `[images, 3, H, W]` in -1..1, on the CPU.

    Raises:
        NonFiniteError: NaN or infinity appeared; no black image is ever returned.
        GenerationCancelled: the callback returned False.
    """
    latents = generate_latents(family, components, request)
    with in_use(components.need("vae")):
        pixels = torch.cat([decode(family, components.vae, item[None], request.tiling).cpu() for item in latents])
    return _finite(pixels, "in the decoded image").clamp_(-1, 1)


@torch.no_grad()
def generate_latents(family: Family, components: Components, request: Request) -> Tensor:
    """As `generate`, up to the clean latents: fp32 `[images, C, h, w]`."""
    negatives = request.negative_prompts if request.guidance.active else ()
    conditions = encode_prompts(family, components, [*request.prompts, *negatives])
    positive, negative = conditions[: len(request.prompts)], conditions[len(request.prompts) :]
    image_latents = encode_image(family, components, request)
    tokens = (request.height // PIXEL_MULTIPLE) * (request.width // PIXEL_MULTIPLE)
    sigmas = request.scheduler.sigmas(request.steps, tokens, request.strength)
    results = []
    with in_use(components.need("dit")):
        for start in range(0, len(request.seeds), request.batch_size):
            chosen = slice(start, start + request.batch_size)
            branches = [positive[chosen], negative[chosen]] if request.guidance.active else [positive[chosen]]
            results.append(denoise(family, components.dit, branches, request, sigmas, image_latents, start))
    return torch.cat(results)


@torch.no_grad()
def encode_prompts(family: Family, components: Components, prompts: Sequence[str | Tensor]) -> list[Tensor]:
    """Condition `[M, text width]` of every prompt; equal texts are encoded once, conditions pass through."""
    known: dict[str, Tensor] = {}
    texts = [prompt for prompt in prompts if not isinstance(prompt, Tensor)]
    if texts:
        encoder, tokenizer = components.need("text_encoder"), components.need("tokenizer")
        with in_use(encoder):
            for text in dict.fromkeys(texts):
                known[text] = _finite(family.encode_prompt(encoder, tokenizer, text), "in the text encoder")
    return [prompt if isinstance(prompt, Tensor) else known[prompt] for prompt in prompts]


def encode_image(family: Family, components: Components, request: Request) -> Tensor | None:
    """Latents of the input image, fp32 `[1, C, h, w]`."""
    if request.image is None:
        return None
    vae, tiling = components.need("vae"), request.tiling
    with in_use(vae):
        if tiling is None:
            latents = family.encode_image(vae, request.image)
        else:
            scale = family.latent_shape(request.height, request.width)[1] / request.height
            latents = tiled_apply(
                lambda part: family.encode_image(vae, part),
                request.image, tiling.size * 8, tiling.stride * 8, scale, align=PIXEL_MULTIPLE,
            )  # fmt: skip
    return _finite(latents.float(), "in the encoded input image")


def denoise(
    family: Family,
    model: Any,
    branches: Sequence[Sequence[Tensor]],
    request: Request,
    sigmas: Tensor,
    image_latents: Tensor | None,
    start: int,
) -> Tensor:
    """Walk down the sigmas with Euler steps; the state is fp32 throughout.

    Args:
        family: whose model it is.
        model: the transformer.
        branches: conditions with the prompts, then without where guidance is active; one per image.
        request: see `Request`.
        sigmas: fp32 `[steps + 1]`.
        image_latents: `[1, C, h, w]` to start from, or None for pure noise.
        start: index of the first of these images in the request.

    Returns:
        fp32 `[images, C, h, w]`.
    """
    height, width = request.height, request.width
    device, _ = compute_placement(model)
    seeds = request.seeds[start : start + len(branches[0])]
    x = torch.cat([_initial(family, request, seed, sigmas, image_latents) for seed in seeds]).to(device)
    sampler = family.prepare(model, branches, sigmas, height, width)
    x = family.pack(x)
    steps_done = 0
    for step in request.progress(range(len(sigmas) - 1)):
        steps_done += 1
        velocity = sampler.velocity(x, step)
        guidance = request.guidance
        if guidance.active:
            velocity = classifier_free(velocity[0], velocity[1], guidance.scale, normalize=guidance.normalize)
        else:
            velocity = velocity[0]
        x = euler_step(x, velocity, sigmas[step], sigmas[step + 1])
        _finite(x, f"after step {step + 1} of {len(sigmas) - 1}")
        if request.callback is not None:
            latents = family.unpack(x, height, width)
            seen = Step(step, len(sigmas) - 1, float(sigmas[step + 1]), latents, start)
            if request.callback(seen) is False:
                raise GenerationCancelled(f"Stopped by the callback after step {step + 1} of {seen.total}.")
    if steps_done != len(sigmas) - 1:
        raise InvalidInputError(
            f"progress_bar_cmd passed on {steps_done} of {len(sigmas) - 1} steps; it must pass all."
        )
    return family.unpack(x, height, width)


def _initial(family: Family, request: Request, seed: int, sigmas: Tensor, image_latents: Tensor | None) -> Tensor:
    shape = family.latent_shape(request.height, request.width)
    drawn = noise(shape, seed, torch.device(request.rand_device), request.noise_dtype).float().cpu()
    return drawn if image_latents is None else mix(image_latents.cpu(), drawn, sigmas[0])


def decode(family: Family, vae: Any, latents: Tensor, tiling: Tiling | None = None) -> Tensor:
    """Latents `[B, C, h, w]` to fp32 pixels `[B, 3, H, W]`, about -1..1."""
    if tiling is None:
        return family.decode(vae, latents).float()
    size, stride, scale = _latent_tiling(family, tiling)
    return tiled_apply(lambda part: family.decode(vae, part), latents, size, stride, scale)


def _latent_tiling(family: Family, tiling: Tiling) -> tuple[int, int, int]:
    """Tile size and stride in this family's latents, and pixels per latent (8 or 16)."""
    pixels = 1024 // family.latent_shape(1024, 1024)[1]
    return max(tiling.size * 8 // pixels, 1), max(tiling.stride * 8 // pixels, 1), pixels


def _finite(tensor: Tensor, where: str) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError(
            f"NaN or infinity {where}. Check the weights (`diffsynth inspect`), and use torch.bfloat16 or "
            "torch.float32 rather than torch.float16, whose range these models leave."
        )
    return tensor


# What a caller may pass, checked before any weight is touched.


def positive_int(name: str, value: Any) -> int:
    """`value`, of any integer type, as an int of at least 1."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < 1:
        raise InvalidInputError(f"{name}={value!r} must be a whole number of at least 1.")
    return number


def finite_float(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """`value`, of any real type, as a finite float in `low..high`."""
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, numbers.Real) else float(value)
    except OverflowError:
        number = math.nan
    if not math.isfinite(number):
        raise InvalidInputError(f"{name}={value!r} must be a finite number.")
    if not low <= number <= high:
        raise InvalidInputError(f"{name}={value} must be between {low:g} and {high:g}.")
    return number


def flag(name: str, value: Any) -> bool:
    """`value`, which must be True or False: a text such as "no" would count as true."""
    if not isinstance(value, bool):
        raise InvalidInputError(f"{name}={value!r} must be True or False.")
    return value


def image_side(name: str, value: object) -> int:
    """`value` rounded up to a multiple of 16, with a warning where that changes it."""
    side = positive_int(name, value)
    if side > MAX_SIDE:
        raise InvalidInputError(f"{name}={side} must be at most {MAX_SIDE} pixels.")
    rounded = math.ceil(side / PIXEL_MULTIPLE) * PIXEL_MULTIPLE
    if rounded != side:
        logger.warning("%s=%d is no multiple of %d; rounded up to %d.", name, side, PIXEL_MULTIPLE, rounded)
    return rounded


def one_per_image(name: str, value: Any, images: int, per_prompt: int) -> list[Any]:
    """Spread a parameter that is one value for all, or a list with one entry per prompt or per image."""
    if not isinstance(value, (list, tuple)):
        return [value] * images
    if len(value) == images:
        return list(value)
    if len(value) * per_prompt == images:
        return [entry for entry in value for _ in range(per_prompt)]
    raise InvalidInputError(
        f"{name} has {len(value)} entries, but {images} images are asked for "
        f"({images // per_prompt} prompts x {per_prompt} images each). Give one entry per image, or a single value."
    )


def seeds_per_image(seed: Any, images: int) -> list[int]:
    """One seed per image: a list is taken as it is, a single seed counts up, None counts up from a random one."""
    if seed is None:
        seed = secrets.randbits(48)  # drawn here, so that the image's metadata can say it
    given = list(seed) if isinstance(seed, (list, tuple)) else [seed]
    seeds = []
    for value in given:
        try:
            seeds.append(operator.index(value))
        except TypeError:
            raise InvalidInputError(f"seed={value!r} must be a whole number, a list of them, or None.") from None
    if not isinstance(seed, (list, tuple)):
        seeds = [seeds[0] + index for index in range(images)]
    for number in seeds:
        if not -(2**63) <= number < 2**64:
            raise InvalidInputError(f"seed={number} must be between {-(2**63)} and {2**64 - 1}.")
    if len(seeds) != images:
        raise InvalidInputError(
            f"seed has {len(seeds)} entries for {images} images. Give one per image, or one number."
        )
    return seeds


def check_callables(**values: object) -> None:
    """Refuse what is neither callable nor None, by the name of its parameter."""
    for name, value in values.items():
        if value is not None and not callable(value):
            raise InvalidInputError(f"{name}={value!r} must be callable.")
