"""How files name the tensors of ERNIE-Image: the published layout and those found in the wild."""

from ...weights.keymap import KeyLayout

TRANSFORMER = (
    KeyLayout("diffusers"),
    KeyLayout("ComfyUI", prefixes={"model.diffusion_model.": ""}),
)

TEXT_ENCODER = (
    KeyLayout(
        "published",
        prefixes={"language_model.model.": ""},
        ignored=("vision_tower.", "multi_modal_projector.", "language_model.lm_head."),
    ),
    KeyLayout(
        "transformers 5",
        prefixes={"language_model.": ""},
        ignored=("vision_tower.", "multi_modal_projector.", "lm_head."),
    ),
    KeyLayout(
        "transformers 5 with head",
        prefixes={"model.language_model.": ""},
        ignored=("model.vision_tower.", "model.multi_modal_projector.", "lm_head."),
    ),
    KeyLayout("bare decoder", prefixes={"model.": ""}, ignored=("lm_head.",)),
    KeyLayout(
        "ComfyUI",
        prefixes={"text_encoders.ministral3_3b.transformer.model.": ""},
        ignored=("text_encoders.ministral3_3b.transformer.lm_head.", "text_encoders.ministral3_3b.logit_scale"),
    ),
)

_LEVELS = 4


def _ldm(prefix: str = "") -> KeyLayout:
    """Names of the original latent-diffusion code, whose decoder counts its levels from the pixels."""
    prefixes = {
        "encoder.quant_conv.": "quant_conv.",
        "decoder.post_quant_conv.": "post_quant_conv.",
        "bn.": "bn.",
    }
    for half in ("encoder", "decoder"):
        prefixes[f"{half}.conv_in."] = f"{half}.conv_in."
        prefixes[f"{half}.conv_out."] = f"{half}.conv_out."
        prefixes[f"{half}.norm_out."] = f"{half}.conv_norm_out."
        prefixes[f"{half}.mid.block_1."] = f"{half}.mid_block.resnets.0."
        prefixes[f"{half}.mid.block_2."] = f"{half}.mid_block.resnets.1."
        prefixes[f"{half}.mid.attn_1."] = f"{half}.mid_block.attentions.0."
    for level in range(_LEVELS):
        mirrored = _LEVELS - 1 - level
        prefixes[f"encoder.down.{level}.downsample."] = f"encoder.down_blocks.{level}.downsamplers.0."
        prefixes[f"decoder.up.{mirrored}.upsample."] = f"decoder.up_blocks.{level}.upsamplers.0."
        for block in range(3):
            prefixes[f"encoder.down.{level}.block.{block}."] = f"encoder.down_blocks.{level}.resnets.{block}."
            prefixes[f"decoder.up.{mirrored}.block.{block}."] = f"decoder.up_blocks.{level}.resnets.{block}."
    inner = {
        "nin_shortcut.": "conv_shortcut.",
        "norm.": "group_norm.",
        "q.": "to_q.",
        "k.": "to_k.",
        "v.": "to_v.",
        "proj_out.": "to_out.0.",
    }
    name = "original LDM" if not prefix else "ComfyUI all-in-one"
    return KeyLayout(name, {prefix + theirs: ours for theirs, ours in prefixes.items()}, inner, squeezed=True)


VAE = (KeyLayout("diffusers"), _ldm(), _ldm("vae."))
