"""The independent implementation that parity is measured against: diffusers pipelines of toy width.

The models are structurally complete (every kind of layer of the published ones occurs) but thousands of times smaller.
Their weights are random and chosen so that no term is invisible: nothing is zero or one by default, norms have gains,
biases have values, batch-norm statistics are not neutral, and decoded images stay mostly inside the visible range.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FAMILIES = ("qwen_image", "ernie_image")

QWEN_SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
ERNIE_SCHEDULER = {"num_train_timesteps": 1000, "shift": 3.0}

PUBLISHED_VOCAB = {"qwen_image": 152064, "ernie_image": 131072}


def make_oracle(
    family: str, tokenizer_folder: Path, *, seed: int = 0, tiny_vocab: bool = False, num_layers: int = 2
) -> Any:
    """A diffusers pipeline of `family` in fp32 on the CPU, in eval mode, the same for the same arguments.

    `tokenizer_folder` is loaded as it is. The text encoder's vocabulary has the published size, or with `tiny_vocab`
    that of the tokenizer (which makes the saved folder a few megabytes). `num_layers` is the transformer's depth.
    """
    from transformers import AutoTokenizer

    builders: dict[str, Callable[[Any, int, int], Any]] = {"qwen_image": _qwen_image, "ernie_image": _ernie_image}
    if family not in builders:
        raise ValueError(f"unknown family {family!r}; the oracle knows {', '.join(builders)}")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    vocab_size = len(tokenizer) if tiny_vocab else PUBLISHED_VOCAB[family]
    if len(tokenizer) > vocab_size:
        raise ValueError(f"the tokenizer in {tokenizer_folder} has {len(tokenizer)} tokens, more than {vocab_size}")

    with torch.random.fork_rng(devices=[]):  # the caller's random stream is left alone
        torch.manual_seed(seed)
        pipe = builders[family](tokenizer, vocab_size, num_layers)
        randomize(pipe.text_encoder, gain=1.4)
        randomize(pipe.transformer, gain=1.4)
        randomize(pipe.vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def randomize(model: nn.Module, *, gain: float = 1.0) -> None:
    """Draw every parameter and floating-point statistic of `model` from the global generator, and freeze it for use.

    Matrices and kernels scale the size of their input by `gain` (deviation gain / sqrt(fan-in)); with 1.4 a prompt
    moves the latents of a shallow transformer visibly. Scales of norms are near one, biases near zero. Some running
    variances are small, so that the epsilon added to them counts.
    """
    norms = {
        id(parameter)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False)
        if name != "bias"
    }
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) in norms:
                parameter.normal_(1.0, 0.1)
            elif parameter.dim() < 2:
                parameter.normal_(0.0, 0.1)
            elif id(parameter) in embeddings:
                parameter.normal_()
            else:
                parameter.normal_(0.0, gain / math.sqrt(parameter[0].numel()))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0.0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.05, 1.0)
    model.float().eval().requires_grad_(False)


def save_oracle(pipe: Any, folder: Path, *, max_shard_size: int | str | None = None) -> Path:
    """Write `pipe` as a model repository in the published layout and return `folder`.

    With `max_shard_size` (bytes, or a text such as "100KB") the transformer is cut into several files with an index,
    and so is Qwen-Image's text encoder; the other components are single files, as published.
    """
    folder = Path(folder)
    pipe.save_pretrained(folder, safe_serialization=True)
    if max_shard_size is not None:
        sharded = ["transformer", "text_encoder"] if family_of(pipe) == "qwen_image" else ["transformer"]
        for name in sharded:
            shutil.rmtree(folder / name)
            getattr(pipe, name).save_pretrained(folder / name, max_shard_size=max_shard_size)
    # save_pretrained rewrites the tokenizer as one tokenizer.json; repositories carry the files that it was read from
    source = Path(pipe.tokenizer.name_or_path)
    if source.is_dir():
        shutil.rmtree(folder / "tokenizer")
        shutil.copytree(source, folder / "tokenizer")
    return folder


def oracle_images(
    pipe: Any,
    prompts: Sequence[str],
    negative_prompts: Sequence[str] | None = None,
    *,
    height: int,
    width: int,
    steps: int,
    cfg: float,
    seeds: Sequence[int],
) -> Tensor:
    """Images [B, 3, H, W] in [0, 1], fp32, before rounding to bytes; sample i starts from the noise of `seeds[i]`.

    `negative_prompts` are as many as `prompts` (None: one empty text each); they matter only where `cfg` is above 1.
    """
    return _run(pipe, prompts, negative_prompts, height, width, steps, cfg, seeds, output_type="pt")


def oracle_latents(
    pipe: Any,
    prompts: Sequence[str],
    negative_prompts: Sequence[str] | None = None,
    *,
    height: int,
    width: int,
    steps: int,
    cfg: float,
    seeds: Sequence[int],
) -> Tensor:
    """The sampler's last state, fp32, in the shape that the noise is drawn in and still normalised.

    Qwen-Image: [B, 16, H/8, W/8]. ERNIE-Image: [B, 128, H/16, W/16].
    """
    latents = _run(pipe, prompts, negative_prompts, height, width, steps, cfg, seeds, output_type="latent")
    if family_of(pipe) == "qwen_image":
        # [B, rows * columns, channels * 2 * 2] -> [B, channels, rows * 2, columns * 2]
        batch, _, packed = latents.shape
        grid = latents.view(batch, height // 16, width // 16, packed // 4, 2, 2)
        latents = grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, packed // 4, height // 8, width // 8)
    return latents


def family_of(pipe: Any) -> str:
    """The family name of a pipeline that `make_oracle` made."""
    return {"QwenImagePipeline": "qwen_image", "ErnieImagePipeline": "ernie_image"}[type(pipe).__name__]


def _run(
    pipe: Any,
    prompts: Sequence[str],
    negative_prompts: Sequence[str] | None,
    height: int,
    width: int,
    steps: int,
    cfg: float,
    seeds: Sequence[int],
    *,
    output_type: str,
) -> Tensor:
    negatives = [""] * len(prompts) if negative_prompts is None else list(negative_prompts)
    if not len(prompts) == len(negatives) == len(seeds):
        raise ValueError(f"{len(prompts)} prompts, {len(negatives)} negative prompts and {len(seeds)} seeds differ")
    if family_of(pipe) == "qwen_image":
        guidance = {"true_cfg_scale": cfg}
    else:
        guidance = {"guidance_scale": cfg, "use_pe": False}
    with torch.no_grad():
        result = pipe(
            prompt=list(prompts),
            negative_prompt=negatives,
            height=height,
            width=width,
            num_inference_steps=steps,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type=output_type,
            **guidance,
        )
    return result.images.float()


def _qwen_image(tokenizer: Any, vocab_size: int, num_layers: int) -> Any:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = tokenizer.convert_tokens_to_ids
    text_config = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2]},
        "bos_token_id": ids("<|endoftext|>"),
        "eos_token_id": ids("<|im_end|>"),
        "hidden_act": "silu",
    }
    vision_config = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "in_channels": 3,
        "out_hidden_size": 32,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1],
        "hidden_act": "silu",
    }
    text_encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text_config,
            vision_config=vision_config,
            image_token_id=ids("<|image_pad|>"),
            video_token_id=ids("<|video_pad|>"),
            vision_start_token_id=ids("<|vision_start|>"),
            vision_end_token_id=ids("<|vision_end|>"),
            tie_word_embeddings=False,
        )
    )
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=num_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=False,
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True, True],
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**QWEN_SCHEDULER),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def _ernie_image(tokenizer: Any, vocab_size: int, num_layers: int) -> Any:
    from diffusers import (
        AutoencoderKLFlux2,
        ErnieImagePipeline,
        ErnieImageTransformer2DModel,
        FlowMatchEulerDiscreteScheduler,
    )
    from transformers import Mistral3Config, Mistral3Model

    text_config = {
        "model_type": "ministral3",
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 11,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 256,
        },
    }
    vision_config = {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
        "image_size": 28,
        "patch_size": 14,
        "num_channels": 3,
        "hidden_act": "silu",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    }
    text_encoder = Mistral3Model(
        Mistral3Config(
            text_config=text_config,
            vision_config=vision_config,
            image_token_index=10,
            multimodal_projector_bias=False,
            projector_hidden_act="gelu",
            spatial_merge_size=2,
            vision_feature_layer=-1,
        )
    )
    transformer = ErnieImageTransformer2DModel(
        hidden_size=48,
        num_attention_heads=3,
        num_layers=num_layers,
        ffn_hidden_size=96,
        in_channels=128,
        out_channels=128,
        patch_size=1,
        text_in_dim=32,
        rope_theta=256,
        rope_axes_dim=(4, 6, 6),
        eps=1e-6,
        qk_layernorm=True,
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=32,
        norm_num_groups=4,
        sample_size=64,
        batch_norm_eps=1e-4,
    )
    return ErnieImagePipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(**ERNIE_SCHEDULER),
    )
