"""What people and machines get wrong, end to end: one typed error each, that names the value."""

import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from diffsynth.cli import main
from diffsynth.pipelines.qwen_image import QwenImagePipeline
from diffsynth.runtime.errors import CorruptFileError, InvalidInputError
from diffsynth.tiny.checkpoint import write_tiny_checkpoint

SMALL = {"height": 32, "width": 32, "num_inference_steps": 1, "progress_bar_cmd": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint("qwen-image", tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def pipe(folder):
    return QwenImagePipeline.from_folder(folder, torch_dtype=torch.float32, device="cpu")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_a_config_with_more_layers_than_tensors_is_refused_before_anything_is_built(copy):
    path = copy / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": 10**9}))
    with pytest.raises(InvalidInputError, match="num_layers = 1000000000"):
        QwenImagePipeline.from_folder(copy, device="cpu")


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00"])
def test_damaged_tokenizer_files_are_refused(copy, name, content):
    (copy / "tokenizer" / name).write_bytes(content)
    with pytest.raises(CorruptFileError, match="ownload"):
        QwenImagePipeline.from_folder(copy, device="cpu")


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_devices_this_machine_lacks_are_refused(folder, device):
    with pytest.raises(InvalidInputError, match=f"device='{device}'"):
        QwenImagePipeline.from_folder(folder, device=device)
    with pytest.raises(InvalidInputError, match=f"offload_device='{device}'"):
        QwenImagePipeline.from_folder(folder, device="cpu", offload_device=device)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "\ud800"}, "half of a surrogate"),
        ({"prompt": "a", "height": 10**9}, "height=1000000000"),
        ({"prompt": "a", "height": 10**400}, "height=1000"),
        ({"prompt": "a", "cfg_scale": 10**400}, "cfg_scale=1000"),
        ({"prompt": "a", "seed": 2**64}, "seed=18446744073709551616"),
        ({"prompt": "a", "seed": [1, 2]}, "seed has 2 entries for 1 images"),
        ({"prompt": "a", "tiled": "no"}, "tiled='no'"),
        ({"prompt": "a", "cfg_normalize": "no"}, "cfg_normalize='no'"),
        ({"prompt": "a", "input_image": "a\0b"}, "NUL"),
        ({"prompt": "a", "progress_bar_cmd": lambda steps: list(steps)[:0]}, "0 of 1 steps"),
        ({"prompt_embeds": []}, "prompt_embeds must be"),
        ({"prompt_embeds": 5}, "prompt_embeds must be"),
        ({"prompt_embeds": torch.zeros(4, 7)}, r"\[4, 7\] do not fit"),
        ({"prompt_embeds": torch.zeros(4, 32).long()}, "prompt_embeds must be"),
        ({"prompt_embeds": torch.full((4, 32), float("nan"))}, "prompt_embeds must be"),
        ({"prompt": "a", "negative_prompt_embeds": []}, "negative_prompt_embeds must be"),
    ],
)
def test_values_that_cannot_be_meant_are_named(pipe, arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        pipe(**{**SMALL, **arguments})


def test_numbers_of_numpy_and_the_largest_seed_are_taken(pipe):
    image = pipe("a", **{**SMALL, "height": np.int64(32), "seed": np.int64(3), "cfg_scale": np.float32(2)})
    assert image.size == (32, 32)
    assert pipe("a", **SMALL, seed=2**64 - 1, negative_prompt=None).size == (32, 32)


def test_a_noise_device_this_machine_lacks_falls_back_to_the_cpu(pipe):
    noise = [np.asarray(pipe("a", **SMALL, seed=1, rand_device=device)) for device in ("cpu", "cuda", "mps")]
    if not torch.cuda.is_available():
        assert (noise[0] == noise[1]).all()
    assert (noise[0] == noise[2]).all()


def test_two_names_of_one_output_file_are_refused_before_loading(tmp_path):
    lines = [
        {"prompt": "a", "out": f"{tmp_path}/q.png"},
        {"prompt": "b", "out": f"{tmp_path}/../{tmp_path.name}/q.png"},
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, lines)))
    result = CliRunner().invoke(main, ["generate", "--prompts", str(prompts), "--model", str(tmp_path / "absent")])
    assert result.exit_code == 2
    assert "q.png" in result.output
    assert not (tmp_path / "q.png").exists()


def test_an_over_long_name_gives_a_message_and_no_traceback():
    result = CliRunner().invoke(main, ["inspect", "x" * 5000])
    assert result.exit_code in (1, 2)
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_an_escape_in_a_file_name_does_not_reach_the_terminal(folder, tmp_path):
    path = tmp_path / "\x1b[31mred.safetensors"
    shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors", path)
    assert "\x1b" not in CliRunner().invoke(main, ["inspect", str(path)]).output


def test_a_limit_without_a_place_to_rest_warns(folder, caplog):
    QwenImagePipeline.from_folder(folder, device="cpu", vram_limit=1)
    assert "vram_limit=1 has no effect" in caplog.text
    caplog.clear()
    QwenImagePipeline.from_folder(folder, device="cpu", vram_limit=1, offload_device="cpu")
    assert "no effect" not in caplog.text
