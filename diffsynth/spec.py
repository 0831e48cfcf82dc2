"""What a family of models tells the rest of the package: facts, and six verbs.

Facts are typed and frozen (`FamilySpec`, `ComponentSpec`); the verbs are the methods of `Family`. The schedule is a
fact. Everything above the families talks to them only through this page, so a third family is one folder and one line
in `registry.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from .runtime.errors import InvalidInputError
from .sampling.schedule import FlowMatchScheduler
from .weights.keymap import KeyLayout

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ComponentSpec:
    """Facts of one component: what its files look like and how its module is built."""

    name: str
    """Attribute of the pipeline: "dit", "text_encoder", "vae"."""
    title: str
    """What people call it."""
    folder: str
    """Folder in the published repository."""
    pattern: str
    """Files in the published repository."""
    class_names: tuple[str, ...]
    """Names that `config.json` gives under `_class_name` or `architectures`."""
    parse_config: Callable[[Mapping[str, Any]], Any]
    """`config.json` to the typed config; raises `InvalidInputError` for settings that are not supported."""
    infer_config: Callable[[Shapes], Any]
    """Typed config from our names and shapes, or None where they do not tell."""
    build: Callable[[Any], nn.Module]
    """Module from the typed config; called on the meta device."""
    layouts: tuple[KeyLayout, ...]
    """Ways in which files name the tensors, the published one first."""
    marker: str
    """A tensor (our name) that no other component has: its presence decides what a file is."""
    unread: Callable[[Any], tuple[str, ...]] = lambda config: ()
    """Prefixes (our names) of tensors that belong to the component but that no task here reads."""
    tiny: Mapping[str, Any] = field(default_factory=dict)
    """A structurally complete `config.json` small enough for tests."""
    blocks: str | None = None
    """Path of the repeated blocks, in run order."""
    timestep_only: tuple[str, ...] = ()
    """Glob patterns of parameters that see nothing but the timestep."""
    lora_targets: tuple[str, ...] = ()
    """Default target modules of LoRA training."""


@dataclass(frozen=True)
class FamilySpec:
    """Facts of one family."""

    name: str
    """Name on the command line: "qwen-image"."""
    title: str
    """What people call it."""
    pipeline: str
    """Public class, `module:Class`."""
    model_ids: tuple[str, ...]
    """Published repositories whose files fit this family."""
    model_index_classes: tuple[str, ...]
    """Values of `_class_name` in `model_index.json`."""
    components: tuple[ComponentSpec, ...]
    scheduler: FlowMatchScheduler
    """Sigmas the published model is sampled at."""
    tokenizer_folder: str = "tokenizer"
    tiny_extra: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further json files of a published folder, path to content."""

    def component(self, name: str) -> ComponentSpec:
        """The component called `name`."""
        return next(component for component in self.components if component.name == name)


@dataclass(frozen=True)
class Guidance:
    """How the predictions with and without a prompt are combined."""

    scale: float = 1.0
    normalize: bool = False

    @property
    def active(self) -> bool:
        """Whether the negative prompt takes part at all."""
        return self.scale > 1.0


class Sampler(Protocol):
    """A run prepared by `Family.prepare`: everything that is the same for all its steps is done."""

    def velocity(self, x: Tensor, step: int) -> Tensor:
        """Velocity of every sequence.

        Args:
            x: fp32 tokens `[images, N, C]`.
            step: index into the sigmas the run was prepared for.

        Returns:
            `[branches, images, N, C]`: with the prompts, then without where guidance is active.
        """
        ...


class Family(Protocol):
    """The verbs."""

    spec: ClassVar[FamilySpec]

    def load_tokenizer(self, folder: str) -> Any:
        """Tokenizer from a local folder."""
        ...

    def encode_prompt(self, text_encoder: nn.Module, tokenizer: Any, prompt: str) -> Tensor:
        """Condition of one prompt, `[M, text width]`."""
        ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape `(C, h, w)` of the noise of one image."""
        ...

    def pack(self, latents: Tensor) -> Tensor:
        """`[B, C, h, w]` as the tokens `[B, N, C']` that the transformer reads."""
        ...

    def unpack(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Inverse of `pack`, for images of `height` x `width` pixels."""
        ...

    def prepare(
        self, model: nn.Module, branches: Sequence[Sequence[Tensor]], sigmas: Tensor, height: int, width: int
    ) -> Sampler:
        """Do once what is the same for every step: positions, text projections, timestep-only layers.

        Args:
            model: the transformer.
            branches: conditions `[M, text width]` per guidance branch and image.
            sigmas: fp32 `[steps + 1]` from the scheduler.
            height, width: size of the images in pixels.
        """
        ...

    def encode_image(self, vae: nn.Module, pixels: Tensor) -> Tensor:
        """`[B, 3, H, W]` in -1..1 to normalised latents `[B, C, h, w]`."""
        ...

    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Normalised latents `[B, C, h, w]` to pixels `[B, 3, H, W]`, about -1..1."""
        ...


def parse_dataclass(cls: type, config: Mapping[str, Any], *, required: Mapping[str, Any] | None = None) -> Any:
    """Fill the dataclass `cls` from a `config.json`.

    Keys that `cls` does not have are passed over (published files carry dead ones); a field that is absent keeps its
    published number.

    Args:
        cls: a frozen dataclass with a default for every field.
        config: the parsed file.
        required: settings that must have exactly this value where they are present, because nothing else is supported.

    Raises:
        InvalidInputError: a value has the wrong type, or a setting asks for what is not supported.
    """
    for key, value in (required or {}).items():
        if config.get(key, value) != value:
            raise InvalidInputError(f"config.json sets {key} = {config[key]!r}; only {value!r} is supported.")
    values = {}
    for item in fields(cls):
        if item.name not in config:
            continue
        value, default = config[item.name], item.default
        value = tuple(value) if isinstance(value, list) else value
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(default):
            raise InvalidInputError(
                f"config.json sets {item.name} = {config[item.name]!r}; expected {type(default).__name__}."
            )
        values[item.name] = value
    return cls(**values)


def compute_placement(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype in which `module` computes: as `memory` noted them where its weights rest elsewhere."""
    noted: tuple[torch.device, torch.dtype] | None = getattr(module, "compute_placement", None)
    if noted is not None:
        return noted
    parameter = next(parameter for parameter in module.parameters() if parameter.is_floating_point())
    return parameter.device, parameter.dtype
