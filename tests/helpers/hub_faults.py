# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What can go wrong between this package, the disk and the Hub: each fault, what the user sees, what is left.

`test_hub.py` checks every row; `make faults` prints them for docs/faults.md.
"""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from huggingface_hub import constants, file_download

from helpers import hub_server
from helpers.hub_server import Fault
from tocom_hf import PluginSet, TocomModel
from tocom_hf.plugins import adapters


@dataclass
class Situation:
    """A Hub, a set and a model to load it into, and a folder for files."""

    hub: hub_server.Hub
    plugins: PluginSet
    model: Any
    tmp_path: Any
    monkeypatch: Any


class Outcome(NamedTuple):
    error: BaseException | None
    left: str
    model_unchanged: bool


class Row(NamedTuple):
    """A fault.

    Attributes:
        name: The fault, for the table.
        during: What the user does.
        inject: Sets it up.
        message: Part of the error's message, or `None` where the user notices nothing.
        left: What is on the disk, or on the Hub, afterwards.
        arguments: Arguments of the user's call.
    """

    name: str
    during: Callable[[Situation, dict], Outcome]
    inject: Callable[[Situation], None]
    message: str | None
    left: str
    arguments: dict = {}

    def run(self, situation: Situation) -> Outcome:
        return self.during(situation, {"inject": self.inject, **self.arguments})


def load(situation: Situation, arguments: dict) -> Outcome:
    """`TocomModel.from_pretrained(model, plugins="user/set", source_r=2, target_r=4)`."""
    hub, model = situation.hub, situation.model
    situation.plugins.push_to_hub("user/set", token="token")
    arguments = dict(arguments)
    warm = arguments.pop("warm", False)
    if warm:
        PluginSet.from_pretrained("user/set").compose(2, 4)
    arguments.pop("inject")(situation)
    before, error = {name: weight.clone() for name, weight in model.state_dict().items()}, None
    try:
        plugins = PluginSet.from_pretrained(arguments.pop("repo_id", "user/set"), **arguments)
        TocomModel.from_pretrained(model, plugins=plugins, source_r=2, target_r=4)
    except Exception as caught:
        error = caught
    same = all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    cache = situation.tmp_path / "cache"
    files = [path for path in cache.rglob("*") if path.is_file() or path.is_symlink()]
    found = [path for path in files if "snapshots" in path.parts]
    whole = {path.parent.name for path in found if path.name == "adapter_model.safetensors"}
    plugins = {path.parent.name for path in found if path.name == "adapter_config.json"}
    names = {path.name for path in found if not path.name.startswith("adapter")} | whole
    names |= {f"{name} (adapter_config.json only)" for name in plugins - whole}
    if any(path.name.endswith(".incomplete") for path in files):
        names.add("a partial file")
    hub.faults = []
    stock = error is None or not isinstance(model, TocomModel)
    return Outcome(error, "cache: " + (", ".join(sorted(names)) or "nothing"), error is None or (same and stock))


def push(situation: Situation, arguments: dict) -> Outcome:
    """`plugins.push_to_hub("user/set")`."""
    hub, error = situation.hub, None
    arguments = dict(arguments)
    if arguments.pop("twice", False):
        situation.plugins.push_to_hub("user/set", token="token")
        situation.plugins.config.training["changed"] = True
    arguments.pop("inject")(situation)
    commits = [len(repo.messages) for repo in hub.repos.values()]
    try:
        situation.plugins.push_to_hub("user/set", **{"token": "token", **arguments})
    except Exception as caught:
        error = caught
    hub.faults = []
    if "user/set" not in hub.repos:
        left = "Hub: nothing"
    elif not commits and len(hub.repos["user/set"].messages) == 1:
        left = "Hub: the new repository, empty"
    elif len(hub.repos["user/set"].messages) == (commits or [1])[0]:
        left = "Hub: as before"
    else:
        left = "Hub: the commit"
    return Outcome(error, left, True)


def save(situation: Situation, arguments: dict) -> Outcome:
    """`model.save_pretrained(folder)` over an earlier save."""
    folder, error = situation.tmp_path / "saved", None
    model = TocomModel.from_pretrained(situation.model, plugins=situation.plugins, source_r=2, target_r=4)
    model.save_pretrained(folder)
    before = _content(folder)
    model.set_target_r(3)
    arguments["inject"](situation)
    try:
        model.save_pretrained(folder)
    except Exception as caught:
        error = caught
    finally:
        situation.monkeypatch.undo()
    same = _content(folder) == before
    return Outcome(error, "folder: as before" if same else "folder: changed", model.target_r == 3)


def _content(folder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def faulty(*arguments, **keywords):
    def inject(situation: Situation) -> None:
        situation.hub.faults = [Fault(*arguments, **keywords)]

    return inject


def _nothing(situation: Situation) -> None:
    pass


def _make_private(situation: Situation) -> None:
    situation.hub.repos["user/set"].private = True


def _lose_a_file(situation: Situation) -> None:
    files = situation.hub.files("user/set")
    files.pop("P_3_4/adapter_model.safetensors")


def _go_offline(situation: Situation) -> None:
    situation.monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def _disconnect(situation: Situation) -> None:
    closed = "http://127.0.0.1:9"
    situation.monkeypatch.setattr(constants, "ENDPOINT", closed)
    template = closed + "/{repo_id}/resolve/{revision}/{filename}"
    situation.monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def _be_impatient(situation: Situation) -> None:
    situation.monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.15)


def _slow_once(situation: Situation) -> None:
    _be_impatient(situation)
    situation.hub.faults = [Fault("/storage/", "GET", damage="slow", times=1)]


def _slow_always(situation: Situation) -> None:
    _be_impatient(situation)
    situation.hub.faults = [Fault("/storage/", "GET", damage="slow")]


def _full(*arguments, **keywords):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _fill_the_cache_disk(situation: Situation) -> None:
    def write_half(url, file, **keywords):
        file.write(b"half")
        _full()

    situation.monkeypatch.setattr(file_download, "http_get", write_half)


def _fill_the_disk(situation: Situation) -> None:
    situation.monkeypatch.setattr(adapters, "save_file", _full)


def _fail_a_rename(situation: Situation) -> None:
    replace, count = os.replace, iter(range(1000))

    def fail(source, destination):
        if "new" in str(source) and next(count) == 3:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        replace(source, destination)

    situation.monkeypatch.setattr(os, "replace", fail)


def _overtake(situation: Situation) -> None:
    def commit_the_same(repo: hub_server.Repo) -> None:
        repo.commits["f" * 40] = situation.hub.files("user/set")
        repo.branches["main"] = "f" * 40

    situation.hub.before_upload = commit_the_same


_FIRST = "cache: P_2_3 (adapter_config.json only), tocom_config.json"
_SECOND = "cache: P_2_3, P_3_4 (adapter_config.json only), tocom_config.json"
_ALL = "cache: P_2_3, P_3_4, tocom_config.json"
_PLUGIN = "P_3_4/adapter_model"
FAULTS = [
    Row(
        "401, wrong token", load, _nothing, "the token is missing or no longer valid", "cache: nothing", {"token": "x"}
    ),
    Row(
        "401, private repository without a token",
        load,
        _make_private,
        "it is private and you may not",
        "cache: nothing",
    ),
    Row("403, gated repository", load, faulty("resolve", status=403, code="GatedRepo"), "is gated", "cache: nothing"),
    Row("403", load, faulty(_PLUGIN, status=403), "the token may not do this", _SECOND),
    Row(
        "404, no such repository",
        load,
        _nothing,
        "does not exist",
        "cache: nothing",
        {"repo_id": "user/none", "token": "reader"},
    ),
    Row("404, no such revision", load, _nothing, "has no revision 'v9'", "cache: nothing", {"revision": "v9"}),
    Row("404, no such file", load, _lose_a_file, "has no such file", _SECOND),
    Row("429 once", load, faulty(_PLUGIN, "HEAD", status=429, times=1, headers={"Retry-After": "1"}), None, _ALL),
    Row("429 always", load, faulty(_PLUGIN, status=429), "too many requests", _SECOND),
    Row("500 once", load, faulty(_PLUGIN, "HEAD", status=500, times=1), None, _ALL),
    Row("500 always", load, faulty(_PLUGIN, status=500), "the Hub has a problem of its own", _SECOND),
    Row("500 always, set in the cache", load, faulty("", status=500), None, _ALL, {"warm": True}),
    Row("connection dropped once", load, faulty("/storage/", "GET", damage="drop", times=1), None, _ALL),
    Row("connection dropped always", load, faulty("/storage/", "GET", damage="drop"), "connection broke", _FIRST),
    Row("storage hangs up", load, faulty("/storage/", "GET", damage="hangup"), "connection broke", _FIRST),
    Row("no connection at all", load, _disconnect, "cannot be reached", "cache: nothing"),
    Row("no connection at all, set in the cache", load, _disconnect, None, _ALL, {"warm": True}),
    Row("slow answer once", load, _slow_once, None, _ALL),
    Row("slow answers always", load, _slow_always, "connection broke", _FIRST),
    Row(
        "wrong checksum (one byte)",
        load,
        faulty("/storage/", "GET", damage="corrupt", times=1),
        "arrived damaged",
        _FIRST,
    ),
    Row("fewer bytes than announced", load, faulty("/storage/", "GET", damage="short"), "fewer or more bytes", _FIRST),
    Row("full disk", load, _fill_the_cache_disk, "the disk is full", "cache: nothing"),
    Row("offline", load, _go_offline, "not in the cache", "cache: nothing"),
    Row("offline, set in the cache", load, _go_offline, None, _ALL, {"warm": True}),
    Row("401, no token", push, _nothing, "the token is missing", "Hub: nothing", {"token": False}),
    Row(
        "403, token that may only read",
        push,
        _nothing,
        "Use one with the permission",
        "Hub: nothing",
        {"token": "reader"},
    ),
    Row(
        "409 on the commit",
        push,
        faulty("/commit/", status=409),
        "somebody else changed",
        "Hub: the new repository, empty",
    ),
    Row(
        "412, overtaken by another upload", push, _overtake, "somebody else changed", "Hub: as before", {"twice": True}
    ),
    Row(
        "429 once",
        push,
        faulty("/preupload/", status=429, times=1, headers={"Retry-After": "1"}),
        None,
        "Hub: the commit",
    ),
    Row("429 always", push, faulty("/preupload/", status=429), "too many requests", "Hub: the new repository, empty"),
    Row("500 once, on a large file", push, faulty("/storage/", "PUT", status=500, times=1), None, "Hub: the commit"),
    Row(
        "500 always, on a large file",
        push,
        faulty("/storage/", "PUT", status=500),
        "problem of its own",
        "Hub: the new repository, empty",
    ),
    Row(
        "500 on the commit",
        push,
        faulty("/commit/", status=500),
        "problem of its own",
        "Hub: the new repository, empty",
    ),
    Row(
        "connection dropped on a large file",
        push,
        faulty("/storage/", "PUT", damage="hangup"),
        "connection broke",
        "Hub: the new repository, empty",
    ),
    Row(
        "connection dropped on the commit",
        push,
        faulty("/commit/", damage="hangup"),
        "connection broke",
        "Hub: as before",
        {"twice": True},
    ),
    Row("full disk", push, _fill_the_disk, "No file has changed. Free some space", "Hub: nothing"),
    Row("full disk", save, _fill_the_disk, "No file has changed. Free some space", "folder: as before"),
    Row("a file cannot be replaced", save, _fail_a_rename, "Permission denied", "folder: as before"),
]
