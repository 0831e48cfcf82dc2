"""How files name the tensors of Qwen-Image: the published layout and those found in the wild."""

from ...weights.keymap import KeyLayout

TRANSFORMER = (
    KeyLayout("diffusers"),
    KeyLayout(
        "ComfyUI",
        prefixes={"model.diffusion_model.": ""},
        # An empty tensor that marks edit models; text-to-image has no use for it.
        ignored=("model.diffusion_model.__index_timestep_zero__",),
    ),
    KeyLayout("ComfyUI without prefix", ignored=("__index_timestep_zero__",)),
)

TEXT_ENCODER = (
    KeyLayout("published", prefixes={"model.": ""}, ignored=("visual.", "lm_head.")),
    KeyLayout("transformers 5", prefixes={"model.language_model.": ""}, ignored=("model.visual.", "lm_head.")),
    KeyLayout(
        "ComfyUI",
        prefixes={"text_encoders.qwen25_7b.transformer.model.": ""},
        ignored=(
            "text_encoders.qwen25_7b.transformer.visual.",
            "text_encoders.qwen25_7b.transformer.lm_head.",
            "text_encoders.qwen25_7b.logit_scale",
        ),
    ),
)

_WAN_PREFIXES = {
    "conv1.": "quant_conv.",
    "conv2.": "post_quant_conv.",
    **{f"{half}.conv1.": f"{half}.conv_in." for half in ("encoder", "decoder")},
    **{f"{half}.head.0.": f"{half}.norm_out." for half in ("encoder", "decoder")},
    **{f"{half}.head.2.": f"{half}.conv_out." for half in ("encoder", "decoder")},
    **{f"{half}.middle.0.": f"{half}.mid_block.resnets.0." for half in ("encoder", "decoder")},
    **{f"{half}.middle.1.": f"{half}.mid_block.attentions.0." for half in ("encoder", "decoder")},
    **{f"{half}.middle.2.": f"{half}.mid_block.resnets.1." for half in ("encoder", "decoder")},
    "encoder.downsamples.": "encoder.down_blocks.",
}
_WAN_INNER = {
    "residual.0.": "norm1.",
    "residual.2.": "conv1.",
    "residual.3.": "norm2.",
    "residual.6.": "conv2.",
    "shortcut.": "conv_shortcut.",
}


def _wan(num_res_blocks: int, levels: int = 4) -> KeyLayout:
    """Original Wan names: the decoder's levels are one flat list there, each its residual blocks and an upsampler."""
    prefixes = dict(_WAN_PREFIXES)
    stride = num_res_blocks + 2
    for level in range(levels):
        for block in range(num_res_blocks + 1):
            prefixes[f"decoder.upsamples.{level * stride + block}."] = f"decoder.up_blocks.{level}.resnets.{block}."
        if level < levels - 1:
            upsampler = level * stride + num_res_blocks + 1
            prefixes[f"decoder.upsamples.{upsampler}."] = f"decoder.up_blocks.{level}.upsamplers.0."
    # The encoder's flat list keeps its numbers: spell them out, so that what follows the number is the inner part.
    del prefixes["encoder.downsamples."]
    for index in range(levels * (num_res_blocks + 1) - 1):
        prefixes[f"encoder.downsamples.{index}."] = f"encoder.down_blocks.{index}."
    return KeyLayout("original Wan", prefixes=prefixes, inner=_WAN_INNER)


def _under(prefix: str, layout: KeyLayout, name: str) -> KeyLayout:
    return KeyLayout(name, {prefix + theirs: ours for theirs, ours in layout.prefixes.items()}, layout.inner)


VAE = (
    KeyLayout("diffusers"),
    _wan(num_res_blocks=2),
    _wan(num_res_blocks=1),  # the tiny test configuration
    _under("vae.", _wan(num_res_blocks=2), "ComfyUI all-in-one"),
)
