"""Downloading through the real client libraries, from both hubs' protocols spoken on 127.0.0.1."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub.constants
import modelscope_hub.config
import pytest
from filelock import FileLock
from hub_server import HubServer, running_server, safetensors

from diffsynth.runtime.errors import DownloadError, InvalidInputError, MissingFileError
from diffsynth.weights import hub, local

REPO = "someone/a-model"
SHARDS = [f"transformer/diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
WEIGHT_MAP = {f"w{i}": name.rsplit("/", 1)[1] for i, name in enumerate(SHARDS)}
FILES = {
    "README.md": b"A model.",
    "model_index.json": b"{}",
    INDEX: json.dumps({"weight_map": WEIGHT_MAP}).encode(),
    **{name: safetensors(3000, fill) for fill, name in enumerate(SHARDS)},
    "transformer/config.json": b'{"layers": 2}',
    "tokenizer/tokenizer.json": b'{"model": {}}' * 200,
    "tokenizer/tokenizer_config.json": b"{}",
    "vae/diffusion_pytorch_model.safetensors": safetensors(2000),
    "vae/config.json": b'{"channels": 16}',
}
SHARD_GLOB = "transformer/diffusion_pytorch_model*.safetensors"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A running server that both clients believe to be their hub; nothing is written outside of tmp_path."""
    for name in (hub.ENV_ROOT, hub.ENV_SKIP, hub.ENV_SOURCE, "MODELSCOPE_DOMAIN", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "caches" / "modelscope"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home" / ".modelscope"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with running_server() as running:
        running.repos[REPO] = dict(FILES)
        point_clients_at(running.url, tmp_path, monkeypatch)
        yield running
        modelscope_hub.config.set_default_config(None)


def point_clients_at(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ModelScope reads the environment when first used, huggingface_hub when it is imported."""
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", url)
    modelscope_hub.config.set_default_config(None)
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "caches" / "huggingface"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)


@pytest.fixture(params=["modelscope", "huggingface"])
def source(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "models"


def names(paths: list[Path], root: Path) -> list[str]:
    return [path.relative_to(root / REPO).as_posix() for path in paths]


def store(root: Path, files: dict[str, bytes], repo: str = REPO) -> None:
    for name, data in files.items():
        path = root / repo / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def on_disk(root: Path, repo: str = REPO) -> dict[str, bytes]:
    """All files of the model; what the clients and the record keep beside it is left out."""
    folder = root / repo
    found = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        name.as_posix(): path.read_bytes()
        for name, path in found.items()
        if name.parts[0] not in (".cache", ".diffsynth")
    }


# --- Patterns -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("vae/diffusion_pytorch_model.safetensors", ["vae/diffusion_pytorch_model.safetensors"]),
        (SHARD_GLOB, SHARDS),
        (INDEX, SHARDS),
        ("transformer/*.safetensors.index.json", SHARDS),
        ("*.json", ["model_index.json"]),
        ("*", ["README.md", "model_index.json"]),
        ("**/config.json", ["transformer/config.json", "vae/config.json"]),
    ],
)
def test_pattern_gives_sorted_files(
    server: HubServer, source: str, root: Path, pattern: str, expected: list[str]
) -> None:
    paths = hub.fetch(REPO, [pattern], source=source, root=root)
    assert names(paths, root) == expected
    wanted = {*expected, INDEX} if "index.json" in pattern and "transformer" in pattern else set(expected)
    assert on_disk(root) == {name: FILES[name] for name in wanted}


def test_folder_and_whole_repository(server: HubServer, source: str, root: Path) -> None:
    assert hub.fetch(REPO, ["tokenizer/"], source=source, root=root) == [root / REPO / "tokenizer"]
    assert set(on_disk(root)) == {name for name in FILES if name.startswith("tokenizer/")}
    assert hub.fetch(REPO, [""], source=source, root=root) == [root / REPO]
    assert on_disk(root) == FILES
    assert server.served["tokenizer/tokenizer.json"] == len(FILES["tokenizer/tokenizer.json"])


def test_several_patterns_keep_their_order(server: HubServer, source: str, root: Path) -> None:
    paths = hub.fetch(REPO, ["vae/*.safetensors", SHARD_GLOB, "vae/*"], source=source, root=root)
    vae = ["vae/diffusion_pytorch_model.safetensors"]
    assert names(paths, root) == [*vae, *SHARDS, "vae/config.json"]


def test_names_with_glob_characters_are_taken_literally(server: HubServer, source: str, root: Path) -> None:
    server.repos[REPO] = {"a[1].txt": b"bracket", "a1.txt": b"plain", "a*.txt": b"star"}
    hub.fetch(REPO, ["a[[]1].txt"], source=source, root=root)
    assert on_disk(root) == {"a[1].txt": b"bracket"}


# --- Completeness -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [SHARD_GLOB, INDEX, "tokenizer/", "", "vae/config.json", "transformer/*.json"])
def test_second_time_asks_nothing(server: HubServer, source: str, root: Path, pattern: str) -> None:
    first = hub.fetch(REPO, [pattern], source=source, root=root)
    server.requests.clear()
    assert hub.fetch(REPO, [pattern], source=source, root=root) == first
    assert server.requests == []


@pytest.mark.parametrize("pattern", [SHARD_GLOB, INDEX, "tokenizer/", "", "vae/config.json", "*.json"])
def test_files_put_there_by_hand_are_used_without_asking(
    server: HubServer, source: str, root: Path, pattern: str
) -> None:
    store(root, FILES)
    assert hub.fetch(REPO, [pattern], source=source, root=root)
    assert server.requests == []


def test_linked_folder_counts(server: HubServer, root: Path, tmp_path: Path) -> None:
    store(tmp_path, {name: FILES[name] for name in SHARDS}, "elsewhere")
    (root / REPO).mkdir(parents=True)
    (root / REPO / "transformer").symlink_to(tmp_path / "elsewhere" / "transformer")
    (tmp_path / "elsewhere" / "transformer" / "loop").symlink_to(root / REPO)
    assert names(hub.fetch(REPO, [SHARD_GLOB], root=root), root) == SHARDS
    assert local.local_names(root / REPO) == SHARDS
    assert server.requests == []


def test_whole_folder_covers_a_glob_in_it(server: HubServer, source: str, root: Path) -> None:
    hub.fetch(REPO, ["transformer/"], source=source, root=root)
    server.requests.clear()
    assert names(hub.fetch(REPO, [SHARD_GLOB], source=source, root=root), root) == SHARDS
    assert server.requests == []


def test_part_fetched_before_is_not_taken_for_the_folder(server: HubServer, source: str, root: Path) -> None:
    hub.fetch(REPO, ["vae/config.json"], source=source, root=root)
    hub.fetch(REPO, ["vae/"], source=source, root=root)
    assert set(on_disk(root)) == {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}
    assert server.served["vae/config.json"] == len(FILES["vae/config.json"])


@pytest.mark.parametrize("lost", [0, 2])
@pytest.mark.parametrize("pattern", [SHARD_GLOB, INDEX])
def test_missing_shard_is_noticed_and_only_it_is_fetched(
    server: HubServer, source: str, root: Path, pattern: str, lost: int
) -> None:
    store(root, {name: FILES[name] for name in (*SHARDS, INDEX) if name != SHARDS[lost]})
    assert names(hub.fetch(REPO, [pattern], source=source, root=root), root) == SHARDS
    assert dict(server.served) == {SHARDS[lost]: len(FILES[SHARDS[lost]])}


@pytest.mark.parametrize("damage", ["cut", "longer", "pointer", "empty", "garbage"])
def test_wrong_safetensors_is_fetched_again(server: HubServer, source: str, root: Path, damage: str) -> None:
    hub.fetch(REPO, [SHARD_GLOB], source=source, root=root)
    server.served.clear()
    good = FILES[SHARDS[1]]
    bad = {
        "cut": good[:-7],
        "longer": good + b"x",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3000\n",
        "empty": b"",
        "garbage": b"\xff" * len(good),  # the right size: only the header tells
    }[damage]
    path = root / REPO / SHARDS[1]
    before = path.stat()
    path.write_bytes(bad)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # the clients' own notes must not vouch for it
    hub.fetch(REPO, [SHARD_GLOB], source=source, root=root)
    assert path.read_bytes() == good
    assert dict(server.served) == {SHARDS[1]: len(good)}


def test_wrong_size_by_hand_without_any_record(server: HubServer, source: str, root: Path) -> None:
    store(root, {"vae/diffusion_pytorch_model.safetensors": safetensors(2000)[:500]})
    hub.fetch(REPO, ["vae/*.safetensors"], source=source, root=root)
    assert on_disk(root) == {name: FILES[name] for name in ["vae/diffusion_pytorch_model.safetensors"]}


def test_record_notices_a_changed_tokenizer(server: HubServer, source: str, root: Path) -> None:
    hub.fetch(REPO, ["tokenizer/"], source=source, root=root)
    (root / REPO / "tokenizer/tokenizer.json").write_bytes(b"{")
    (root / REPO / "tokenizer/tokenizer_config.json").unlink()
    server.served.clear()
    hub.fetch(REPO, ["tokenizer/"], source=source, root=root)
    assert on_disk(root) == {name: data for name, data in FILES.items() if name.startswith("tokenizer/")}


def test_folder_of_a_failed_download_is_not_complete(
    server: HubServer, source: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = type(hub._HUBS[source])
    original = client.download

    def only_one(self: object, repo: str, revision: str | None, wanted: list[str], folder: Path, force: bool) -> None:
        original(self, repo, revision, wanted[:1], folder, force)
        raise ConnectionError("the cable was pulled")

    with monkeypatch.context() as patch:
        patch.setattr(client, "download", only_one)
        with pytest.raises(DownloadError, match="the cable was pulled") as caught:
            hub.fetch(REPO, ["tokenizer/"], source=source, root=root)
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert len(on_disk(root)) == 1
    with pytest.raises(MissingFileError, match="is missing"):
        hub.fetch(REPO, ["tokenizer/"], source=source, root=root, skip=True)
    hub.fetch(REPO, ["tokenizer/"], source=source, root=root)
    assert len(on_disk(root)) == 2


def test_unreadable_record_is_ignored(
    server: HubServer, source: str, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.fetch(REPO, ["tokenizer/"], source=source, root=root)
    (root / REPO / ".diffsynth" / "record.json").write_text('{"files": [')
    with caplog.at_level(logging.WARNING, logger=local.__name__):
        assert hub.fetch(REPO, ["tokenizer/"], source=source, root=root, skip=True)
    assert "record.json" in caplog.text


# --- Trouble on the way -------------------------------------------------------------------------------------------


def test_cut_connection_is_resumed(server: HubServer, source: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Both clients lose the block they were reading: 1 MB and 10 MB by default, nothing beside a real shard.
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_CHUNK_SIZE", 1 << 16)
    name, data = "big.safetensors", safetensors(4_000_000)
    server.repos[REPO] = {name: data}
    server.cuts[name] = 2_500_000
    hub.fetch(REPO, [name], source=source, root=root)
    assert on_disk(root) == {name: data}
    assert len(data) <= server.served[name] <= 1.1 * len(data)


def test_server_that_ignores_ranges(server: HubServer, source: str, root: Path) -> None:
    name, data = "big.safetensors", safetensors(300_000)
    server.repos[REPO] = {name: data}
    server.cuts[name] = 200_000
    server.hide_ranges = True
    hub.fetch(REPO, [name], source=source, root=root)
    assert on_disk(root) == {name: data}


def test_broken_content_is_refused(server: HubServer, source: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_INTEGRITY_RETRY_BACKOFF", 0.01)
    good = FILES[SHARDS[0]]
    server.lies[SHARDS[0]] = good[:-1] + b"!"  # same size, valid header, one other byte
    with pytest.raises(DownloadError, match=r"00001-of-00003\.safetensors"):
        hub.fetch(REPO, [SHARD_GLOB], source=source, root=root)
    assert SHARDS[0] not in on_disk(root)


def test_file_broken_on_the_hub_itself(server: HubServer, source: str, root: Path) -> None:
    server.repos[REPO] = {"x.safetensors": safetensors(5000)[:-10]}
    with pytest.raises(DownloadError, match=r"x\.safetensors has 5\d+ bytes, expected 5\d+ by its header"):
        hub.fetch(REPO, ["x.safetensors"], source=source, root=root)
    assert on_disk(root) == {}


@pytest.mark.parametrize(
    "bad",
    ["../x.json", "vae/../../x.json", "/etc/x.json", "C:\\x.json", "vae/\\\\host\\x.json", "\ud800.json", "x" * 300],
)
def test_names_that_escape_are_refused(server: HubServer, source: str, root: Path, tmp_path: Path, bad: str) -> None:
    server.repos[REPO] = {"model_index.json": b"{}", bad: b"evil"}
    with pytest.raises(DownloadError, match=r"not a safe name|too long to be stored"):
        hub.fetch(REPO, [""], source=source, root=root)
    assert on_disk(root) == {}
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"evil"]


def test_hub_cannot_write_the_record(server: HubServer, source: str, root: Path) -> None:
    server.repos[REPO] = {".diffsynth/record.json": b"{}"}
    with pytest.raises(DownloadError, match="not a safe name"):
        hub.fetch(REPO, [""], source=source, root=root)


def test_index_that_points_outside(server: HubServer, source: str, root: Path) -> None:
    store(root, {"a.safetensors.index.json": json.dumps({"weight_map": {"w": "../../secret.safetensors"}}).encode()})
    server.repos[REPO] = {"a.safetensors.index.json": (root / REPO / "a.safetensors.index.json").read_bytes()}
    with pytest.raises(DownloadError, match="outside its own folder"):
        hub.fetch(REPO, ["a.safetensors.index.json"], source=source, root=root)


def test_unknown_repository(server: HubServer, source: str, root: Path) -> None:
    with pytest.raises(DownloadError) as caught:
        hub.fetch("someone/nothing", ["vae/"], source=source, root=root)
    text = str(caught.value)
    title = {"modelscope": "ModelScope", "huggingface": "Hugging Face"}[source]
    assert f"someone/nothing on {title} does not exist" in text
    assert "vae/" in text
    assert not root.exists(), "the attempt leaves nothing behind"


def test_unknown_file_names_the_closest(server: HubServer, source: str, root: Path) -> None:
    with pytest.raises(DownloadError) as caught:
        hub.fetch(REPO, ["tokeniser/"], source=source, root=root)
    assert f"No file of {REPO}" in str(caught.value)
    assert "tokenizer/" in str(caught.value)


def test_no_network(
    server: HubServer, source: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelscope_hub._legacy_api.REPO_TREE_PAGE_MAX_ATTEMPTS", 1)
    point_clients_at("http://127.0.0.1:9", tmp_path, monkeypatch)  # the discard port: nobody listens
    store(root, {SHARDS[0]: FILES[SHARDS[0]]})
    with pytest.raises(DownloadError) as caught:
        hub.fetch(REPO, [SHARD_GLOB], source=source, root=root)
    text = str(caught.value)
    assert f"{SHARDS[1]} is missing" in text
    assert str((root / REPO).absolute()) in text
    assert "skip_download=True" in text
    assert f"download {REPO} --include '{SHARD_GLOB}' --local-dir {root / REPO}" in text
    assert caught.value.__cause__ is not None
    assert SHARDS[0] in on_disk(root)


# --- Skipping -----------------------------------------------------------------------------------------------------


def test_skip_asks_nothing_and_says_what_to_do(server: HubServer, source: str, root: Path) -> None:
    store(root, {SHARDS[0]: FILES[SHARDS[0]], SHARDS[1]: FILES[SHARDS[1]][:100]})
    with pytest.raises(MissingFileError) as caught:
        hub.fetch(REPO, [SHARD_GLOB], source=source, root=root, skip=True)
    text = str(caught.value)
    assert f"{SHARDS[1]} has 100 bytes, expected {len(FILES[SHARDS[1]])} by its header" in text
    assert f"{SHARDS[2]} is missing" in text
    assert str((root / REPO).absolute()) in text
    assert "switched off by skip_download=True" in text
    assert {"modelscope": "modelscope download", "huggingface": "hf download"}[source] in text
    assert server.requests == []


def test_skip_with_nothing_there_names_what_is_close(server: HubServer, root: Path) -> None:
    store(root, {"tokenizer/tokenizer.json": b"{}"})
    with pytest.raises(MissingFileError, match=r"nothing matches 'tokeniser/'.*Close names there: tokenizer/"):
        hub.fetch(REPO, ["tokeniser/"], root=root, skip=True)


@pytest.mark.parametrize("word", ["true", "1", "YES", "On"])
def test_environment_switches_off(server: HubServer, root: Path, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setenv(hub.ENV_SKIP, word)
    with pytest.raises(MissingFileError, match=f"{hub.ENV_SKIP}={word}"):
        hub.fetch(REPO, ["vae/"], root=root)
    assert server.requests == []
    assert hub.fetch(REPO, ["vae/"], root=root, skip=False)  # the argument beats the environment


@pytest.mark.parametrize("word", ["false", "0", "No", "OFF", ""])
def test_environment_leaves_on(server: HubServer, root: Path, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setenv(hub.ENV_SKIP, word)
    assert hub.fetch(REPO, ["vae/"], root=root)


def test_environment_with_another_word(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(hub.ENV_SKIP, "maybe")
    with pytest.raises(InvalidInputError, match=r"'maybe'.*true.*false"):
        hub.fetch(REPO, ["vae/"], root=root)


def test_hf_hub_offline_counts_for_hugging_face_only(
    server: HubServer, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingFileError, match="HF_HUB_OFFLINE=1"):
        hub.fetch(REPO, ["vae/"], source="huggingface", root=root, skip=False)
    assert hub.fetch(REPO, ["vae/"], source="modelscope", root=root)


def test_hf_hub_offline_is_read_from_the_environment_before_the_client_is_loaded() -> None:
    code = "from diffsynth.weights import hub; print(hub.skip_reason(None, 'huggingface'))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "HF_HUB_OFFLINE=1"


# --- Settings -----------------------------------------------------------------------------------------------------


def test_root_precedence(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store(Path("models"), FILES)
    assert hub.fetch(REPO, ["vae/"]) == [Path("models") / REPO / "vae"]
    monkeypatch.setenv(hub.ENV_ROOT, str(tmp_path / "from-environment"))
    assert hub.fetch(REPO, ["vae/"]) == [tmp_path / "from-environment" / REPO / "vae"]
    assert hub.fetch(REPO, ["vae/"], root=tmp_path / "said") == [tmp_path / "said" / REPO / "vae"]


def test_source_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(hub.ENV_SOURCE, raising=False)
    assert hub.download_source() == "modelscope"
    monkeypatch.setenv(hub.ENV_SOURCE, "HuggingFace")
    assert hub.download_source() == "huggingface"
    assert hub.download_source("modelscope") == "modelscope"
    monkeypatch.setenv(hub.ENV_SOURCE, "gitlab")
    with pytest.raises(InvalidInputError, match=r"DIFFSYNTH_DOWNLOAD_SOURCE is 'gitlab'.*'modelscope', 'huggingface'"):
        hub.download_source()


def test_each_hub_is_asked_in_its_own_way(server: HubServer, source: str, root: Path) -> None:
    hub.fetch(REPO, ["vae/"], source=source, root=root)
    of_modelscope = [request for request in server.requests if "/api/v1/" in request]
    of_huggingface = [request for request in server.requests if "/api/models/" in request or "/resolve/" in request]
    assert bool(of_modelscope) == (source == "modelscope")
    assert bool(of_huggingface) == (source == "huggingface")


def test_modelscope_domain_still_works(server: HubServer, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODELSCOPE_ENDPOINT")
    monkeypatch.setenv("MODELSCOPE_DOMAIN", server.url)
    modelscope_hub.config.set_default_config(None)
    with pytest.warns(FutureWarning, match="MODELSCOPE_DOMAIN"):
        assert hub.fetch(REPO, ["vae/"], root=root)


# --- Two names of one model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["baidu/ERNIE-Image", "PaddlePaddle/ERNIE-Image"])
def test_mirror_names(server: HubServer, source: str, root: Path, asked: str) -> None:
    published = {"modelscope": "PaddlePaddle/ERNIE-Image", "huggingface": "baidu/ERNIE-Image"}[source]
    server.repos[published] = dict(FILES)
    assert hub.fetch(asked, ["vae/"], source=source, root=root) == [root / asked / "vae"]
    assert set(on_disk(root, asked)) == {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}


def test_mirror_folder_is_used_when_the_asked_one_lacks(server: HubServer, source: str, root: Path) -> None:
    store(root, FILES, "baidu/ERNIE-Image-Turbo")
    asked = "PaddlePaddle/ERNIE-Image-Turbo"
    assert hub.fetch(asked, [INDEX], source=source, root=root) == [root / "baidu/ERNIE-Image-Turbo" / n for n in SHARDS]
    store(root, {"vae/config.json": b"mine"}, asked)
    assert hub.fetch(asked, ["vae/config.json"], source=source, root=root) == [root / asked / "vae/config.json"]
    with pytest.raises(MissingFileError, match=r"PaddlePaddle/ERNIE-Image-Turbo and .*baidu/ERNIE-Image-Turbo"):
        hub.fetch(asked, ["vae/other.json"], source=source, root=root, skip=True)
    assert server.requests == []


# --- Several processes --------------------------------------------------------------------------------------------


def test_waits_for_another_download_and_takes_its_files(
    server: HubServer, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock = root / REPO / ".diffsynth" / "lock"
    lock.parent.mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool, caplog.at_level(logging.INFO, logger=hub.__name__):
        with FileLock(lock):
            waiting = pool.submit(hub.fetch, REPO, [SHARD_GLOB], root=root)
            deadline = time.monotonic() + 10
            while "Waiting for another download" not in caplog.text and time.monotonic() < deadline:
                time.sleep(0.01)
            assert not waiting.done()
            store(root, {name: FILES[name] for name in SHARDS})
        assert names(waiting.result(timeout=10), root) == SHARDS
    assert server.requests == []


def test_processes_at_once_transfer_each_file_once(server: HubServer, source: str, root: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from diffsynth.weights import hub;"
        f"print(len(hub.fetch({REPO!r}, [{SHARD_GLOB!r}], source={source!r}, root=sys.argv[1])))"
    )
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", code, str(root)]
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=60)[0].strip() for process in started] == ["3", "3"]
    assert on_disk(root) == {name: FILES[name] for name in SHARDS}
    assert dict(server.served) == {name: len(FILES[name]) for name in SHARDS}
