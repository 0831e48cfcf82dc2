"""From files to components, in a written order.

1. resolve every `ModelConfig` to local files (downloading what is missing),
2. read headers and recognise every component: all mistakes surface here, before a weight is read,
3. build each module on the meta device and fill it strictly, straight to its dtype and device,
4. hand it to `memory`, where its config asks for that.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .memory.attach import Residence, attach
from .recognise import MemoryReader, Reader, Recognised, module_shapes, recognise
from .runtime.errors import InvalidInputError, MissingFileError, UnsafeFileError, WrongModelError
from .spec import ComponentSpec, Family
from .weights.local import INDEX_SUFFIX, indexed_files
from .weights.model_config import ModelConfig
from .weights.reader import PICKLE_SUFFIXES, CheckpointReader

logger = logging.getLogger(__name__)

_RELEASE_AFTER = 1 << 28
"""Bytes copied out of mapped files before their pages are given back."""


@dataclass(frozen=True)
class Found:
    """A component recognised in files, and how it is to be kept."""

    recognised: Recognised
    residence: Residence | None
    """None where the weights simply stay on the device."""


def load_components(
    family: Family,
    configs: Sequence[ModelConfig],
    *,
    dtype: torch.dtype,
    device: torch.device,
    wanted: Sequence[str] | None = None,
    vram_limit: float | None = None,
) -> dict[str, nn.Module]:
    """`find_components`, then `fill_components`."""
    found = find_components(family, configs, dtype=dtype, device=device, wanted=wanted)
    return fill_components(found, dtype=dtype, device=device, vram_limit=vram_limit)


def find_components(
    family: Family,
    configs: Sequence[ModelConfig],
    *,
    dtype: torch.dtype,
    device: torch.device,
    wanted: Sequence[str] | None = None,
) -> dict[str, Found]:
    """Find the components of `family` in the files that `configs` name, reading headers only.

    Args:
        family: whose components are expected.
        configs: in any order; a folder may hold several components.
        dtype: of weights and computation, unless a config says otherwise.
        device: the same for the place.
        wanted: names of the components that must be there, and are returned; None for all of the family.

    Raises:
        MissingFileError: a file or a component is missing.
        WrongModelError: a file holds a component of another family, or two files hold the same one.
        KeyMismatchError, UnknownModelError, CorruptFileError, UnsafeFileError: see `recognise` and `weights.reader`.
        InvalidInputError: memory fields of a config that contradict each other.
    """
    known = [component.name for component in family.spec.components]
    for name in wanted or ():
        if name not in known:
            raise InvalidInputError(f"{family.spec.title} has no component {name!r}; it has {', '.join(known)}.")
    found: dict[str, tuple[Recognised, ModelConfig]] = {}
    for config in configs:
        for reader in _readers(config, family):
            for recognised in recognise(reader):
                _check_place(recognised, family, found)
                found[recognised.component.name] = (recognised, config)
    _check_all_there(family, found, known if wanted is None else wanted)
    return {
        name: Found(recognised, Residence.of(config, dtype, device))
        for name, (recognised, config) in found.items()
        if wanted is None or name in wanted
    }


def fill_components(
    found: Mapping[str, Found], *, dtype: torch.dtype, device: torch.device, vram_limit: float | None = None
) -> dict[str, nn.Module]:
    """Read the weights of what `find_components` found.

    Args:
        found: by name.
        dtype: of weights and computation, for components without a residence.
        device: the same for the place.
        vram_limit: GiB that weights may keep on the computation device, for components with one.
    """
    if vram_limit is not None and all(item.residence is None for item in found.values()):
        logger.warning(
            "vram_limit=%g has no effect: no component names a place to rest, as offload_device.", vram_limit
        )
    return {name: _fill(item.recognised, item.residence, dtype, device, vram_limit) for name, item in found.items()}


def _readers(config: ModelConfig, family: Family) -> list[Reader]:
    if config.clear_parameters:
        logger.warning("clear_parameters has no effect: weights on the device are always dropped after use.")
    if config.state_dict is not None:
        paths = config.resolve() if config.path is not None else []
        folder = (paths[0] if paths[0].is_dir() else paths[0].parent) if paths else None
        return [MemoryReader(config.state_dict, folder)]
    groups: list[list[Path]] = []
    files: dict[Path, list[Path]] = {}
    for path in config.resolve():
        if path.is_dir():
            groups += weight_files(path, family.spec.components)
        elif path.name.endswith(INDEX_SUFFIX):
            groups.append(_listed(path))
        else:
            files.setdefault(path.parent, []).append(path)
    if all((folder / "config.json").is_file() for folder in files):
        groups += files.values()  # each its own component
    else:
        groups.append([path for group in files.values() for path in group])
    return [CheckpointReader(group) for group in groups]


def weight_files(folder: Path, components: Sequence[ComponentSpec]) -> list[list[Path]]:
    """The safetensors files of each component in `folder`: one that holds weights, or a whole published repository.

    Raises:
        MissingFileError: there are none, or an index names a shard that is not there.
        UnsafeFileError: the weights are pickles.
        CorruptFileError: the index of the shards cannot be used.
    """
    names = dict.fromkeys(component.folder for component in components)
    folders = [folder / name for name in names if (folder / name).is_dir()]
    groups = [files for place in folders or [folder] if (files := _shards(place))]
    if groups:
        return groups
    for place in folders or [folder]:
        if pickles := sorted(path.name for path in place.iterdir() if path.suffix.lower() in PICKLE_SUFFIXES):
            raise UnsafeFileError(
                f"{place.absolute()} holds weights only as pickles ({pickles[0]}): opening one can run code that its "
                "author put there, so they are refused. Use the safetensors version of this model."
            )
    listed = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
    raise MissingFileError(f"No *.safetensors in {folder.absolute()} (it holds {listed}).")


def _shards(folder: Path) -> list[Path]:
    indices = sorted(folder.glob(f"*{INDEX_SUFFIX}"), key=lambda path: (len(path.name), path.name))
    return _listed(indices[0]) if indices else sorted(folder.glob("*.safetensors"))  # shortest: no variant as fp16


def _listed(index: Path) -> list[Path]:
    """The shards that an index names."""
    paths = [index.parent / name for name in indexed_files(index.parent, index.name)]
    for path in paths:
        if not path.is_file():
            raise MissingFileError(f"{index} lists the shard {path.name!r}, which is not in {path.parent.absolute()}.")
    return paths


def _check_place(recognised: Recognised, family: Family, found: dict[str, tuple[Recognised, ModelConfig]]) -> None:
    where = recognised.reader.describe()
    if recognised.family.spec.name != family.spec.name:
        raise WrongModelError(
            f"{where} is the {recognised.title}, but a component of {family.spec.title} is needed. Use the files of "
            f"{family.spec.model_ids[0]}, or the pipeline {recognised.family.spec.pipeline.split(':')[1]}."
        )
    name = recognised.component.name
    if name in found:
        raise WrongModelError(
            f"{where} is the {recognised.title}, and so is {found[name][0].reader.describe()}. Give one of them."
        )


def _check_all_there(family: Family, found: dict[str, Any], wanted: Sequence[str]) -> None:
    for component in family.spec.components:
        if component.name in wanted and component.name not in found:
            have = ", ".join(f"{r.component.title} ({r.reader.describe()})" for r, _ in found.values()) or "nothing"
            raise MissingFileError(
                f"No {component.title} of {family.spec.title} among the given models (found: {have}). Add "
                f'ModelConfig(model_id="{family.spec.model_ids[0]}", origin_file_pattern="{component.pattern}").'
            )


def _fill(
    recognised: Recognised,
    residence: Residence | None,
    dtype: torch.dtype,
    device: torch.device,
    vram_limit: float | None,
) -> nn.Module:
    module, reader, component = recognised.module, recognised.reader, recognised.component
    if residence is None:
        _fill_in_place(module, recognised, dtype, device)
    else:
        shapes = module_shapes(module)
        attach(
            module,
            lambda our_name: reader.read(recognised.names[our_name]).reshape(shapes[our_name]),
            residence,
            separate=component.timestep_only,
            # Without repeated blocks it is an autoencoder: small, and every rounding is seen in the picture.
            quantizable=[f"{component.blocks}."] if component.blocks else [],
            limit=vram_limit,
        )
    logger.info("Loaded the %s from %s.", recognised.title, reader.describe())
    return module


def _fill_in_place(module: nn.Module, recognised: Recognised, dtype: torch.dtype, device: torch.device) -> None:
    """Put every tensor where it belongs. Names and shapes were compared before, so nothing is looked up twice."""
    reader, names = recognised.reader, recognised.names
    copied = 0
    for path, owner in module.named_modules():
        prefix = f"{path}." if path else ""
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                stored = reader.read(names[prefix + leaf])
                tensor = stored.to(device, dtype)
                copied += 0 if tensor is stored else stored.nbytes
                if copied > _RELEASE_AFTER:  # the file's pages are done with: keep them from adding to the copies
                    copied = 0
                    reader.release()
                if tensor.shape != parameter.shape:  # a 1x1 convolution that is a matrix here
                    tensor = tensor.reshape(parameter.shape)
                owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        for leaf, buffer in owner._buffers.items():
            if buffer is not None:  # statistics and counters keep the dtype of the file; some buffers are in no file
                name = names.get(prefix + leaf)
                owner._buffers[leaf] = (buffer if name is None else reader.read(name)).to(device)
