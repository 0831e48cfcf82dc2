"""ModelConfig: what it accepts, what it refuses, and which local files it gives. Downloading is tested in test_hub."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffsynth.runtime.errors import InvalidInputError, MissingFileError
from diffsynth.weights import hub
from diffsynth.weights.model_config import ModelConfig

REPO = "Qwen/Qwen-Image"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (hub.ENV_ROOT, hub.ENV_SKIP, hub.ENV_SOURCE):
        monkeypatch.delenv(name, raising=False)


def put(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# --- Fields -------------------------------------------------------------------------------------------------------


def test_defaults_and_order() -> None:
    config = ModelConfig("models/x.safetensors")
    assert config.path == "models/x.safetensors"
    memory = [
        f"{stage}_{what}" for stage in ("offload", "onload", "preparing", "computation") for what in ("device", "dtype")
    ]
    assert [getattr(config, name) for name in memory] == [None] * 8
    assert config.clear_parameters is False
    assert config.state_dict is None
    order = ["path", "model_id", "origin_file_pattern", "download_source", "local_model_path", "skip_download", *memory]
    assert list(ModelConfig.__dataclass_fields__) == [*order, "clear_parameters", "state_dict"]


def test_memory_fields_stay_as_given() -> None:
    config = ModelConfig("x", offload_dtype="disk", offload_device="disk", computation_dtype=torch.float8_e4m3fn)
    assert (config.offload_dtype, config.offload_device) == ("disk", "disk")
    assert config.computation_dtype is torch.float8_e4m3fn


def test_import_is_light() -> None:
    code = (
        "import sys; import diffsynth.weights.model_config;"
        "print([name for name in ('torch', 'modelscope', 'modelscope_hub', 'huggingface_hub') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_state_dict_alone_needs_no_files() -> None:
    config = ModelConfig(state_dict={"w": torch.zeros(2)})
    assert config.resolve() == []
    assert config == ModelConfig(state_dict={"w": torch.ones(2)})  # tensors take no part in comparison or repr
    assert "tensor" not in repr(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "Neither path nor model_id"),
        ({"path": "a", "model_id": REPO}, "both given"),
        ({"path": []}, "not empty"),
        ({"path": 3}, "path=3"),
        ({"path": ["a", None]}, "None"),
        ({"path": ""}, "not the path"),
        ({"model_id": "Qwen-Image"}, "namespace/name"),
        ({"model_id": "a/b/c"}, "namespace/name"),
        ({"model_id": "../x"}, "namespace/name"),
        ({"model_id": "a/.."}, "namespace/name"),
        ({"model_id": "a/b\n"}, "namespace/name"),
        ({"model_id": 7}, "namespace/name"),
        ({"model_id": REPO, "download_source": "gitlab"}, "'gitlab'.*'modelscope', 'huggingface'"),
        ({"model_id": REPO, "skip_download": "true"}, "skip_download='true'"),
        ({"model_id": REPO, "origin_file_pattern": "../vae/"}, "relative to the repository"),
        ({"model_id": REPO, "origin_file_pattern": "vae/../../x"}, "relative to the repository"),
        ({"model_id": REPO, "origin_file_pattern": "/etc/passwd"}, "relative to the repository"),
        ({"model_id": REPO, "origin_file_pattern": "C:\\x"}, "relative to the repository"),
        ({"model_id": REPO, "origin_file_pattern": "vae\\x"}, "relative to the repository"),
        ({"model_id": REPO, "origin_file_pattern": ["vae/", "../x"]}, "relative to the repository"),
        ({"model_id": REPO, "origin_file_pattern": []}, "not empty"),
        ({"model_id": REPO, "origin_file_pattern": [3]}, "origin_file_pattern=3"),
        ({"model_id": REPO, "origin_file_pattern": 3}, "origin_file_pattern=3"),
        ({"model_id": REPO, "origin_file_pattern": "*/"}, r"name one folder"),
    ],
)
def test_invalid_fields(fields: dict, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        ModelConfig(**fields)


def test_setting_without_effect_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ModelConfig("x.safetensors", origin_file_pattern="vae/")
    assert "origin_file_pattern has no effect" in caplog.text


# --- Local paths --------------------------------------------------------------------------------------------------


def test_local_files_in_the_order_given(tmp_path: Path) -> None:
    files = [put(tmp_path / "b.safetensors"), put(tmp_path / "a.safetensors")]
    assert ModelConfig(files[0]).resolve() == [files[0]]
    assert ModelConfig([str(file) for file in files]).resolve() == files


def test_local_folder(tmp_path: Path) -> None:
    put(tmp_path / "tokenizer" / "tokenizer.json")
    assert ModelConfig(str(tmp_path / "tokenizer")).resolve() == [tmp_path / "tokenizer"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFileError, match="empty folder"):
        ModelConfig(tmp_path / "empty").resolve()


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ModelConfig("~/x.safetensors").path == "~/x.safetensors"
    put(tmp_path / "x.safetensors")
    assert ModelConfig("~/x.safetensors").resolve() == [tmp_path / "x.safetensors"]


def test_missing_file_names_the_closest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "model-00001-of-00002.safetensors")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFileError) as caught:
        ModelConfig(["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]).resolve()
    assert f"{tmp_path / 'model-00002-of-00002.safetensors'} does not exist" in str(caught.value)
    assert "names like it: model-00001-of-00002.safetensors" in str(caught.value)
    with pytest.raises(MissingFileError, match="Nor does the folder"):
        ModelConfig("nowhere/x.safetensors").resolve()


# --- Models by id -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [None, ""])
def test_no_pattern_is_the_whole_repository(tmp_path: Path, pattern: str | None) -> None:
    put(tmp_path / REPO / "vae" / "config.json")
    config = ModelConfig(model_id=REPO, origin_file_pattern=pattern, local_model_path=tmp_path, skip_download=True)
    assert config.resolve() == [tmp_path / REPO]


def test_patterns_in_order_and_without_repetition(tmp_path: Path) -> None:
    for name in ("b.json", "a.json", "c.txt"):
        put(tmp_path / REPO / "vae" / name)
    patterns = ["vae/c.txt", "vae/*.json", "vae/*"]
    config = ModelConfig(model_id=REPO, origin_file_pattern=patterns, local_model_path=tmp_path, skip_download=True)
    assert config.resolve() == [tmp_path / REPO / "vae" / name for name in ("c.txt", "a.json", "b.json")]


def test_pattern_that_matches_nothing(tmp_path: Path) -> None:
    config = ModelConfig(
        model_id=REPO, origin_file_pattern="vae/*.safetensors", local_model_path=tmp_path, skip_download=True
    )
    with pytest.raises(MissingFileError, match=r"nothing matches 'vae/\*\.safetensors'"):
        config.resolve()


def test_fields_beat_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "said" / REPO / "x.json")
    monkeypatch.setenv(hub.ENV_ROOT, str(tmp_path / "environment"))
    monkeypatch.setenv(hub.ENV_SKIP, "nonsense")  # not even looked at
    monkeypatch.setenv(hub.ENV_SOURCE, "nonsense")
    config = ModelConfig(
        model_id=REPO,
        origin_file_pattern="x.json",
        local_model_path=str(tmp_path / "said"),
        download_source="modelscope",
        skip_download=True,
    )
    assert config.resolve() == [tmp_path / "said" / REPO / "x.json"]
    put(tmp_path / "environment" / REPO / "x.json")
    monkeypatch.setenv(hub.ENV_SKIP, "on")
    monkeypatch.setenv(hub.ENV_SOURCE, "modelscope")
    found = ModelConfig(model_id=REPO, origin_file_pattern="x.json").resolve()
    assert found == [tmp_path / "environment" / REPO / "x.json"]
