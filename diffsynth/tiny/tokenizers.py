"""Tiny self-contained tokenizers, for checkpoints that fit in a repository.

Both are byte-level BPE tokenizers of a few hundred tokens, trained on the text below. They read any text, use the file
layout and the special tokens of the published tokenizers, and load through `transformers.AutoTokenizer`; only their
vocabularies are small. Training is deterministic: the same files come out every time.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

VOCAB_SIZE = 480
"""Tokens learned from text, the 256 single bytes included; special tokens come on top."""

QWEN_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Numbered upwards from the base vocabulary, in this order."""

TEKKEN_SPECIAL_TOKENS = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
)
"""Numbered from 0; the base vocabulary follows."""

# Qwen-Image drops the tokens of a fixed instruction from its text condition, by their number in the published
# tokenizer. There every word of the instruction is one token, so it must be one here too: these words are repeated in
# training until nothing else can be more frequent.
_INSTRUCTION = (
    "system\n",
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:",
    "user\n",
    "assistant\n",
)
_INSTRUCTION_WEIGHT = 100

_TEXT = (
    "A red fox sleeps under a tall tree.",
    "The small boat on the blue lake at night, with one yellow light.",
    "A photo of two cats and a dog in the snow.",
    "An old house by the sea, painted in water colors.",
    "A green apple on a white table, in soft morning light.",
    "一只红色的狐狸在树下睡觉。",
    "夜晚的湖上有一只小船。",
    "雪地里有两只猫和一只狗。",
    "白色的桌子上有一个绿色的苹果。",
    "赤いきつねが木の下で眠っている。",
    "夜の湖に小さな船が浮かんでいる。",
    "雪の中に二匹の猫と一匹の犬がいる。",
    "白いテーブルの上に緑のりんごがある。",
)


def write_qwen_tokenizer(folder: Path) -> None:
    """Write a tiny tokenizer of Qwen-Image's kind into `folder`: vocab.json, merges.txt and tokenizer_config.json.

    It loads as `Qwen2Tokenizer`: no token is added at either end, `<|endoftext|>` pads and `<|im_end|>` ends a text.
    The system instruction of Qwen-Image takes as many tokens as in the published tokenizer.
    """
    from transformers import Qwen2Tokenizer

    # The class brings its own word splitting, so the merges are learned under the same.
    vocab, merges = _train(Qwen2Tokenizer().backend_tokenizer.pre_tokenizer)
    added = {
        str(len(vocab) + i): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for i, token in enumerate(QWEN_SPECIAL_TOKENS)
    }
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(QWEN_SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "unk_token": None,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", config)


def write_tekken_tokenizer(folder: Path) -> None:
    """Write a tiny tokenizer of ERNIE-Image's kind (Tekken) into `folder`: tokenizer.json and tokenizer_config.json.

    It loads as `TokenizersBackend`: `<s>` is put before every text, nothing after it, and `<pad>` pads.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    learned, merges = _train(splitter)
    vocab = {token: i for i, token in enumerate(TEKKEN_SPECIAL_TOKENS)}
    vocab |= {token: len(TEKKEN_SPECIAL_TOKENS) + i for token, i in learned.items()}

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in TEKKEN_SPECIAL_TOKENS])
    config = {
        "tokenizer_class": "TokenizersBackend",
        "backend": "tokenizers",
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "model_max_length": 2048,
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", config)


def _train(splitter: "PreTokenizer") -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Learn byte pairs from the text above, words split by `splitter`: token -> id, and the merges in their order."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([*_TEXT, *_INSTRUCTION * _INSTRUCTION_WEIGHT], trainer)
    return _vocab_and_merges(tokenizer)


def _vocab_and_merges(tokenizer: "Tokenizer") -> tuple[dict[str, int], list[tuple[str, str]]]:
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    vocab = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    return vocab, [(left, right) for left, right in model["merges"]]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
