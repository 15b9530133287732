# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""A folder is saved all or nothing: whatever fails, and whoever reads or writes it at the same time."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from helpers.models import make_model, make_plugins
from helpers.paths import ROOT
from tqdm import tqdm

from tocom_hf import PluginFileError, PluginSet, TocomModel
from tocom_hf.plugins.composition import Factors
from tocom_hf.storage.transaction import FolderChangedError, find_snapshots, generation, retry_while_saved, write_folder


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path):
    with write_folder(tmp_path / "folder") as fresh:
        (fresh / "sub").mkdir()
        for name in ("a", "b", "sub/c", "sub/old"):
            (fresh / name).write_text("one")
    return tmp_path / "folder"


def write_two(folder, **settings):
    with write_folder(folder, **settings) as fresh:
        (fresh / "sub").mkdir()
        (fresh / "more").mkdir()
        for name in ("a", "sub/c", "more/d"):
            (fresh / name).write_text("two")


BEFORE = {"a": "one", "b": "one", "sub/c": "one", "sub/old": "one"}
AFTER = {"a": "two", "b": "one", "sub/c": "two", "more/d": "two"}


def test_files_are_replaced_and_what_belongs_to_them_goes(folder):
    write_two(folder, replaces=[r"sub/\w+"])
    assert content(folder) == AFTER
    assert sorted(os.listdir(folder)) == ["a", "b", "more", "sub"]


@pytest.mark.parametrize("step", range(6))
@pytest.mark.parametrize("links", [True, False], ids=["hard links", "copies"])
def test_a_failure_at_any_step_leaves_the_folder_as_it_was(folder, monkeypatch, step, links):
    count = 0
    calls = {name: getattr(os, name) for name in ("replace", "unlink", "link")}

    def failing(name):
        def call(source, *arguments, **keywords):
            nonlocal count
            if name == "link" and not links:
                raise OSError(errno.EPERM, "no links here")
            if name != "link" and "/old/" not in str(source) and ".lock" not in str(source):
                count += 1
                if count == step + 1:
                    raise OSError(errno.EIO, "broken")
            return calls[name](source, *arguments, **keywords)

        return call

    for name in calls:
        monkeypatch.setattr(f"tocom_hf.storage.transaction.os.{name}", failing(name))
    with pytest.raises(PluginFileError, match="No file has changed"):
        write_two(folder, replaces=[r"sub/\w+"])
    monkeypatch.undo()
    assert content(folder) == BEFORE
    write_two(folder, replaces=[r"sub/\w+"])
    assert content(folder) == AFTER


def test_a_failed_first_save_leaves_no_folder(tmp_path):
    with pytest.raises(KeyboardInterrupt), write_folder(tmp_path / "new" / "deep") as fresh:
        (fresh / "a").write_text("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


KILLED = """
import os, signal, sys
from tocom_hf.storage import transaction
replace, count = os.replace, iter(range(100))
def killing(source, destination):
    if "new" in str(source) and next(count) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, destination)
transaction.os.replace = killing
with transaction.write_folder(sys.argv[1], replaces=[r"sub/\\w+"]) as fresh:
    for name in ("a", "sub/c", "more/d"):
        (fresh / name).parent.mkdir(exist_ok=True)
        (fresh / name).write_text("two")
"""


@pytest.mark.parametrize("step", [0, 2])
def test_what_a_killed_save_left_is_undone_by_the_next_who_reads_or_writes(folder, step):
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(step)], cwd=ROOT, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert (folder / ".tocom-saving" / "journal.json").exists()
    generation(folder, "a")
    assert content(folder) == BEFORE
    assert sorted(os.listdir(folder)) == ["a", "b", "sub"]


@pytest.mark.parametrize(
    "journal",
    [
        '{"../victim": false}', '{"/tmp/victim": true}', '{"sub/../../victim": false}', '{"a": 1}', '["a"]', "{", "3",
        "[" * 99_999, '{"link/victim": false}',
    ],
)  # fmt: skip
def test_a_journal_of_a_stranger_moves_nothing_out_of_the_folder(folder, tmp_path, journal):
    (tmp_path / "victim").write_text("mine")
    (folder / "link").symlink_to(tmp_path)
    (folder / ".tocom-saving").mkdir()
    (folder / ".tocom-saving" / "journal.json").write_text(journal)
    for action in (lambda: generation(folder, "a"), lambda: write_two(folder)):
        with pytest.raises(PluginFileError, match="is not one that this package wrote"):
            action()
    assert (tmp_path / "victim").read_text() == "mine"
    assert {name: text for name, text in content(folder).items() if name in BEFORE} == BEFORE


def test_kept_files_of_a_stranger_come_from_the_folder_only(folder, tmp_path):
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "a").write_text("mine")
    (folder / ".tocom-saving").mkdir()
    (folder / ".tocom-saving" / "old").symlink_to(tmp_path / "secrets")
    (folder / ".tocom-saving" / "journal.json").write_text('{"a": true}')
    with pytest.raises(PluginFileError, match="is not one that this package wrote"):
        generation(folder, "a")
    assert (tmp_path / "secrets" / "a").read_text() == "mine"


