"""Qwen-Image: text to image and image to image.

from diffsynth.pipelines.qwen_image import QwenImagePipeline, ModelConfig
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from ..families.qwen_image.family import QwenImageFamily
from ..families.qwen_image.spec import DEFAULT_SIZE
from ..generate import Step, StepCallback, finite_float, flag
from ..spec import Family, Guidance
from ..weights.model_config import ModelConfig
from .base import BasePipeline, PilImage, Prompt

__all__ = ["ModelConfig", "QwenImagePipeline", "Step"]

_TOKENIZER = ModelConfig(model_id="Qwen/Qwen-Image", origin_file_pattern="tokenizer/")


class QwenImagePipeline(BasePipeline):
    """Qwen-Image, 20 B parameters (https://arxiv.org/abs/2508.02324)."""

    family: ClassVar[Family] = QwenImageFamily()

    @classmethod
    def from_pretrained(
        cls,
        torch_dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device | None = None,
        model_configs: Sequence[ModelConfig] = (),
        tokenizer_config: ModelConfig | None = _TOKENIZER,
        processor_config: ModelConfig | None = None,
        vram_limit: float | None = None,
        *,
        components: Sequence[str] | None = None,
    ) -> "QwenImagePipeline":
        """Load the components that `model_configs` name, downloading what is missing.

        Args:
            torch_dtype: of weights and computation.
            device: "cuda", "cpu", ...; None for the best there is.
            model_configs: one per component, in any order.
            tokenizer_config: the tokenizer's folder; None to load none.
            processor_config: image processor of the edit models; text-to-image has no use for it.
            vram_limit: GiB of weights that may stay on the device, for components that offload.
            components: which of "dit", "text_encoder", "vae" must be there; None for all.
        """
        return cls._load(torch_dtype, device, model_configs, tokenizer_config, vram_limit, components)

    def __call__(
        self,
        prompt: Prompt = "",
        negative_prompt: Prompt = "",
        cfg_scale: float = 1.0,
        input_image: PilImage | str | Path | None = None,
        denoising_strength: float = 1.0,
        height: int = DEFAULT_SIZE[0],
        width: int = DEFAULT_SIZE[1],
        seed: int | Sequence[int] | None = None,
        rand_device: str = "cpu",
        num_inference_steps: int = 30,
        exponential_shift_mu: float | None = None,
        tiled: bool = False,
        tile_size: int = 128,
        tile_stride: int = 64,
        progress_bar_cmd: Callable[..., Iterable[int]] | None = tqdm,
        *,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | Sequence[Tensor] | None = None,
        negative_prompt_embeds: Tensor | Sequence[Tensor] | None = None,
        cfg_normalize: bool = True,
        callback: StepCallback | None = None,
        batch_size: int = 1,
        output_type: str = "pil",
    ) -> Any:
        """Make images.

        Args:
            prompt: what the image should show; a list makes one image for each.
            negative_prompt: what it should not show; one for all, or a list with one per prompt.
            cfg_scale: classifier-free guidance; takes effect above 1.
            input_image: start of image-to-image, an image or the path of one; resized to cover the size and cropped.
            denoising_strength: 0..1, how far to leave `input_image`: 0 keeps it, 1 ignores it.
            height: in pixels, a multiple of 16 (others are rounded up).
            width: in pixels, a multiple of 16 (others are rounded up).
            seed: None for random. Image i of a run has `seed + i`; a list gives one seed per image.
            rand_device: where noise is drawn; "cuda" and "cpu" give different images for a seed.
            num_inference_steps: from 1.
            exponential_shift_mu: exponent of the schedule's shift; None to derive it from the size.
            tiled: encode and decode in blended tiles, which needs less memory and changes the image slightly.
            tile_size: side of a tile, in latents (8 pixels).
            tile_stride: distance of tiles, in latents; at most `tile_size`.
            progress_bar_cmd: wraps the iterable of steps; `lambda x: x` or None hides the bar.
            num_images_per_prompt: images for each prompt.
            prompt_embeds: conditions from `encode_prompt`, instead of `prompt`.
            negative_prompt_embeds: the same for `negative_prompt`.
            cfg_normalize: give each guided token the norm it has without guidance, as the model's authors do.
            callback: called with a `Step` after every step; returning False stops the run.
            batch_size: images denoised in one pass. Each image is the one it would be alone; bit for bit at 1, to
                rounding above.
            output_type: "pil" for images, "pt" for a tensor `[images, 3, H, W]` in -1..1, "latent" for latents.

        Returns:
            One image for a single prompt and `num_images_per_prompt=1`, otherwise a list; a tensor if asked for.
        """
        scheduler = self.scheduler
        if exponential_shift_mu is not None:
            mu = finite_float("exponential_shift_mu", exponential_shift_mu, -20, 20)
            scheduler = replace(scheduler, mu_line=None, shift=math.exp(mu))
        return self._run(
            prompt=prompt,
            negative_prompt=negative_prompt,
            guidance=Guidance(finite_float("cfg_scale", cfg_scale, 0), normalize=flag("cfg_normalize", cfg_normalize)),
            scheduler=scheduler,
            input_image=input_image,
            denoising_strength=denoising_strength,
            height=height,
            width=width,
            seed=seed,
            rand_device=rand_device,
            num_inference_steps=num_inference_steps,
            tiled=tiled,
            tile_size=tile_size,
            tile_stride=tile_stride,
            progress_bar_cmd=progress_bar_cmd,
            num_images_per_prompt=num_images_per_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            callback=callback,
            batch_size=batch_size,
            output_type=output_type,
            recorded={"exponential_shift_mu": exponential_shift_mu, "cfg_normalize": cfg_normalize},
        )
