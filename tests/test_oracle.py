"""The independent implementation itself: it runs, sees all its weights, and saves folders in the published layout."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import FAMILIES, make_oracle, oracle_images, oracle_latents, save_oracle
from safetensors import safe_open

from diffsynth.tiny.tokenizers import write_qwen_tokenizer, write_tekken_tokenizer

Oracles = Callable[[str], tuple[Any, Path]]

PROMPTS = ["A cat", "一只猫坐在雪地里，远处有山。", "夕焼けの海と灯台、そして空を渡る長い長い鳥の列。"]
NEGATIVES = [" ", "blurry, low quality", "模糊"]
RUN: dict[str, Any] = {"height": 64, "width": 96, "steps": 2, "cfg": 4.0, "seeds": [1, 2, 3]}

TOKENIZER_FILES = {
    "qwen_image": {"vocab.json", "merges.txt", "tokenizer_config.json"},
    "ernie_image": {"tokenizer.json", "tokenizer_config.json"},
}
TEXT_ENCODER_PREFIXES = {
    "qwen_image": ("model.", "visual.", "lm_head.weight"),
    "ernie_image": ("language_model.model.", "vision_tower.", "multi_modal_projector."),
}
TEXT_ENCODER_SAMPLE = {
    "qwen_image": "model.layers.1.self_attn.q_proj.bias",
    "ernie_image": "language_model.model.layers.2.self_attn.q_proj.weight",
}
# What changes no text-to-image result: image towers, the way into the latent space, the language head, layers that only
# feed a text stream which nobody reads any more, what a single frame leaves of the video autoencoder, and a bias that
# adds the same to all logits of a softmax.
UNUSED_BY_DESIGN = {
    "qwen_image": (
        "text_encoder.model.visual.",
        "text_encoder.lm_head.",
        "transformer.transformer_blocks.1.attn.add_q_proj.",
        "transformer.transformer_blocks.1.attn.norm_added_q.",
        "transformer.transformer_blocks.1.attn.to_add_out.",
        "transformer.transformer_blocks.1.txt_mlp.",
        "vae.encoder.",
        "vae.quant_conv.",
        "vae.decoder.up_blocks.0.upsamplers.0.time_conv.",
        "vae.decoder.up_blocks.1.upsamplers.0.time_conv.",
    ),
    "ernie_image": (
        "text_encoder.vision_tower.",
        "text_encoder.multi_modal_projector.",
        "text_encoder.language_model.layers.2.",
        "text_encoder.language_model.norm.",
        "vae.encoder.",
        "vae.quant_conv.",
        "vae.decoder.mid_block.attentions.0.to_k.bias",
    ),
}


def tensor_keys(folder: Path) -> list[str]:
    keys: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            keys.extend(file.keys())
    return keys


def file_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def tiny_oracle(family: str, folder: Path, **options: Any) -> Any:
    {"qwen_image": write_qwen_tokenizer, "ernie_image": write_tekken_tokenizer}[family](folder)
    return make_oracle(family, folder, tiny_vocab=True, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_finite_and_differ(oracle_folders: Oracles, family: str) -> None:
    pipe, _ = oracle_folders(family)
    images = oracle_images(pipe, PROMPTS, NEGATIVES, **RUN)
    assert images.shape == (3, 3, 64, 96)
    assert images.dtype == torch.float32
    assert images.isfinite().all()
    assert images.min() >= 0
    assert images.max() <= 1
    assert ((images <= 0) | (images >= 1)).float().mean() < 0.1  # the clamp hides little
    assert images.std(dim=(1, 2, 3)).min() > 0.05
    assert (images[0] - images[1]).abs().mean() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_have_the_shape_of_the_noise(oracle_folders: Oracles, family: str) -> None:
    pipe, _ = oracle_folders(family)
    latents = oracle_latents(pipe, PROMPTS, NEGATIVES, **RUN)
    assert latents.shape == {"qwen_image": (3, 16, 8, 12), "ernie_image": (3, 128, 4, 6)}[family]
    # Decoding what is returned gives the image of the same request, so the layout is right.
    if family == "qwen_image":
        mean = torch.tensor(pipe.vae.config.latents_mean).view(1, 16, 1, 1, 1)
        std = torch.tensor(pipe.vae.config.latents_std).view(1, 16, 1, 1, 1)
        decoded = pipe.vae.decode(latents.unsqueeze(2) * std + mean).sample[:, :, 0]
    else:
        bn = pipe.vae.bn
        patches = latents * (bn.running_var.view(1, -1, 1, 1) + 1e-5).sqrt() + bn.running_mean.view(1, -1, 1, 1)
        decoded = pipe.vae.decode(torch.nn.functional.pixel_shuffle(patches, 2)).sample
    images = oracle_images(pipe, PROMPTS, NEGATIVES, **RUN)
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_does_not_depend_on_its_batch(oracle_folders: Oracles, family: str) -> None:
    pipe, _ = oracle_folders(family)
    together = oracle_latents(pipe, PROMPTS, NEGATIVES, **RUN)
    for i, (prompt, negative, seed) in enumerate(zip(PROMPTS, NEGATIVES, RUN["seeds"], strict=True)):
        alone = oracle_latents(pipe, [prompt], [negative], **RUN | {"seeds": [seed]})
        torch.testing.assert_close(alone[0], together[i], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_negative_prompt_guidance_and_seed_all_count(oracle_folders: Oracles, family: str) -> None:
    pipe, _ = oracle_folders(family)
    one = RUN | {"seeds": [1]}
    base = oracle_latents(pipe, ["A cat"], [" "], **one)
    others = {
        "prompt": oracle_latents(pipe, ["A dog"], [" "], **one),
        "negative prompt": oracle_latents(pipe, ["A cat"], ["blurry"], **one),
        "guidance": oracle_latents(pipe, ["A cat"], [" "], **one | {"cfg": 2.0}),
        "steps": oracle_latents(pipe, ["A cat"], [" "], **one | {"steps": 3}),
        "seed": oracle_latents(pipe, ["A cat"], [" "], **one | {"seeds": [2]}),
    }
    for name, latents in others.items():
        assert (latents - base).abs().max() > 0.01, f"{name} hardly counts"
    assert torch.equal(oracle_latents(pipe, ["A cat"], [" "], **one), base)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_weight_is_invisible(family: str, tmp_path: Path) -> None:
    """A wrong or missing weight must show: every one that a run should read changes its images."""
    pipe = tiny_oracle(family, tmp_path)

    def run() -> torch.Tensor:
        return oracle_images(pipe, [PROMPTS[1]], None, height=32, width=32, steps=2, cfg=1.0, seeds=[0])

    base = run()
    invisible, needless = [], []
    for component in ("text_encoder", "transformer", "vae"):
        model = getattr(pipe, component)
        terms = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if "running" in n)]
        for name, tensor in terms:
            path = f"{component}.{name}"
            unused = path.startswith(UNUSED_BY_DESIGN[family])
            if unused and ("vision_tower" in path or "visual" in path or "encoder." in name):
                continue  # whole networks that are not run at all
            kept = tensor.clone()
            tensor.copy_(torch.ones_like(tensor) if "norm" in name and "bias" not in name else torch.zeros_like(tensor))
            change = (run() - base).abs().max().item()
            tensor.copy_(kept)
            if unused and change > 1e-5:  # rounding
                needless.append(path)
            elif not unused and change < 1e-4:
                invisible.append((path, change))
    assert not invisible
    assert not needless
    assert torch.equal(run(), base)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_arguments_make_the_same_weights(family: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = tiny_oracle(family, tmp_path / "tokenizer")
    assert torch.equal(torch.get_rng_state(), state)  # and the caller's random stream is untouched
    torch.manual_seed(6)
    second = make_oracle(family, tmp_path / "tokenizer", tiny_vocab=True)
    other = make_oracle(family, tmp_path / "tokenizer", tiny_vocab=True, seed=1)
    for component in ("text_encoder", "transformer", "vae"):
        weights = getattr(first, component).state_dict()
        assert not getattr(first, component).training
        assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float32}
        for name, value in getattr(second, component).state_dict().items():
            assert torch.equal(value, weights[name]), name
        changed = [not torch.equal(v, weights[n]) for n, v in getattr(other, component).state_dict().items()]
        assert sum(changed) >= len(changed) - 1  # all but the batch counter


@pytest.mark.parametrize("family", FAMILIES)
def test_the_saved_folder_has_the_published_layout(oracle_folders: Oracles, family: str) -> None:
    pipe, folder = oracle_folders(family)
    expected = {"model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "vae"}
    assert file_names(folder) == expected
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == type(pipe).__name__
    assert file_names(folder / "scheduler") == {"scheduler_config.json"}
    assert file_names(folder / "tokenizer") == TOKENIZER_FILES[family]
    assert {"config.json", "model.safetensors"} <= file_names(folder / "text_encoder")
    for component in ("transformer", "vae"):
        assert file_names(folder / component) == {"config.json", "diffusion_pytorch_model.safetensors"}
        assert set(tensor_keys(folder / component)) == set(getattr(pipe, component).state_dict())

    keys = tensor_keys(folder / "text_encoder")
    prefixes = TEXT_ENCODER_PREFIXES[family]
    assert {prefix for prefix in prefixes if any(key.startswith(prefix) for key in keys)} == set(prefixes)
    assert [key for key in keys if not key.startswith(prefixes)] == []
    assert [key for key in keys if "language_model" in key and family == "qwen_image"] == []
    assert TEXT_ENCODER_SAMPLE[family] in keys


@pytest.mark.parametrize("family", FAMILIES)
def test_the_saved_folder_reproduces_the_images(oracle_folders: Oracles, family: str) -> None:
    from diffusers import DiffusionPipeline

    pipe, folder = oracle_folders(family)
    again = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    again.set_progress_bar_config(disable=True)
    expected = oracle_images(pipe, PROMPTS, NEGATIVES, **RUN)
    torch.testing.assert_close(oracle_images(again, PROMPTS, NEGATIVES, **RUN), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_folders_have_an_index_of_every_key(family: str, tmp_path: Path) -> None:
    pipe = tiny_oracle(family, tmp_path / "tokenizer", num_layers=3)
    assert pipe.transformer.config.num_layers == 3
    assert pipe.text_encoder.get_input_embeddings().num_embeddings == len(pipe.tokenizer)
    whole = save_oracle(pipe, tmp_path / "whole")
    sharded = save_oracle(pipe, tmp_path / "sharded", max_shard_size="100KB")

    stems = {"transformer": "diffusion_pytorch_model"}
    if family == "qwen_image":
        stems["text_encoder"] = "model"
    for component, stem in stems.items():
        index = json.loads((sharded / component / f"{stem}.safetensors.index.json").read_text())["weight_map"]
        files = {path.name for path in (sharded / component).glob("*.safetensors")}
        assert len(files) > 1
        assert set(index.values()) == files
        assert f"{stem}.safetensors" not in files
        assert set(index) == set(tensor_keys(sharded / component)) == set(tensor_keys(whole / component))
    assert (sharded / "vae" / "diffusion_pytorch_model.safetensors").is_file()


def test_bad_requests_are_named(oracle_folders: Oracles, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown family 'flux'"):
        make_oracle("flux", tmp_path)
    pipe, _ = oracle_folders("ernie_image")
    with pytest.raises(ValueError, match="2 prompts, 1 negative prompts and 2 seeds"):
        oracle_images(pipe, ["a", "b"], ["c"], **RUN | {"seeds": [1, 2]})
