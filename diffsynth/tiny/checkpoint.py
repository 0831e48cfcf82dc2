"""Write small checkpoints with random weights, complete in structure, in the published layout.

They load like the real ones and run in a second on any machine: for trying an installation, for tests, for demos. Their
images are coloured noise, since nothing was ever learned.
"""

import json
from pathlib import Path
from typing import Any

from ..runtime.errors import InvalidInputError, OutputError


def write_tiny_checkpoint(
    family: str, folder: str | Path, *, seed: int = 0, max_shard_bytes: int | None = None
) -> Path:
    """Write a repository of `family` to `folder` and return the folder.

    Args:
        family: "qwen-image" or "ernie-image".
        folder: created; must be empty or not exist.
        seed: of the random weights.
        max_shard_bytes: cut the transformer into shards of at most this size, with an index; None for one file.
    """
    import torch

    from ..registry import family_named
    from .tokenizers import write_qwen_tokenizer, write_tekken_tokenizer

    spec = family_named(family).spec
    root = Path(folder)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise OutputError(f"{root.absolute()} exists already; give an empty folder or a new name.")
    write_tokenizer = {"qwen-image": write_qwen_tokenizer, "ernie-image": write_tekken_tokenizer}.get(family)
    if write_tokenizer is None:
        raise InvalidInputError(f"No tiny tokenizer for the family {family!r}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for component in spec.components:
            target = root / component.folder
            target.mkdir(parents=True)
            if "architectures" in component.tiny:
                _write_transformers(dict(component.tiny), target)
                continue
            module = component.build(component.parse_config(component.tiny))
            for name, buffer in module.named_buffers():
                if name.endswith("running_mean"):
                    buffer.normal_(0, 0.1)
                elif name.endswith("running_var"):
                    buffer.uniform_(0.5, 1.5)
            _write_json(target / "config.json", component.tiny)
            _write_weights(module.state_dict(), target, max_shard_bytes if component.name == "dit" else None)
    write_tokenizer(root / spec.tokenizer_folder)
    for name, content in spec.tiny_extra.items():
        _write_json(root / name, content)
    return root


def _write_transformers(config: dict[str, Any], folder: Path) -> None:
    """A text encoder with all its towers, by the library that owns the layout."""
    import transformers

    model_class = getattr(transformers, config["architectures"][0])
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model_class(model_class.config_class.from_dict(config)).save_pretrained(folder)
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _write_weights(tensors: dict[str, Any], folder: Path, max_shard_bytes: int | None) -> None:
    from safetensors.torch import save_file

    stem, shards = "diffusion_pytorch_model", [{}]  # type: ignore[var-annotated]
    for name, tensor in tensors.items():
        used = sum(t.nbytes for t in shards[-1].values())
        if max_shard_bytes is not None and shards[-1] and used + tensor.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensor.contiguous()
    if len(shards) == 1:
        save_file(shards[0], folder / f"{stem}.safetensors", metadata={"format": "pt"})
        return
    files = [f"{stem}-{index + 1:05d}-of-{len(shards):05d}.safetensors" for index in range(len(shards))]
    for name, shard in zip(files, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    weight_map = {key: name for name, shard in zip(files, shards, strict=True) for key in shard}
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(
        folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
