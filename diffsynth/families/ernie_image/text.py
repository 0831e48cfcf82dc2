"""The text condition of ERNIE-Image: the hidden states of Ministral 3 before its last layer.

The model reads `hidden_states[-2]`, so the last decoder layer and the final norm play no part, nor do the vision tower
and its projector: none is built, and their weights are never read. Network and tokenizer come from `transformers`.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.errors import InvalidInputError
from ...spec import Shapes

logger = logging.getLogger(__name__)

MAX_TOKENS = 2048
"""Longest prompt the published tokenizer passes on."""

PUBLISHED: dict[str, Any] = {
    "model_type": "ministral3",
    "vocab_size": 131072,
    "hidden_size": 3072,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
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
        "original_max_position_embeddings": 16384,
    },
}
"""The `text_config` of the published checkpoint."""


def parse_config(config: Mapping[str, Any]) -> Any:
    """`config.json` of the text encoder to the config of its decoder."""
    from transformers import Ministral3Config

    if not isinstance(config.get("text_config"), Mapping):
        raise InvalidInputError("config.json of the text encoder has no text_config.")
    return Ministral3Config.from_dict(dict(config["text_config"]))


def infer_config(shapes: Shapes) -> Any:
    """The published config where the embedding has the published shape; a file alone cannot tell head counts."""
    if shapes["embed_tokens.weight"] != (PUBLISHED["vocab_size"], PUBLISHED["hidden_size"]):
        return None
    return parse_config({"text_config": PUBLISHED})


def unread(config: Any) -> tuple[str, ...]:
    """What `hidden_states[-2]` does not depend on."""
    return (f"layers.{config.num_hidden_layers - 1}.", "norm.")


def build(config: Any) -> nn.Module:
    """The decoder up to the input of its last layer, without the final norm."""
    from transformers import Ministral3Model

    shorter = type(config).from_dict(config.to_dict() | {"num_hidden_layers": config.num_hidden_layers - 1})
    model = Ministral3Model(shorter)
    model.norm = nn.Identity()  # type: ignore[assignment]
    return model


def load_tokenizer(folder: str) -> Any:
    """The tokenizer in a local folder."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def encode_prompt(model: nn.Module, tokenizer: Any, prompt: str, device: torch.device) -> Tensor:
    """Condition of one prompt: `[M, hidden_size]`, M <= 2048; an empty prompt is the single token BOS.

    The prompt is run alone and unpadded, so its condition does not depend on its neighbours.
    """
    if not isinstance(prompt, str):
        raise InvalidInputError(f"A prompt must be a string, got {prompt!r}.")
    ids = tokenizer(prompt, add_special_tokens=True, truncation=False)["input_ids"] or [tokenizer.bos_token_id]
    limit = min(tokenizer.model_max_length, MAX_TOKENS)
    if len(ids) > limit:
        logger.warning(
            "The prompt has %d tokens; only the first %d are used, the other %d are cut off.",
            len(ids), limit, len(ids) - limit,
        )  # fmt: skip
    tokens = torch.tensor([ids[:limit]], device=device)
    return model(input_ids=tokens, use_cache=False).last_hidden_state[0]
