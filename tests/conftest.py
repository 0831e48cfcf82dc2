"""What all tests share: no network, repeatable arithmetic, the real tokenizers and the independent implementation.

Test modules find the helpers beside this file by plain import: `from oracle import oracle_latents`.
"""

import os

# Libraries read these when they are imported, so they come before any other import.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS is deterministic only with a fixed workspace
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import make_oracle, save_oracle
from real_tokenizers import real_qwen_tokenizer, real_tekken_tokenizer

IS_XDIST_WORKER = "PYTEST_XDIST_WORKER" in os.environ

TOKENIZERS: dict[str, Callable[[Path], Path]] = {
    "qwen_image": lambda shared: real_qwen_tokenizer(shared / "real_qwen_tokenizer"),
    "ernie_image": lambda shared: real_tekken_tokenizer(shared / "real_tekken_tokenizer"),
}
OracleFolders = Callable[[str], tuple[Any, Path]]


def pytest_configure(config: pytest.Config) -> None:
    if IS_XDIST_WORKER:
        torch.set_num_threads(1)  # the workers are the parallelism


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and none is available here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def deterministic_torch() -> Iterator[None]:
    """Every test starts from the same random state, and an operation without a deterministic form is an error."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(True)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A temporary folder of this run that all its pytest-xdist workers see."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if IS_XDIST_WORKER else base


@pytest.fixture(scope="session")
def qwen_tokenizer(shared_folder: Path) -> Path:
    """The folder of Qwen-Image's real tokenizer."""
    return TOKENIZERS["qwen_image"](shared_folder)


@pytest.fixture(scope="session")
def tekken_tokenizer(shared_folder: Path) -> Path:
    """The folder of ERNIE-Image's real tokenizer."""
    return TOKENIZERS["ernie_image"](shared_folder)


@pytest.fixture(scope="session")
def oracle_folders(shared_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> OracleFolders:
    """`oracle_folders(family)` -> (diffusers pipeline, its repository folder), made at the first call with a family.

    Both use the real tokenizer and are shared by all tests of a worker: read them, never change them.
    """
    made: dict[str, tuple[Any, Path]] = {}

    def get(family: str) -> tuple[Any, Path]:
        if family not in made:
            pipe = make_oracle(family, TOKENIZERS[family](shared_folder))
            made[family] = (pipe, save_oracle(pipe, tmp_path_factory.mktemp(family)))
        return made[family]

    return get
