"""Rebuild the two published tokenizers from vocabularies that PyPI wheels carry, so that tests need no model hub.

* Qwen2 (Qwen-Image): `dashscope` ships the vocabulary as `qwen.tiktoken`.
* Tekken (ERNIE-Image): `mistral_common` ships the vocabulary as `tekken_240911.json`.

Both files list byte strings by rank but no merge rules, which is what the `tokenizers` library runs on. The rules are
recovered by replaying byte pair encoding: when a token of rank `r` is spelled with tokens ranked below `r` only,
exactly two parts remain, and those two are its merge.

The wheels are never imported (that would pull in their dependencies), only their data files are read.
"""

import base64
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

QWEN_ADDED_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
QWEN_SPECIAL_COUNT = 14  # the first 14 are special tokens, the rest are ordinary words that are never split

TEKKEN_SPECIAL_COUNT = 1000
TEKKEN_VOCAB_SIZE = 131072
TEKKEN_NAMED_SPECIALS = {
    **dict(enumerate(("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"))),
    **dict(enumerate(("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]"), start=7)),
    **dict(enumerate(("[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]"), start=13)),
    **dict(enumerate(("[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"), start=18)),
    **dict(enumerate(("[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"), start=32)),
}


def real_qwen_tokenizer(folder: Path) -> Path:
    """Write the Qwen2 tokenizer of Qwen-Image into `folder` and return it; does nothing where it is complete."""
    return _write_once(Path(folder), ("vocab.json", "merges.txt", "tokenizer_config.json"), _write_qwen)


def real_tekken_tokenizer(folder: Path) -> Path:
    """Write the Tekken tokenizer of ERNIE-Image into `folder` and return it; does nothing where it is complete."""
    return _write_once(Path(folder), ("tokenizer.json", "tokenizer_config.json"), _write_tekken)


def _write_qwen(folder: Path) -> None:
    ranks: dict[bytes, int] = {}
    for line in _wheel_file("dashscope", "resources/qwen.tiktoken").read_text().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)

    vocab = {_spell(token): rank for token, rank in ranks.items()}
    merges = [f"{_spell(left)} {_spell(right)}" for left, right in merges_from_ranks(ranks)]
    added = {
        str(len(ranks) + i): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": i < QWEN_SPECIAL_COUNT,
        }
        for i, token in enumerate(QWEN_ADDED_TOKENS)
    }
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(QWEN_ADDED_TOKENS[1:QWEN_SPECIAL_COUNT]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "unk_token": None,
    }
    _write_json(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", config)


def _write_tekken(folder: Path) -> None:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE

    source = json.loads(_wheel_file("mistral_common", "data/tekken_240911.json").read_text(encoding="utf-8"))
    entries = source["vocab"][: TEKKEN_VOCAB_SIZE - TEKKEN_SPECIAL_COUNT]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in entries}

    specials = [TEKKEN_NAMED_SPECIALS.get(i, f"<SPECIAL_{i}>") for i in range(TEKKEN_SPECIAL_COUNT)]
    vocab = {token: i for i, token in enumerate(specials)}
    vocab |= {_spell(token): TEKKEN_SPECIAL_COUNT + rank for token, rank in ranks.items()}
    merges = [(_spell(left), _spell(right)) for left, right in merges_from_ranks(ranks)]

    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(source["config"]["pattern"]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
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
    _write_json(folder / "tokenizer_config.json", config)


def merges_from_ranks(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge rules, in order of priority, of a byte pair encoding that is given as token -> rank."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) < 2:
            continue
        parts = _split_below(token, rank, ranks)
        if len(parts) != 2:
            raise ValueError(f"token {token!r} of rank {rank} splits into {len(parts)} parts; a merge has 2")
        merges.append((parts[0], parts[1]))
    return merges


def _split_below(token: bytes, limit: int, ranks: dict[bytes, int]) -> list[bytes]:
    """Spell `token` by byte pair encoding with the tokens ranked below `limit` only."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, at = min((ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1))
        if rank >= limit:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level BPE files: itself where printable, else from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


_LETTERS = _byte_letters()


def _spell(token: bytes) -> str:
    return "".join(_LETTERS[byte] for byte in token)


def _wheel_file(package: str, path: str) -> Path:
    """A data file inside an installed package, found without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"the tests read {path} of the {package!r} wheel; install the development extra: pip install -e '.[dev]'"
        )
    return Path(spec.origin).parent / path


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def _write_once(folder: Path, names: tuple[str, ...], write: Callable[[Path], None]) -> Path:
    """Fill `folder` by `write` unless it is complete; a rename makes it appear whole, also among parallel workers."""

    def complete() -> bool:
        return all((folder / name).is_file() for name in names)

    if complete():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(draft)
        os.rename(draft, folder)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        if not complete():  # otherwise another worker was faster, and wrote the same
            raise
    return folder
