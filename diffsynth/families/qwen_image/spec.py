"""Numbers and facts of Qwen-Image."""

from collections.abc import Mapping
from typing import Any

from ...sampling.schedule import FlowMatchScheduler
from ...spec import ComponentSpec, FamilySpec, Shapes, parse_dataclass
from . import keys, text
from .transformer import QwenImageTransformer, TransformerConfig
from .vae import QwenImageVAE, VAEConfig

DEFAULT_SIZE = (1328, 1328)

SCHEDULER = FlowMatchScheduler(mu_line=((256, 0.5), (8192, 0.9)), terminal=0.02)
"""As the published `scheduler_config.json` states it."""

TINY_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
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


def _parse_transformer(config: Mapping[str, Any]) -> TransformerConfig:
    unsupported = {"guidance_embeds": False, "use_additional_t_cond": False, "use_layer3d_rope": False}
    return parse_dataclass(TransformerConfig, config, required=unsupported)


def _infer_transformer(shapes: Shapes) -> TransformerConfig | None:
    width, in_channels = shapes["img_in.weight"]
    (head_dim,) = shapes["transformer_blocks.0.attn.norm_q.weight"]
    if head_dim != TransformerConfig.attention_head_dim:
        return None  # the split of the head over the axes would be a guess
    return TransformerConfig(
        in_channels=in_channels,
        out_channels=in_channels // TransformerConfig.patch_size**2,
        num_layers=_count(shapes, "transformer_blocks."),
        num_attention_heads=width // head_dim,
        joint_attention_dim=shapes["txt_in.weight"][1],
    )


def _infer_vae(shapes: Shapes) -> VAEConfig | None:
    z_dim = shapes["post_quant_conv.weight"][0]
    if z_dim != VAEConfig.z_dim:
        return None  # the latent statistics belong to 16 channels
    resnets = {name.split(".")[4] for name in shapes if name.startswith("decoder.up_blocks.0.resnets.")}
    base_dim, input_channels = shapes["encoder.conv_in.weight"][:2]
    return VAEConfig(base_dim=base_dim, input_channels=input_channels, num_res_blocks=len(resnets) - 1)


def _count(shapes: Shapes, prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})


TRANSFORMER = ComponentSpec(
    name="dit",
    title="transformer",
    folder="transformer",
    pattern="transformer/diffusion_pytorch_model*.safetensors",
    class_names=("QwenImageTransformer2DModel",),
    parse_config=_parse_transformer,
    infer_config=_infer_transformer,
    build=QwenImageTransformer,
    layouts=keys.TRANSFORMER,
    marker="transformer_blocks.0.attn.add_q_proj.weight",
    blocks="transformer_blocks",
    timestep_only=(
        "time_text_embed.*", "transformer_blocks.*.img_mod.*", "transformer_blocks.*.txt_mod.*", "norm_out.*",
    ),
    lora_targets=(
        "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out",
        "img_mlp.net.2", "img_mod.1", "txt_mlp.net.2", "txt_mod.1",
    ),
    tiny={
        "_class_name": "QwenImageTransformer2DModel",
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": [4, 6, 6],
        "guidance_embeds": False,
    },
)  # fmt: skip

TEXT_ENCODER = ComponentSpec(
    name="text_encoder",
    title="text encoder",
    folder="text_encoder",
    pattern="text_encoder/model*.safetensors",
    class_names=("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLModel"),
    parse_config=text.parse_config,
    infer_config=text.infer_config,
    build=text.build,
    layouts=keys.TEXT_ENCODER,
    marker="layers.0.self_attn.q_proj.bias",
    blocks="layers",
    tiny={
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "text_config": {
            **text.PUBLISHED,
            "model_type": "qwen2_5_vl_text",
            "vocab_size": 488,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2]},
            "bos_token_id": 480,
            "eos_token_id": 482,
        },
        "vision_config": {
            "model_type": "qwen2_5_vl",
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
        },
        "tie_word_embeddings": False,
    },
)

VAE = ComponentSpec(
    name="vae",
    title="autoencoder (VAE)",
    folder="vae",
    pattern="vae/diffusion_pytorch_model.safetensors",
    class_names=("AutoencoderKLQwenImage", "AutoencoderKLWan"),
    parse_config=lambda config: parse_dataclass(
        VAEConfig, config, required={"attn_scales": [], "is_residual": False, "input_channels": 3}
    ),
    infer_config=_infer_vae,
    build=QwenImageVAE,
    layouts=keys.VAE,
    marker="encoder.mid_block.attentions.0.to_qkv.weight",
    tiny={
        "_class_name": "AutoencoderKLQwenImage",
        "base_dim": 8,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 1,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
        "dropout": 0.0,
        "latents_mean": list(VAEConfig.latents_mean),
        "latents_std": list(VAEConfig.latents_std),
    },
)

SPEC = FamilySpec(
    name="qwen-image",
    title="Qwen-Image",
    pipeline="diffsynth.pipelines.qwen_image:QwenImagePipeline",
    model_ids=("Qwen/Qwen-Image", "Qwen/Qwen-Image-2512"),
    model_index_classes=("QwenImagePipeline", "QwenImageImg2ImgPipeline"),
    components=(TRANSFORMER, TEXT_ENCODER, VAE),
    scheduler=SCHEDULER,
    tiny_extra={
        "model_index.json": {
            "_class_name": "QwenImagePipeline",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
            "tokenizer": ["transformers", "Qwen2Tokenizer"],
            "transformer": ["diffusers", "QwenImageTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKLQwenImage"],
        },
        "scheduler/scheduler_config.json": TINY_SCHEDULER,
    },
)
