"""Numbers and facts of ERNIE-Image."""

from ...sampling.schedule import FlowMatchScheduler
from ...spec import ComponentSpec, FamilySpec, Shapes, parse_dataclass
from . import keys, text
from .transformer import ErnieImageTransformer, TransformerConfig
from .vae import Flux2VAE, VAEConfig

DEFAULT_SIZE = (1024, 1024)
SCHEDULER = FlowMatchScheduler(shift=3.0)
"""Of the base model; the Turbo checkpoint wants a shift of 4.0."""


def _infer_transformer(shapes: Shapes) -> TransformerConfig | None:
    width, in_channels = shapes["x_embedder.proj.weight"][:2]
    (head_dim,) = shapes["layers.0.self_attention.norm_q.weight"]
    if head_dim != TransformerConfig().head_dim:
        return None  # the split of the head over the axes would be a guess
    return TransformerConfig(
        hidden_size=width,
        num_attention_heads=width // head_dim,
        num_layers=len({name.split(".")[1] for name in shapes if name.startswith("layers.")}),
        ffn_hidden_size=shapes["layers.0.mlp.gate_proj.weight"][0],
        in_channels=in_channels,
        out_channels=shapes["final_linear.weight"][0],
        text_in_dim=shapes["text_proj.weight"][1],
    )


def _infer_vae(shapes: Shapes) -> VAEConfig | None:
    channels = tuple(shapes[f"encoder.down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(4))
    if channels != VAEConfig.block_out_channels:
        return None  # the number of norm groups would be a guess
    return VAEConfig(latent_channels=shapes["post_quant_conv.weight"][0])


TRANSFORMER = ComponentSpec(
    name="dit",
    title="transformer",
    folder="transformer",
    pattern="transformer/diffusion_pytorch_model*.safetensors",
    class_names=("ErnieImageTransformer2DModel",),
    parse_config=lambda config: parse_dataclass(
        TransformerConfig, config, required={"patch_size": 1, "qk_layernorm": True}
    ),
    infer_config=_infer_transformer,
    build=ErnieImageTransformer,
    layouts=keys.TRANSFORMER,
    marker="layers.0.adaLN_sa_ln.weight",
    blocks="layers",
    timestep_only=("time_embedding.*", "adaLN_modulation.*", "final_norm.*"),
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    tiny={
        "_class_name": "ErnieImageTransformer2DModel",
        "hidden_size": 48,
        "num_attention_heads": 3,
        "num_layers": 2,
        "ffn_hidden_size": 96,
        "in_channels": 128,
        "out_channels": 128,
        "patch_size": 1,
        "text_in_dim": 32,
        "rope_theta": 256,
        "rope_axes_dim": [4, 6, 6],
        "eps": 1e-6,
        "qk_layernorm": True,
    },
)

TEXT_ENCODER = ComponentSpec(
    name="text_encoder",
    title="text encoder",
    folder="text_encoder",
    pattern="text_encoder/model*.safetensors",
    class_names=("Mistral3Model", "Mistral3ForConditionalGeneration"),
    parse_config=text.parse_config,
    infer_config=text.infer_config,
    build=text.build,
    layouts=keys.TEXT_ENCODER,
    marker="layers.0.self_attn.q_proj.weight",
    unread=text.unread,
    blocks="layers",
    tiny={
        "architectures": ["Mistral3Model"],
        "model_type": "mistral3",
        "text_config": {
            **text.PUBLISHED,
            "vocab_size": 499,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 4096,
            "rope_parameters": {**text.PUBLISHED["rope_parameters"], "original_max_position_embeddings": 256},
        },
        "vision_config": {
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
        },
        "image_token_index": 10,
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
    },
)

VAE = ComponentSpec(
    name="vae",
    title="autoencoder (VAE)",
    folder="vae",
    pattern="vae/diffusion_pytorch_model.safetensors",
    class_names=("AutoencoderKLFlux2",),
    parse_config=lambda config: parse_dataclass(
        VAEConfig, config, required={"patch_size": [2, 2], "mid_block_add_attention": True}
    ),
    infer_config=_infer_vae,
    build=Flux2VAE,
    layouts=keys.VAE,
    marker="bn.running_mean",
    tiny={
        "_class_name": "AutoencoderKLFlux2",
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [8, 8, 16, 16],
        "layers_per_block": 1,
        "latent_channels": 32,
        "norm_num_groups": 4,
        "sample_size": 64,
        "batch_norm_eps": 1e-4,
    },
)

SPEC = FamilySpec(
    name="ernie-image",
    title="ERNIE-Image",
    pipeline="diffsynth.pipelines.ernie_image:ErnieImagePipeline",
    model_ids=(
        "baidu/ERNIE-Image",
        "PaddlePaddle/ERNIE-Image",
        "baidu/ERNIE-Image-Turbo",
        "PaddlePaddle/ERNIE-Image-Turbo",
    ),
    model_index_classes=("ErnieImagePipeline",),
    components=(TRANSFORMER, TEXT_ENCODER, VAE),
    scheduler=SCHEDULER,
    tiny_extra={
        "model_index.json": {
            "_class_name": "ErnieImagePipeline",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "Mistral3Model"],
            "tokenizer": ["transformers", "TokenizersBackend"],
            "transformer": ["diffusers", "ErnieImageTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKLFlux2"],
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 3.0,
            "use_dynamic_shifting": False,
        },
    },
)
