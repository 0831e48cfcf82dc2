"""What the public pipelines share: loading, argument checking, and the way of pixels in and out."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from torch import Tensor, nn

from ..generate import (
    Components,
    Request,
    StepCallback,
    Tiling,
    check_callables,
    encode_prompts,
    finite_float,
    flag,
    generate,
    generate_latents,
    image_side,
    one_per_image,
    positive_int,
    seeds_per_image,
)
from ..load import fill_components, find_components
from ..memory.attach import attachment_of
from ..runtime.device import default_device, resolve_device, warn_about_environment
from ..runtime.errors import CorruptFileError, InvalidInputError, MissingFileError
from ..runtime.image import fit, from_pixels, load_image, to_pixels, with_parameters
from ..runtime.rng import noise_device
from ..sampling.schedule import FlowMatchScheduler
from ..spec import Family, Guidance
from ..version import __version__
from ..weights.model_config import ModelConfig

logger = logging.getLogger(__name__)

Prompt = str | Sequence[str]
PilImage = Image.Image
OUTPUT_TYPES = ("pil", "pt", "latent")


class BasePipeline:
    """Components of one family, and a call that turns prompts into images.

    Attributes:
        dit, text_encoder, vae: the modules (None where they were not loaded).
        tokenizer: the tokenizer of the text encoder.
        torch_dtype, device: of weights and computation.
        source: where the weights came from, written into the images' metadata.
    """

    family: ClassVar[Family]

    def __init__(self, device: str | torch.device | None = None, torch_dtype: torch.dtype = torch.bfloat16) -> None:
        warn_about_environment()
        self.device = resolve_device(device) if device is not None else default_device()
        self.torch_dtype = torch_dtype
        self.dit: Any = None
        self.text_encoder: Any = None
        self.vae: Any = None
        self.tokenizer: Any = None
        self.source = ""
        self.scheduler = self.family.spec.scheduler

    # Loading

    @classmethod
    def _load(
        cls,
        torch_dtype: torch.dtype,
        device: str | torch.device | None,
        model_configs: Sequence[ModelConfig],
        tokenizer_config: ModelConfig | None,
        vram_limit: float | None,
        components: Sequence[str] | None,
    ) -> Self:
        if not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
            raise InvalidInputError(f"torch_dtype={torch_dtype!r} must be a floating dtype such as torch.bfloat16.")
        if vram_limit is not None:
            finite_float("vram_limit", vram_limit, low=0)
        pipe = cls(device, torch_dtype)
        found = find_components(cls.family, model_configs, dtype=torch_dtype, device=pipe.device, wanted=components)
        # The tokenizer before the weights: it is small, and a mistake in it should not show after minutes of reading.
        if tokenizer_config is not None and (components is None or "text_encoder" in components):
            pipe.tokenizer = pipe._load_tokenizer(tokenizer_config)
        loaded = fill_components(found, dtype=torch_dtype, device=pipe.device, vram_limit=vram_limit)
        for name, module in loaded.items():
            setattr(pipe, name, module)
        pipe.source = _source(model_configs)
        return pipe

    def _load_tokenizer(self, config: ModelConfig) -> Any:
        paths = config.resolve()
        folder = paths[0] if paths[0].is_dir() else paths[0].parent
        inner = folder / self.family.spec.tokenizer_folder
        folder = inner if inner.is_dir() else folder
        # Without vocabulary files the library makes an empty tokenizer, and every prompt would mean the same.
        if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
            listed = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
            raise MissingFileError(
                f"No tokenizer of {self.family.spec.title} in {folder.absolute()}: neither tokenizer.json nor "
                f"vocab.json is there (it holds {listed})."
            )
        merges = folder / "merges.txt"
        if not (folder / "tokenizer.json").is_file() and not (merges.is_file() and merges.stat().st_size):
            raise CorruptFileError(
                f"{merges.absolute()} is missing or empty, so no text could be read. Download it again."
            )
        try:
            return self.family.load_tokenizer(str(folder))
        except Exception as error:  # the tokenizer library raises plain exceptions of its own for damaged files
            raise CorruptFileError(
                f"The tokenizer files in {folder.absolute()} cannot be read ({type(error).__name__}: {error}). "
                "Download them again."
            ) from error

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        torch_dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device | None = None,
        vram_limit: float | None = None,
        **memory: Any,
    ) -> Self:
        """Load a whole repository in the published layout from a local folder.

        Args:
            folder: holds `transformer/`, `text_encoder/`, `vae/` and `tokenizer/`.
            torch_dtype: of weights and computation.
            device: "cuda", "cpu", ...; None for the best there is.
            vram_limit: GiB of weights that may stay on the device, where `memory` offloads.
            memory: memory fields of `ModelConfig`, for all components.
        """
        spec = cls.family.spec
        root = Path(folder)
        configs = []
        for component in spec.components:
            place = root / component.folder
            if not place.is_dir():
                raise MissingFileError(
                    f"{root.absolute()} has no folder {component.folder!r} for the {component.title}."
                )
            configs.append(ModelConfig(path=place, **memory))
        tokenizer = ModelConfig(path=root / spec.tokenizer_folder)
        pipe = cls._load(torch_dtype, device, configs, tokenizer, vram_limit, None)
        pipe.source = root.absolute().name
        return pipe

    def enable_vram_management(
        self,
        num_persistent_param_in_dit: int | None = None,
        vram_limit: float | None = None,
        vram_buffer: float = 0.5,
    ) -> None:
        """Set how much memory of the device the weights of offloaded components may keep.

        Components whose `ModelConfig` names an offload place are managed from loading on; this call sets the limit.

        Args:
            num_persistent_param_in_dit: accepted for compatibility; use `vram_limit`.
            vram_limit: GiB of weights that may stay on the device, 0 for the smallest use; None for all that is free.
            vram_buffer: GiB left free below the limit.
        """
        if num_persistent_param_in_dit is not None:
            logger.warning("num_persistent_param_in_dit has no effect; use vram_limit.")
        finite_float("vram_buffer", vram_buffer, low=0)
        limit = None if vram_limit is None else max(finite_float("vram_limit", vram_limit, low=0) - vram_buffer, 0.0)
        managed = [attachment for module in self.modules().values() if (attachment := attachment_of(module))]
        if not managed:
            logger.warning(
                "No component is offloaded, so there is nothing to manage: give offload_device or offload_dtype."
            )
        for attachment in managed:
            attachment.limit = limit

    def modules(self) -> dict[str, nn.Module]:
        """Loaded components by name."""
        names = [component.name for component in self.family.spec.components]
        return {name: module for name in names if (module := getattr(self, name)) is not None}

    # Generating

    def encode_prompt(self, prompt: Prompt) -> list[Tensor]:
        """Conditions of one or several prompts, each `[M, text width]`, to pass as `prompt_embeds`."""
        return encode_prompts(self.family, self._components(), _conditions("prompt", prompt, None)[0])

    def _components(self) -> Components:
        return Components(self.dit, self.text_encoder, self.vae, self.tokenizer)

    def _run(
        self,
        *,
        prompt: Prompt,
        negative_prompt: Prompt,
        guidance: Guidance,
        scheduler: FlowMatchScheduler,
        input_image: PilImage | str | Path | None,
        denoising_strength: float,
        height: int,
        width: int,
        seed: int | Sequence[int] | None,
        rand_device: str,
        num_inference_steps: int,
        tiled: bool,
        tile_size: int,
        tile_stride: int,
        progress_bar_cmd: Callable[..., Iterable[int]] | None,
        num_images_per_prompt: int,
        prompt_embeds: Tensor | Sequence[Tensor] | None,
        negative_prompt_embeds: Tensor | Sequence[Tensor] | None,
        callback: StepCallback | None,
        batch_size: int,
        output_type: str,
        recorded: Mapping[str, Any],
    ) -> Any:
        """Check every argument, then run; weights are first touched after the last check."""
        per_prompt = positive_int("num_images_per_prompt", num_images_per_prompt)
        positives, single = _conditions("prompt", prompt, prompt_embeds)
        images = len(positives) * per_prompt
        single = single and per_prompt == 1
        negative_prompt = "" if negative_prompt is None else negative_prompt
        negatives, _ = _conditions("negative_prompt", negative_prompt, negative_prompt_embeds)
        self._check_widths([*positives, *negatives])
        flag("tiled", tiled)
        if output_type not in OUTPUT_TYPES:
            raise InvalidInputError(f"output_type={output_type!r} must be one of {', '.join(OUTPUT_TYPES)}.")
        check_callables(progress_bar_cmd=progress_bar_cmd, callback=callback)
        height, width = image_side("height", height), image_side("width", width)
        request = Request(
            prompts=[positive for positive in positives for _ in range(per_prompt)],
            negative_prompts=one_per_image(
                "negative_prompt", negatives if len(negatives) > 1 else negatives[0], images, per_prompt
            ),
            seeds=seeds_per_image(seed, images),
            height=height,
            width=width,
            steps=positive_int("num_inference_steps", num_inference_steps),
            guidance=guidance,
            scheduler=scheduler,
            image=None if input_image is None else to_pixels(fit(_opened(input_image), height, width)),
            strength=finite_float("denoising_strength", denoising_strength, 0, 1),
            rand_device=str(noise_device(resolve_device(rand_device, "rand_device"))),
            noise_dtype=self.torch_dtype,
            tiling=Tiling(tile_size, tile_stride) if tiled else None,
            batch_size=positive_int("batch_size", batch_size),
            progress=iter if progress_bar_cmd is None else progress_bar_cmd,
            callback=callback,
        )
        self._warn_without_effect(request, negative_prompt)
        if output_type == "latent":
            return generate_latents(self.family, self._components(), request)
        pixels = generate(self.family, self._components(), request)
        if output_type == "pt":
            return pixels
        made = [
            with_parameters(from_pixels(item), {**self._parameters(request, index), **recorded})
            for index, item in enumerate(pixels)
        ]
        return made[0] if single else made

    def _check_widths(self, conditions: Sequence[str | Tensor]) -> None:
        embeddings = [condition for condition in conditions if isinstance(condition, Tensor)]
        for embedding in embeddings if self.dit is not None else ():
            if embedding.shape[1] != self.dit.config.text_width:
                raise InvalidInputError(
                    f"Embeddings of shape {list(embedding.shape)} do not fit: this model takes "
                    f"[tokens, {self.dit.config.text_width}]."
                )

    def _warn_without_effect(self, request: Request, negative_prompt: Prompt) -> None:
        if request.image is None and request.strength != 1:
            logger.warning("denoising_strength=%g has no effect without input_image.", request.strength)
        if negative_prompt and not request.guidance.active:
            logger.warning(
                "negative_prompt has no effect at cfg_scale=%g; it needs more than 1.", request.guidance.scale
            )
        if request.guidance.scale < 1:
            logger.warning("cfg_scale=%g below 1 has no effect.", request.guidance.scale)

    def _parameters(self, request: Request, index: int) -> dict[str, Any]:
        """What image `index` was made with, for its metadata."""
        prompt, negative = request.prompts[index], request.negative_prompts[index]
        return {
            "prompt": prompt if isinstance(prompt, str) else None,
            "negative_prompt": negative if request.guidance.active and isinstance(negative, str) else None,
            "seed": request.seeds[index],
            "steps": request.steps,
            "cfg_scale": request.guidance.scale,
            "height": request.height,
            "width": request.width,
            "denoising_strength": None if request.image is None else request.strength,
            "rand_device": request.rand_device,
            "tiled": None if request.tiling is None else [request.tiling.size, request.tiling.stride],
            "model": self.source,
            "family": self.family.spec.name,
            "dtype": str(self.torch_dtype).removeprefix("torch."),
            "version": f"diffsynth {__version__}",
        }


def _opened(image: Any) -> PilImage:
    """The input image, opened if it is the path of one."""
    if isinstance(image, (str, Path)):
        return load_image(image)
    if not isinstance(image, Image.Image):
        said = repr(image) if isinstance(image, (int, float, bytes)) else f"a {type(image).__name__}"  # not its numbers
        raise InvalidInputError(f"input_image={said} must be a PIL image, or the path of an image file.")
    return image


def _source(configs: Sequence[ModelConfig]) -> str:
    """Where the weights came from, for people: ids, and names of files without the folders of this machine."""
    names = []
    for config in configs:
        paths = [config.path] if isinstance(config.path, (str, Path)) else list(config.path or ())
        names.append(config.model_id or (Path(paths[0]).name if paths else "state_dict"))
    return ", ".join(dict.fromkeys(names))


def _conditions(name: str, prompt: Any, embeds: Any) -> tuple[list[str | Tensor], bool]:
    """Prompts or embeddings as a list, and whether a single one was given."""
    if embeds is not None:
        if prompt:
            raise InvalidInputError(f"{name} and {name}_embeds are both given; give one of them.")
        single = isinstance(embeds, Tensor) and embeds.ndim == 2
        found = [embeds] if single else list(embeds) if isinstance(embeds, (list, tuple, Tensor)) else []
        if not found or not all(_is_condition(item) for item in found):
            raise InvalidInputError(
                f"{name}_embeds must be a floating-point tensor [tokens, width] without NaN, or a list of them, as "
                "`encode_prompt` returns."
            )
        return found, single
    single = isinstance(prompt, str)
    texts = [prompt] if single else prompt
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
        raise InvalidInputError(f"{name}={prompt!r} must be a string or a non-empty list of strings.")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidInputError(f"{name}={text!r} is no valid text: it holds half of a surrogate pair.") from error
    return list(texts), single


def _is_condition(item: Any) -> bool:
    return (
        isinstance(item, Tensor)
        and item.ndim == 2
        and len(item) > 0
        and item.is_floating_point()
        and not item.is_meta
        and bool(torch.isfinite(item).all())
    )