def test_outdated_files_behind_a_link_stay(folder, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "old").write_text("mine")
    (folder / "linked").symlink_to(tmp_path / "theirs")
    with pytest.raises(PluginFileError, match="outside of"):
        write_two(folder, replaces=[r"\w+/\w+"])
    assert (tmp_path / "theirs" / "old").read_text() == "mine"


def test_a_folder_in_the_way_of_a_file_is_named(folder):
    (folder / "d").mkdir()
    with pytest.raises(PluginFileError, match="is a folder"), write_folder(folder) as fresh:
        (fresh / "d").write_text("")
    assert content(folder) == BEFORE


def test_a_save_does_not_follow_links_out_of_the_folder(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PluginFileError, match="outside of"):
        write_two(folder)
    assert os.listdir(tmp_path / "elsewhere") == []


def test_a_set_that_is_saved_anew_after_it_was_opened_is_not_mixed(plugins, model, tmp_path):
    plugins.save_pretrained(tmp_path)
    opened = PluginSet.from_pretrained(tmp_path)
    opened.compose(0, 2)
    make_plugins(model, seed=9).save_pretrained(tmp_path)
    with pytest.raises(FolderChangedError, match="Load it again"):
        opened.compose(0, 3)


def test_reading_is_tried_again_a_few_times():
    tries = []

    def load():
        tries.append(1)
        if len(tries) < 4:
            raise FolderChangedError("changed")
        return "loaded"

    assert retry_while_saved(load) == "loaded"
    with pytest.raises(FolderChangedError):
        retry_while_saved(lambda: tries.clear() or load(), attempts=5)


def uniform(value, model):
    """A set whose every factor is one number, so that any mixture shows."""
    plugins = make_plugins(model, max_r=4)
    for index, adapter in plugins._adapters.items():
        plugins._adapters[index] = {
            path: Factors(*(torch.full_like(factor, value) for factor in factors)) for path, factors in adapter.items()
        }
    plugins.config.training = {"value": value}
    return plugins


def keep_saving(folder, value, until):
    # tqdm's lock is shared with forked processes: one that is stopped while it has it would block the others for ever
    tqdm.set_lock(threading.RLock())
    model = make_model()
    if isinstance(value, tuple):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "k_proj.weight" not in name:
                    parameter.fill_(value[0])
        composed = TocomModel.from_pretrained(model, plugins=uniform(value[0], model), source_r=int(value[0]))
        save = composed.save_pretrained
    else:
        save = uniform(value, model).save_pretrained
    while time.monotonic() < until:
        save(folder)
        time.sleep(0.02)  # somebody may read, too


@pytest.mark.parametrize("what", ["set", "model"])
def test_concurrent_saves_and_loads_never_show_a_mixture(tmp_path, what):
    folder, seen, until = tmp_path / "shared", set(), time.monotonic() + 60
    values = [1.0, 2.0] if what == "set" else [(1.0,), (2.0,)]
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=keep_saving, args=(folder, value, until)) for value in values]
    for writer in writers:
        writer.start()
    try:
        loads = 0
        while (loads < 40 or len(seen) < 2) and time.monotonic() < until:
            if not (folder / "tocom_config.json").exists() and not (folder / "config.json").exists():
                continue
            if what == "set":
                plugins = retry_while_saved(lambda: load_all(PluginSet.from_pretrained(folder)))
                value, found = plugins.config.training["value"], numbers(plugins)
            else:
                model = TocomModel.from_pretrained(folder)
                value = float(model.source_r)
                found = {model.plugins.config.training["value"], model.vit.layernorm.weight[0].item()}
                found |= {model.classifier.weight[0, 0].item(), *numbers_so_far(model.plugins)}
            assert found == {value}
            seen.add(value)
            loads += 1
    finally:
        for writer in writers:
            writer.terminate()
            writer.join()
    assert seen == {1.0, 2.0}
    generation(
        folder, "tocom_config.json" if what == "set" else "config.json"
    )  # a writer may have been stopped mid-way
    json.loads((folder / ("tocom_config.json" if what == "set" else "config.json")).read_text())


def load_all(plugins):
    plugins.compose(0, 4)
    return plugins


def numbers(plugins):
    return {f.lora_A[0, 0].item() for i in range(4) for f in plugins.adapter(i).values()}


def numbers_so_far(plugins):
    return {f.lora_A[0, 0].item() for adapter in plugins._adapters.values() for f in adapter.values()}


def test_a_cache_may_lie_below_a_folder_named_snapshots(plugins, tmp_path):
    root = tmp_path / "snapshots" / "hf" / "models--user--set"
    commit = root / "snapshots" / "0123abc"
    plugins.save_pretrained(root / "real")
    for path in sorted((root / "real").rglob("*.*")):
        link = commit / path.relative_to(root / "real")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    assert PluginSet.from_pretrained(commit).compose(0, 2).rank == 4
    assert find_snapshots(commit / "tocom_config.json") == root / "snapshots"
    assert find_snapshots(tmp_path / "snapshots" / "set" / "tocom_config.json") is None
