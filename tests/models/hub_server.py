"""A model hub on the loopback interface: the few endpoints that huggingface_hub uses to fetch a repository."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server holds and what it was asked. Every revision name leads to COMMIT, except those in `missing`."""

    repositories: dict[str, dict[str, bytes]]
    gated: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)
    url: str = ""
    downloads: list[str] = field(default_factory=list)


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` until the block ends."""

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        owner_name, rest = ("/".join(parts[2:4]), parts[4:]) if is_api else ("/".join(parts[:2]), parts[2:])
        files = self.state.repositories.get(owner_name)
        if files is None:
            return self._send(404, body, {"X-Error-Code": "RepoNotFound"})
        if owner_name in self.state.gated:
            return self._send(403, body, {"X-Error-Code": "GatedRepo"})
        if len(rest) > 1 and rest[1] in self.state.missing:
            return self._send(404, body, {"X-Error-Code": "RevisionNotFound"})
        if is_api and rest[0] == "revision":
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            return self._json({"id": owner_name, "sha": COMMIT, "siblings": siblings})
        if is_api and rest[0] == "tree":
            oid = "0" * 40
            return self._json([{"type": "file", "path": n, "size": len(d), "oid": oid} for n, d in files.items()])
        name = "/".join(rest[2:])
        if rest[0] != "resolve" or name not in files:
            return self._send(404, body, {"X-Error-Code": "EntryNotFound"})
        if body:
            self.state.downloads.append(name)
        etag = hashlib.sha256(files[name]).hexdigest()
        return self._send(200, body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, files[name])

    def _json(self, value: Any) -> None:
        self._send(200, True, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _send(self, status: int, body: bool, headers: dict[str, str], data: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)
