"""Both hubs on 127.0.0.1: as much of their protocols as the real client libraries need to list and to download.

A test fills `repos` and reads `requests` and `served`; `cuts`, `lies` and `hide_ranges` make the server misbehave.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 1000  # bytes; from here on a file is stored outside of git and served after a redirect, as on the real hubs


def safetensors(tensor_bytes: int, fill: int = 0) -> bytes:
    """A valid safetensors file holding one uint8 tensor of that many bytes."""
    entry = {"w": {"dtype": "U8", "shape": [tensor_bytes], "data_offsets": [0, tensor_bytes]}}
    header = json.dumps(entry).encode()
    return len(header).to_bytes(8, "little") + header + bytes([fill]) * tensor_bytes


class HubServer(ThreadingHTTPServer):
    """One server that is ModelScope under `/api/v1/` and Hugging Face elsewhere."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.served: Counter[str] = Counter()  # body bytes sent, by file name
        self.cuts: dict[str, int] = {}  # file name -> close the connection after that many bytes, once
        self.lies: dict[str, bytes] = {}  # file name -> what is sent instead of the announced content
        self.hide_ranges = False  # answer a Range request with the whole file

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def storage(self) -> str:
        """The same server under another host name: the clients treat it as a foreign storage host."""
        return f"http://localhost:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away in the middle is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        url = urlsplit(self.path)
        parts = unquote(url.path).strip("/").split("/")
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if parts[:2] == ["api", "v1"]:
            self._modelscope(parts[2:], query)
        elif parts[:2] == ["api", "models"]:
            self._huggingface_api(parts[2:])
        elif parts[0] == "storage":
            self._content("/".join(parts[1:3]), "/".join(parts[3:]))
        elif len(parts) > 3 and parts[2] == "resolve":
            self._huggingface_file("/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self._json({}, 404)

    # --- ModelScope ---

    def _modelscope(self, parts: list[str], query: dict[str, str]) -> None:
        repo = "/".join(parts[1:3])
        if parts[0] != "models" or repo not in self.server.repos:
            self._json({"Code": 10010205001, "Message": "not exists", "Success": False}, 404)
        elif parts[3:] == ["repo", "files"]:
            root = query.get("Root", "").strip("/")
            files = self.server.repos[repo]
            entries = [_modelscope_entry(name, data) for name, data in files.items() if _below(root, name)]
            folders = {name.rsplit("/", 1)[0] for name in files if "/" in name and _below(root, name)}
            entries += [{"Path": name, "Name": name, "Type": "tree", "Size": 0} for name in sorted(folders)]
            self._json({"Code": 200, "Data": {"Files": entries}, "Success": True})
        elif parts[3:] == ["repo"]:
            self._file(repo, query["FilePath"], {})
        else:
            self._json({"Code": 200, "Data": {"Path": parts[1], "Name": parts[2]}, "Success": True})

    # --- Hugging Face ---

    def _huggingface_api(self, parts: list[str]) -> None:
        repo = "/".join(parts[:2])
        if repo not in self.server.repos:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif parts[2:3] == ["tree"]:
            self._json([_huggingface_entry(name, data) for name, data in self.server.repos[repo].items()])
        else:
            siblings = [{"rfilename": name} for name in self.server.repos[repo]]
            self._json({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings})

    def _huggingface_file(self, repo: str, name: str) -> None:
        data = self.server.repos.get(repo, {}).get(name)
        headers = {"X-Repo-Commit": COMMIT}
        if data is not None:
            headers["ETag"] = f'"{hashlib.sha1(data).hexdigest()}"'
            if len(data) >= LARGE:
                headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        self._file(repo, name, headers)

    # --- Files ---

    def _file(self, repo: str, name: str, headers: dict[str, str]) -> None:
        data = self.server.repos.get(repo, {}).get(name)
        if data is None:
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", **headers})
        elif len(data) >= LARGE:
            location = f"{self.server.storage}/storage/{repo}/{quote(name)}"
            self._send(302, b"", {"Location": location, **headers})
        else:
            self._content(repo, name, headers)

    def _content(self, repo: str, name: str, headers: dict[str, str] | None = None) -> None:
        data = self.server.lies.get(name, self.server.repos[repo][name])
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes", **(headers or {})}
        asked = self.headers.get("Range")
        if asked and not self.server.hide_ranges:
            first, last = asked.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            self._send(206, data[start : end + 1], headers, name)
        else:
            self._send(200, data, headers, name)

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str], name: str | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.server.cuts.pop(name, None) if name else None
        sent = body if cut is None else body[:cut]
        self.wfile.write(sent)
        if name:
            self.server.served[name] += len(sent)
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True


def _below(root: str, name: str) -> bool:
    return not root or name.startswith(f"{root}/")


def _modelscope_entry(name: str, data: bytes) -> dict[str, object]:
    digest = hashlib.sha256(data).hexdigest()
    return {"Path": name, "Name": name.rsplit("/", 1)[-1], "Type": "blob", "Size": len(data), "Sha256": digest}


def _huggingface_entry(name: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if len(data) >= LARGE:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


@contextmanager
def running_server() -> Iterator[HubServer]:
    """A server on a free port of 127.0.0.1 for as long as the block runs."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
