"""The text condition of Qwen-Image: Qwen2.5-VL's language model, its last hidden state.

The vision tower and the language-model head of the checkpoint play no part in text-to-image: they are not built, and
their weights are never read. Network and tokenizer come from `transformers`.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.errors import InvalidInputError
from ...spec import Shapes

logger = logging.getLogger(__name__)

PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
PREFIX_TOKENS = 34
"""Tokens of `PREFIX`: they condition the others and are then dropped."""
MAX_TOKENS = 1024
"""Longest condition the model was used with."""

PUBLISHED: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]},
    "hidden_act": "silu",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
"""The `text_config` of the published checkpoint."""


def parse_config(config: Mapping[str, Any]) -> Any:
    """`config.json` of the text encoder to the config of its language model."""
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig.from_dict(dict(config)).text_config


def infer_config(shapes: Shapes) -> Any:
    """The published config where the embedding has the published shape; a file alone cannot tell head counts."""
    if shapes["embed_tokens.weight"] != (PUBLISHED["vocab_size"], PUBLISHED["hidden_size"]):
        return None
    return parse_config({"text_config": PUBLISHED})


def build(config: Any) -> nn.Module:
    """The language model without its head."""
    from transformers import Qwen2_5_VLTextModel

    return Qwen2_5_VLTextModel(config)


def load_tokenizer(folder: str) -> Any:
    """The tokenizer in a local folder."""
    from transformers import Qwen2Tokenizer

    return Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)


def encode_prompt(model: nn.Module, tokenizer: Any, prompt: str, device: torch.device) -> Tensor:
    """Condition of one prompt: `[M, hidden_size]`, M <= 1024.

    The prompt is run alone and unpadded, so its condition does not depend on its neighbours.
    """
    if not isinstance(prompt, str):
        raise InvalidInputError(f"A prompt must be a string, got {prompt!r}.")
    ids = tokenizer(PREFIX + prompt + SUFFIX)["input_ids"]
    limit = PREFIX_TOKENS + MAX_TOKENS
    if len(ids) > limit:
        logger.warning(
            "The prompt has %d tokens; only the first %d are used, the other %d are cut off.",
            len(ids) - PREFIX_TOKENS, MAX_TOKENS, len(ids) - limit,
        )  # fmt: skip
    tokens = torch.tensor([ids[:limit]], device=device)
    return model(input_ids=tokens, use_cache=False).last_hidden_state[0, PREFIX_TOKENS:]
