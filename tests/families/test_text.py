"""Limits of prompts: nothing is cut silently, nothing is cut early."""

import logging

import pytest
import torch

from diffsynth.pipelines.ernie_image import ErnieImagePipeline
from diffsynth.pipelines.qwen_image import QwenImagePipeline
from diffsynth.runtime.errors import InvalidInputError
from diffsynth.tiny.checkpoint import write_tiny_checkpoint

CASES = [
    pytest.param(QwenImagePipeline, "qwen-image", 1024, id="qwen-image"),
    pytest.param(ErnieImagePipeline, "ernie-image", 2048, id="ernie-image"),
]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    def loaded(pipeline, family):
        folder = tmp_path_factory.mktemp(family) / "model"
        return pipeline.from_folder(write_tiny_checkpoint(family, folder), torch_dtype=torch.float32, device="cpu")

    return loaded


@pytest.mark.parametrize(("pipeline", "family", "limit"), CASES)
def test_a_prompt_is_cut_at_the_limit_with_a_warning_and_not_before(pipeline, family, limit, load, caplog):
    pipe = load(pipeline, family)
    with caplog.at_level(logging.WARNING):
        (short,) = pipe.encode_prompt("x" * 900)
        assert not caplog.records
        (long,) = pipe.encode_prompt("xyz " * limit)
    assert len(short) < limit == len(long)
    assert "cut off" in caplog.text
    assert str(limit) in caplog.text


@pytest.mark.parametrize(("pipeline", "family", "limit"), CASES)
def test_what_stays_of_a_cut_prompt_is_what_a_shorter_prompt_gives(pipeline, family, limit, load):
    pipe = load(pipeline, family)
    (once,), (twice,) = pipe.encode_prompt("xyz " * limit), pipe.encode_prompt("xyz " * limit + "something else")
    assert torch.equal(once, twice)


@pytest.mark.parametrize(("pipeline", "family", "limit"), CASES)
@pytest.mark.parametrize("prompt", [5, None, ["a", 5], [], [[]]])
def test_what_is_no_text_is_refused(pipeline, family, limit, load, prompt):
    with pytest.raises(InvalidInputError, match="prompt="):
        load(pipeline, family).encode_prompt(prompt)
