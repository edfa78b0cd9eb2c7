"""A hub on this machine: the few calls of its API that huggingface_hub makes to create, commit and fetch, over HTTP."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest


class Hub:
    """Repositories in memory: id -> {file: content}; `commits` are the names of the files of each commit."""

    def __init__(self):
        self.repos, self.commits, self.made, self.refused = {}, [], [], False
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def sha(self):
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_):
        """Nothing is logged."""

    def answer(self, code, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        path = urlsplit(self.path).path
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub = self.hub
        if hub.refused:
            self.answer(403, {"error": "Forbidden"})
        elif path == "/api/repos/create":
            asked = json.loads(sent)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            hub.made.append(asked)
            hub.repos.setdefault(name, {})
            self.answer(200, {"url": f"{hub.url}/{name}"})
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(sent)["files"]
            ]
            self.answer(200, {"files": files})
        elif "/commit/" in path:
            name = "/".join(path.split("/")[3:5])
            lines = [json.loads(line) for line in sent.splitlines()]
            files = {
                one["value"]["path"]: base64.b64decode(one["value"]["content"])
                for one in lines
                if one["key"] == "file"
            }
            hub.repos[name].update(files)
            hub.commits.append(sorted(files))
            self.answer(200, {"commitUrl": f"{hub.url}/{name}/commit/{hub.sha()}", "commitOid": hub.sha()})
        else:
            self.answer(404, {"error": path})

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        name, file = "/".join(parts[:2]), "/".join(parts[4:])
        held = self.hub.repos.get(name, {}).get(file)
        if parts[2:3] != ["resolve"] or held is None:
            self.answer(404, {}, X_Error_Code="EntryNotFound" if name in self.hub.repos else "RepoNotFound")
        else:
            self.answer(200, held, ETag=f'"{hashlib.sha1(held).hexdigest()}"', X_Repo_Commit=self.hub.sha())

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub that huggingface_hub talks to for a while; its cache is empty."""
    made = Hub()
    for name, value in (
        ("ENDPOINT", made.url), ("HUGGINGFACE_CO_URL_TEMPLATE", f"{made.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"),
        ("HF_HUB_OFFLINE", False), ("HF_HUB_CACHE", str(tmp_path / "cache")),
    ):  # fmt: skip
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", "hf_local")
    yield made
    made.server.shutdown()
    made.server.server_close()
