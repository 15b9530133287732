# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""A small Hub on this machine: the routes that the real `huggingface_hub` client uses here, with faults on demand.

Large files go through the Git LFS protocol and are downloaded from another origin, as on the real Hub, so that
redirects, linked ETags and dropped authorization are exercised. Xet is not served: clients set `HF_HUB_DISABLE_XET=1`.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import sleep
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


@dataclass
class Fault:
    """What goes wrong with requests of a method whose path matches: an error status, or damage to the answer.

    Attributes:
        method, path: Regular expressions.
        status: HTTP status to answer, or 0 for damage only.
        code: The `X-Error-Code` header, such as `GatedRepo`.
        damage: `hangup` (the connection breaks before the answer), `drop` (half-way through it), `slow`, `corrupt` (one
            byte is wrong) or `short` (half of the file as if it were all).
        times: How often it happens.
        headers: More headers of the answer.
    """

    path: str
    method: str = "GET|HEAD|POST|PUT"
    status: int = 0
    code: str = ""
    damage: str = ""
    times: float = float("inf")
    headers: dict = field(default_factory=dict)


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by commit id: files by path
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "") -> str:
        oid = hashlib.sha1(f"{branch}{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)


class Answer(NamedTuple):
    """What was answered: the size of a whole body, of which a fault may have dropped a part."""

    method: str
    path: str
    size: int
    status: int


class Hub:
    """The server's state. `token` writes, `reader` only reads; both belong to `user`.

    Attributes:
        before_upload: Called with the repository when a client has begun an upload, before it commits.
    """

    def __init__(self, listener: socket.socket | None = None):
        self.reset()
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler, bind_and_activate=listener is None)
        if listener is not None:
            self.server.socket.close()
            self.server.socket, self.server.server_address = listener, listener.getsockname()
        self.server.hub = self  # type: ignore[attr-defined]
        self.port = self.server.socket.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.storage = f"http://localhost:{self.port}"  # another origin, as the Hub's storage is
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()

    def reset(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.answers: list[Answer] = []
        self.before_upload: Callable[[Repo], object] | None = None

    def publish(self, repo_id: str, folder, private: bool = False) -> str:
        """Put a folder there without the protocol."""
        repo = self.repos.setdefault(repo_id, Repo(private))
        return repo.commit({p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()})

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return repo.commits[repo.resolve(revision)]

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            self.requests.append(f"{method} {path}")
            for fault in self.faults:
                if fault.times > 0 and re.fullmatch(fault.method, method) and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".png"))


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Error(Exception):
    def __init__(self, status: int, message: str, code: str = "", **body: str):
        self.status, self.message, self.code, self.body = status, message, code, body


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        fault = hub.fault_for(self.command, path)
        try:
            if fault is not None and fault.damage == "hangup":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if fault is not None and fault.status:
                raise _Error(fault.status, fault.code or "injected", fault.code)
            with hub.lock:
                for method, pattern, route in _ROUTES:
                    match = re.fullmatch(pattern, path)
                    if match and self.command in method:
                        answer = route(self, hub, query, **match.groupdict())
                        break
                else:
                    raise _Error(404, f"no route {self.command} {path}")
            self.send(*answer, fault=fault)
        except _Error as error:
            headers = {"X-Error-Message": error.message, **(fault.headers if fault else {})}
            if error.code:
                headers["X-Error-Code"] = error.code
            self.send(json.dumps({"error": error.message, **error.body}).encode(), headers, error.status)

    do_HEAD = do_POST = do_PUT = do_GET

    def send(self, body: bytes, headers: dict | None = None, status: int = 200, fault: Fault | None = None) -> None:
        damage = fault.damage if fault and self.command == "GET" else ""
        if damage == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if damage == "short":
            body = body[: len(body) // 2]
        if damage == "slow":
            sleep(0.6)
        with self.server.hub.lock:  # type: ignore[attr-defined]
            answer = Answer(self.command, urlsplit(self.path).path, len(body), status)
            self.server.hub.answers.append(answer)  # type: ignore[attr-defined]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if damage == "drop" else body)
        except OSError:  # the client has given up
            self.close_connection = True
        if damage == "drop":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def user(self, hub: Hub) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in ("token", "reader"):
            raise _Error(401, "Invalid credentials in Authorization header")
        return token or None

    def repo(self, hub: Hub, repo_id: str, write: bool = False) -> Repo:
        user, repo = self.user(hub), hub.repos.get(repo_id)
        if repo is None or (repo.private and user is None):
            raise _Error(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and user != "token":
            raise _Error(403 if user else 401, "You don't have the right to write")
        return repo

    def commit_of(self, repo: Repo, revision: str) -> str:
        oid = repo.resolve(revision)
        if oid is None:
            raise _Error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    def create_repo(self, hub: Hub, query: dict) -> tuple:
        user, wanted = self.user(hub), json.loads(self.body)
        if user != "token":
            raise _Error(403 if user else 401, "You don't have the right to create a repository")
        repo_id = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        if repo_id in hub.repos:
            raise _Error(409, "You already created this model repo", url=f"{hub.endpoint}/{repo_id}")
        hub.repos[repo_id] = Repo(private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        hub.repos[repo_id].commit({".gitattributes": b""}, message="initial commit")
        return _json({"url": f"{hub.endpoint}/{repo_id}", "name": repo_id, "id": repo_id})

    def create_branch(self, hub: Hub, query: dict, repo_id: str, branch: str) -> tuple:
        repo = self.repo(hub, repo_id, write=True)
        if branch in repo.branches:
            raise _Error(409, "Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        return _json({})

    def model_info(self, hub: Hub, query: dict, repo_id: str, revision: str | None = None) -> tuple:
        repo = self.repo(hub, repo_id)
        oid = self.commit_of(repo, revision or "main")
        siblings = [{"rfilename": name} for name in repo.commits[oid]]
        return _json({"id": repo_id, "modelId": repo_id, "sha": oid, "private": repo.private, "siblings": siblings})

    def tree(self, hub: Hub, query: dict, repo_id: str, revision: str) -> tuple:
        repo = self.repo(hub, repo_id)
        files = repo.commits[self.commit_of(repo, revision)]
        return _json([{"type": "file", "path": p, "size": len(c), "oid": git_id(c)} for p, c in files.items()])

    def preupload(self, hub: Hub, query: dict, repo_id: str, revision: str) -> tuple:
        repo = self.repo(hub, repo_id, write=True)
        if hub.before_upload is not None:
            hub.before_upload(repo)
        files, answer = repo.commits[self.commit_of(repo, revision)], []
        for entry in json.loads(self.body)["files"]:
            path = entry["path"]
            old, large = files.get(path), is_large(path)
            oid = None if old is None else hashlib.sha256(old).hexdigest() if large else git_id(old)
            mode = "lfs" if large else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return _json({"files": answer})

    def lfs_batch(self, hub: Hub, query: dict, repo_id: str) -> tuple:
        self.repo(hub, repo_id, write=True)
        objects = []
        for entry in json.loads(self.body)["objects"]:
            oid = entry["oid"]
            links = {"upload": {"href": f"{hub.storage}/storage/{oid}"}, "verify": {"href": f"{hub.endpoint}/verify"}}
            objects.append({**entry, **({} if oid in hub.lfs else {"actions": links})})
        return _json({"transfer": "basic", "objects": objects})

    def lfs_put(self, hub: Hub, query: dict, oid: str) -> tuple:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Error(400, "checksum mismatch")
        hub.lfs[oid] = self.body
        return _json({})

    def lfs_verify(self, hub: Hub, query: dict) -> tuple:
        entry = json.loads(self.body)
        if len(hub.lfs.get(entry["oid"], b"")) != entry["size"]:
            raise _Error(404, "object is not there")
        return _json({})

    def commit(self, hub: Hub, query: dict, repo_id: str, revision: str) -> tuple:
        repo = self.repo(hub, repo_id, write=True)
        head = self.commit_of(repo, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header, files = lines[0]["value"], dict(repo.commits[head])
        if header.get("parentCommit") not in (None, head):
            raise _Error(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.lfs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        create_pr = "create_pr" in query
        branch = f"refs/pr/{len(repo.commits)}" if create_pr else revision
        oid = repo.commit(files, branch, header["summary"])
        url = f"{hub.endpoint}/{repo_id}/discussions/{len(repo.commits)}" if create_pr else None
        link = f"{hub.endpoint}/{repo_id}/commit/{oid}"
        return _json({"commitUrl": link, "commitOid": oid, "pullRequestUrl": url, "success": True})

    def file(self, hub: Hub, query: dict, repo_id: str, revision: str, path: str) -> tuple:
        repo = self.repo(hub, repo_id)
        oid = self.commit_of(repo, revision)
        content = repo.commits[oid].get(path)
        if content is None:
            raise _Error(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if is_large(path):
            digest = hashlib.sha256(content).hexdigest()
            hub.lfs[digest] = content
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{digest}"'}
            return b"", {**headers, "Location": f"{hub.storage}/storage/{digest}"}, 302
        return self.ranged(content, {**headers, "ETag": f'"{git_id(content)}"'})

    def stored(self, hub: Hub, query: dict, oid: str) -> tuple:
        if self.headers.get("Authorization"):
            raise _Error(400, "a token was sent to the storage")
        return self.ranged(hub.lfs[oid], {"ETag": f'"{oid[:32]}"', "Accept-Ranges": "bytes"})

    def ranged(self, content: bytes, headers: dict) -> tuple:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if match is None:
            return content, headers, 200
        start, end = int(match[1]), int(match[2] or len(content) - 1)
        return content[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"}, 206

    def validate_yaml(self, hub: Hub, query: dict) -> tuple:
        """The rules of the Hub for a card's metadata that concern what this package writes."""
        block = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], flags=re.DOTALL)
        if block is None:
            return _json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})
        try:
            errors = metadata_errors(yaml.safe_load(block[1]))
        except yaml.YAMLError as error:
            errors = [str(error)]
        return _json({"errors": [{"message": error} for error in errors], "warnings": []}, 400 if errors else 200)


def metadata_errors(data: dict) -> list[str]:
    """What the Hub would refuse in a card's metadata."""
    errors = []
    lists, texts = ("tags", "datasets"), ("license", "library_name", "base_model", "pipeline_tag")
    errors += [f"{key} must be a list of strings" for key in lists if {type(x) for x in data.get(key, [])} - {str}]
    errors += [f"{key} must be a string" for key in texts if not isinstance(data.get(key, ""), str)]
    if data.get("base_model_relation") not in (None, "adapter", "finetune", "merge", "quantized"):
        errors.append("base_model_relation is unknown")
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str):
            errors.append("model-index needs a name")
        for result in model["results"]:
            if not {"type"} <= result["task"].keys() or not {"type", "name"} <= result["dataset"].keys():
                errors.append("a result needs task.type, dataset.type and dataset.name")
            if not all("type" in metric and "value" in metric for metric in result["metrics"]):
                errors.append("a metric needs type and value")
    return errors


def _json(content, status: int = 200) -> tuple:
    return json.dumps(content).encode(), {"Content-Type": "application/json"}, status


_ID = r"(?P<repo_id>[\w.-]+(?:/[\w.-]+)?)"
_ROUTES = [
    (("POST",), r"/api/repos/create", _Handler.create_repo),
    (("POST",), r"/api/validate-yaml", _Handler.validate_yaml),
    (("POST",), rf"/api/models/{_ID}/branch/(?P<branch>.+)", _Handler.create_branch),
    (("POST",), rf"/api/models/{_ID}/preupload/(?P<revision>.+)", _Handler.preupload),
    (("POST",), rf"/api/models/{_ID}/commit/(?P<revision>.+)", _Handler.commit),
    (("GET",), rf"/api/models/{_ID}/tree/(?P<revision>[^/]+)", _Handler.tree),
    (("GET",), rf"/api/models/{_ID}/revision/(?P<revision>.+)", _Handler.model_info),
    (("GET",), rf"/api/models/{_ID}", _Handler.model_info),
    (("POST",), rf"/{_ID}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("PUT",), r"/storage/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    (("GET", "HEAD"), r"/storage/(?P<oid>[0-9a-f]{64})", _Handler.stored),
    (("POST",), r"/verify", _Handler.lfs_verify),
    (("GET", "HEAD"), rf"/{_ID}/resolve/(?P<revision>[^/]+|refs/pr/\d+)/(?P<path>.+)", _Handler.file),
]
