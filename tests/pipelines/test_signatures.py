"""The public signatures: names, order and defaults that users' code relies on."""

import inspect

import pytest
import torch
from tqdm import tqdm

from diffsynth.pipelines import ernie_image, qwen_image
from diffsynth.pipelines.ernie_image import ErnieImagePipeline
from diffsynth.pipelines.qwen_image import ModelConfig, QwenImagePipeline
from diffsynth.tiny.checkpoint import write_tiny_checkpoint

QWEN_CALL = {
    "prompt": "",
    "negative_prompt": "",
    "cfg_scale": 1.0,
    "input_image": None,
    "denoising_strength": 1.0,
    "height": 1328,
    "width": 1328,
    "seed": None,
    "rand_device": "cpu",
    "num_inference_steps": 30,
    "exponential_shift_mu": None,
    "tiled": False,
    "tile_size": 128,
    "tile_stride": 64,
    "progress_bar_cmd": tqdm,
}
ERNIE_CALL = {
    "prompt": "",
    "negative_prompt": "",
    "cfg_scale": 4.0,
    "height": 1024,
    "width": 1024,
    "seed": None,
    "rand_device": "cuda",
    "num_inference_steps": 50,
    "sigma_shift": None,
    "progress_bar_cmd": tqdm,
}
LOAD = ["torch_dtype", "device", "model_configs", "tokenizer_config"]


@pytest.mark.parametrize(("pipeline", "expected"), [(QwenImagePipeline, QWEN_CALL), (ErnieImagePipeline, ERNIE_CALL)])
def test_documented_parameters_come_first_in_order_with_their_defaults(pipeline, expected):
    parameters = [p for p in inspect.signature(pipeline.__call__).parameters.values() if p.name != "self"]
    positional = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(positional.items()) == list(expected.items())
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[len(positional) :])


@pytest.mark.parametrize(
    ("pipeline", "names"),
    [(QwenImagePipeline, [*LOAD, "processor_config", "vram_limit"]), (ErnieImagePipeline, [*LOAD, "vram_limit"])],
)
def test_from_pretrained_takes_the_documented_parameters(pipeline, names):
    parameters = inspect.signature(pipeline.from_pretrained).parameters
    assert [name for name in parameters if parameters[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD] == names
    assert parameters["torch_dtype"].default == torch.bfloat16


def test_both_modules_export_model_config():
    assert qwen_image.ModelConfig is ernie_image.ModelConfig is ModelConfig


@pytest.mark.parametrize(
    ("pipeline", "family"), [(QwenImagePipeline, "qwen-image"), (ErnieImagePipeline, "ernie-image")]
)
def test_components_have_their_documented_names_and_take_published_keys(pipeline, family, tmp_path):
    pipe = pipeline.from_folder(write_tiny_checkpoint(family, tmp_path / "model"), device="cpu")
    assert all(hasattr(pipe, name) for name in ("dit", "text_encoder", "vae", "tokenizer", "scheduler"))
    state = {name: torch.zeros_like(tensor) for name, tensor in pipe.dit.state_dict().items()}
    pipe.dit.load_state_dict(state)
    assert not any(parameter.any() for parameter in pipe.dit.parameters())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        pipe.dit.load_state_dict({**state, "not.a.published.key": torch.zeros(1)})
