"""The tiny tokenizers of the package, and the real ones that the tests rebuild from wheels."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from real_tokenizers import merges_from_ranks, real_qwen_tokenizer, real_tekken_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from diffsynth.tiny.tokenizers import (
    QWEN_SPECIAL_TOKENS,
    TEKKEN_SPECIAL_TOKENS,
    write_qwen_tokenizer,
    write_tekken_tokenizer,
)

QWEN_PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
QWEN_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"

TEXTS = (
    "A red fox, 12 birds & the moon.",
    "  two  spaces,\ta tab\r\n\nand new lines \n",
    "一只猫坐在雪地里，远处有山。",
    "夕焼けの海と灯台、ガラスの器。",
    "mixed 混合 ミックス 🦊 café naïve",
    "",
)

WRITERS: dict[str, Callable[[Path], object]] = {
    "tiny_qwen": write_qwen_tokenizer,
    "tiny_tekken": write_tekken_tokenizer,
    "real_qwen": real_qwen_tokenizer,
    "real_tekken": real_tekken_tokenizer,
}


@pytest.fixture(scope="module")
def folders(qwen_tokenizer: Path, tekken_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    tiny = tmp_path_factory.mktemp("tiny_tokenizers")
    write_qwen_tokenizer(tiny / "qwen")
    write_tekken_tokenizer(tiny / "tekken")
    return {
        "tiny_qwen": tiny / "qwen",
        "tiny_tekken": tiny / "tekken",
        "real_qwen": qwen_tokenizer,
        "real_tekken": tekken_tokenizer,
    }


@pytest.fixture(scope="module")
def load(folders: dict[str, Path]) -> Callable[[str], PreTrainedTokenizerBase]:
    loaded: dict[str, PreTrainedTokenizerBase] = {}

    def get(kind: str) -> PreTrainedTokenizerBase:
        if kind not in loaded:
            loaded[kind] = AutoTokenizer.from_pretrained(folders[kind])
        return loaded[kind]

    return get


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text).input_ids


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back(load: Callable[[str], PreTrainedTokenizerBase], kind: str, text: str) -> None:
    tokenizer = load(kind)
    assert tokenizer.decode(ids(tokenizer, text), skip_special_tokens=True) == text


@pytest.mark.parametrize("kind", ["tiny_qwen", "real_qwen"])
def test_qwen_template_has_34_tokens_before_the_prompt_and_5_after(
    load: Callable[[str], PreTrainedTokenizerBase], kind: str
) -> None:
    tokenizer = load(kind)
    prefix = ids(tokenizer, QWEN_PREFIX)
    assert len(prefix) == 34
    for text in TEXTS:  # the border is a special token or a line break that no prompt joins, so the number always holds
        whole = ids(tokenizer, QWEN_PREFIX + text.lstrip() + QWEN_SUFFIX)
        assert whole[:34] == prefix
        assert tokenizer.decode(whole[34:-5]) == text.lstrip()


@pytest.mark.parametrize("kind", ["tiny_qwen", "real_qwen"])
def test_qwen_adds_nothing_and_pads_at_the_right(load: Callable[[str], PreTrainedTokenizerBase], kind: str) -> None:
    tokenizer = load(kind)
    assert type(tokenizer).__name__ == "Qwen2Tokenizer"
    assert ids(tokenizer, "") == []
    assert tokenizer.bos_token is None
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    batch = tokenizer(["the image", "the"], padding=True)
    assert batch.input_ids[1][-1] == tokenizer.pad_token_id
    assert batch.attention_mask[1][-1] == 0


@pytest.mark.parametrize("kind", ["tiny_tekken", "real_tekken"])
def test_tekken_adds_only_the_begin_token(load: Callable[[str], PreTrainedTokenizerBase], kind: str) -> None:
    tokenizer = load(kind)
    assert type(tokenizer).__name__ == "TokenizersBackend"
    assert ids(tokenizer, "") == [1]
    assert ids(tokenizer, "the image")[0] == 1
    assert ids(tokenizer, "the image")[-1] != tokenizer.eos_token_id
    assert tokenizer.model_max_length == 2048
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 11, 17, 18]) == [
        "<unk>",
        "<s>",
        "</s>",
        "<pad>",
        "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
    ]
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id == 11
    assert ids(tokenizer, "[SYSTEM_PROMPT]") == [1, 17]


def test_real_qwen_has_the_published_numbers(load: Callable[[str], PreTrainedTokenizerBase]) -> None:
    tokenizer = load("real_qwen")
    assert len(tokenizer) == 151665
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|file_sep|>"]
    assert tokenizer.convert_tokens_to_ids(specials) == [151643, 151644, 151645, 151652, 151655, 151664]


def test_real_tekken_has_the_published_numbers(load: Callable[[str], PreTrainedTokenizerBase]) -> None:
    tokenizer = load("real_tekken")
    assert len(tokenizer) == 131072
    assert ids(tokenizer, "a") == [1, 1097]


def test_tiny_tokenizers_are_tiny(load: Callable[[str], PreTrainedTokenizerBase], folders: dict[str, Path]) -> None:
    for kind in ("tiny_qwen", "tiny_tekken"):
        assert len(load(kind)) <= 500
        assert sum(path.stat().st_size for path in folders[kind].iterdir()) < 32_000


def test_tiny_special_tokens_have_their_places(load: Callable[[str], PreTrainedTokenizerBase]) -> None:
    qwen, tekken = load("tiny_qwen"), load("tiny_tekken")
    base = len(qwen) - len(QWEN_SPECIAL_TOKENS)
    assert qwen.convert_tokens_to_ids(list(QWEN_SPECIAL_TOKENS)) == list(range(base, len(qwen)))
    assert tekken.convert_tokens_to_ids(list(TEKKEN_SPECIAL_TOKENS)) == list(range(len(TEKKEN_SPECIAL_TOKENS)))


@pytest.mark.parametrize("kind", WRITERS)
def test_the_folder_has_the_published_files(folders: dict[str, Path], kind: str) -> None:
    expected = {
        "qwen": {"vocab.json", "merges.txt", "tokenizer_config.json"},
        "tekken": {"tokenizer.json", "tokenizer_config.json"},
    }
    assert {path.name for path in folders[kind].iterdir()} == expected[kind.split("_")[1]]


@pytest.mark.parametrize("kind", WRITERS)
def test_saving_and_loading_changes_nothing(
    load: Callable[[str], PreTrainedTokenizerBase], kind: str, tmp_path: Path
) -> None:
    tokenizer = load(kind)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(tokenizer)
    assert len(again) == len(tokenizer)
    assert again.special_tokens_map == tokenizer.special_tokens_map
    for text in (*TEXTS, QWEN_PREFIX):
        assert ids(again, text) == ids(tokenizer, text)


def test_tiny_training_is_deterministic_across_processes(folders: dict[str, Path], tmp_path: Path) -> None:
    script = (
        "from pathlib import Path\n"
        "from diffsynth.tiny.tokenizers import write_qwen_tokenizer, write_tekken_tokenizer\n"
        f"write_qwen_tokenizer(Path({str(tmp_path / 'qwen')!r}))\n"
        f"write_tekken_tokenizer(Path({str(tmp_path / 'tekken')!r}))\n"
    )
    root = Path(__file__).parents[1]
    env = os.environ | {"TOKENIZERS_PARALLELISM": "true", "PYTHONHASHSEED": "7", "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", script], check=True, env=env)
    for kind in ("qwen", "tekken"):
        for path in folders[f"tiny_{kind}"].iterdir():
            assert (tmp_path / kind / path.name).read_bytes() == path.read_bytes()


def test_importing_the_tiny_tokenizers_is_light() -> None:
    script = (
        "import sys, diffsynth.tiny.tokenizers\n"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules), 'heavy import'"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", script], check=True, env=env)


def test_a_complete_folder_is_not_written_again(folders: dict[str, Path]) -> None:
    path = folders["real_qwen"] / "vocab.json"
    before = path.stat().st_mtime_ns
    assert real_qwen_tokenizer(folders["real_qwen"]) == folders["real_qwen"]
    assert path.stat().st_mtime_ns == before


def test_an_incomplete_folder_is_an_error_and_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "qwen"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({}))
    with pytest.raises(OSError):
        real_qwen_tokenizer(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["qwen"]
    assert [path.name for path in folder.iterdir()] == ["vocab.json"]


def test_merges_are_recovered_from_ranks() -> None:
    # "abc" is reached from "ab" + "c": when it is made, "bc" ranks after "ab"
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"ab": 3, b"bc": 4, b"abc": 5}
    assert merges_from_ranks(ranks) == [(b"a", b"b"), (b"b", b"c"), (b"ab", b"c")]
    with pytest.raises(ValueError, match="splits into 3 parts"):
        merges_from_ranks({b"a": 0, b"b": 1, b"c": 2, b"abc": 3})
