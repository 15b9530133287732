# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""A folder is saved all or nothing: whatever fails, and whoever reads or writes it at the same time."""

import builtins
import errno
import io
import itertools
import json
import multiprocessing
import os
import random
import signal
import threading
import time

import pytest
import torch
from helpers.models import make_model, make_plugins
from tqdm import tqdm

from tocom_hf import PluginFileError, PluginSet, TocomModel
from tocom_hf.plugins.composition import Factors
from tocom_hf.storage.transaction import FolderChangedError, find_snapshots, generation, retry_while_saved, write_folder


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def make_folder(path):
    with write_folder(path) as fresh:
        (fresh / "sub").mkdir()
        for name in ("a", "b", "sub/c", "sub/old"):
            (fresh / name).write_text("one")
    return path


def saved_files(folder):
    """What was saved, without what a save that failed left of its own."""
    return {name: text for name, text in content(folder).items() if not name.startswith(".tocom")}


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "folder")


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


def break_disk(monkeypatch, step, links):
    """Let the change of a name with this number fail, and all hard links where there are none."""
    count = itertools.count()
    calls = {name: getattr(os, name) for name in ("replace", "unlink", "link")}

    def failing(name):
        def call(source, *arguments, **keywords):
            if name == "link" and not links:
                raise OSError(errno.EPERM, "no links here")
            # the files that are kept bring the folder back, which is not what fails here
            if name != "link" and "/old/" not in str(source) and ".lock" not in str(source) and next(count) == step:
                raise OSError(errno.EIO, "broken")
            return calls[name](source, *arguments, **keywords)

        return call

    for name in calls:
        monkeypatch.setattr(os, name, failing(name))


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "copies"])
def test_a_failure_at_any_step_leaves_the_folder_as_it_was(folder, monkeypatch, links):
    """The first change of a name fails, then the second, and so on until a save gets through."""
    for step in range(100):
        with monkeypatch.context() as patch:
            break_disk(patch, step, links)
            failure = None
            try:
                write_two(folder, replaces=[r"sub/\w+"])
            except PluginFileError as error:
                failure = str(error)
        if failure is None:
            break
        assert "No file has changed" in failure
        assert saved_files(folder) == BEFORE
    assert saved_files(folder) == AFTER
    assert step >= 4  # three files are written and one is removed


def test_a_failed_first_save_leaves_no_folder(tmp_path):
    with pytest.raises(KeyboardInterrupt), write_folder(tmp_path / "new" / "deep") as fresh:
        (fresh / "a").write_text("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def killed_save(folder, step):
    """Save, but be killed instead of changing the name with this number."""
    count = itertools.count()

    def killing(original):
        def call(*arguments, **keywords):
            if next(count) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **keywords)

        return call

    for name in ("replace", "unlink", "link", "rmdir"):
        setattr(os, name, killing(getattr(os, name)))
    write_two(folder, replaces=[r"sub/\w+"])


def test_what_a_killed_save_left_is_undone_by_the_next_who_reads_or_writes(tmp_path):
    """Killed before the first change of a name, before the second, and so on until a save gets through."""
    context = multiprocessing.get_context("fork")
    left_by_kill, after_reading = [], []
    for step in range(100):
        folder = make_folder(tmp_path / str(step))
        saver = context.Process(target=killed_save, args=(folder, step))
        saver.start()
        saver.join(60)
        assert saver.exitcode in (0, -signal.SIGKILL)
        if saver.exitcode == 0:
            break
        left_by_kill.append(saved_files(folder))
        generation(folder, "a")
        after_reading.append(saved_files(folder))
    assert content(folder) == AFTER
    # all or nothing: the former files until the save is complete, the new ones from there on
    complete = after_reading.index(AFTER)
    assert after_reading[:complete] == [BEFORE] * complete
    # most of them lay there half replaced
    assert sum(state not in (BEFORE, AFTER) for state in left_by_kill) >= 3


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
    plugins = make_plugins(model, max_r=4, training={"value": value})
    adapters = {}
    for index in range(4):
        adapters[index] = {}
        for path, factors in plugins.adapter(index).items():
            adapters[index][path] = Factors(*(torch.full_like(factor, value) for factor in factors))
    return PluginSet(plugins.config, adapters)


def uniform_model(value):
    """A model whose every weight is one number, composed from its degree 0 to 4 with a set of the same number."""
    model = make_model(num_hidden_layers=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # by these a set knows its model
            if "k_proj.weight" not in name:
                parameter.fill_(value)
    return TocomModel.from_pretrained(model, plugins=uniform(value, model), source_r=0, target_r=4)


def value_of_set(folder):
    """The number that a set in a folder consists of."""
    plugins = retry_while_saved(lambda: load_all(PluginSet.from_pretrained(folder)))
    value = plugins.config.training["value"]
    assert {f.lora_A[0, 0].item() for i in range(4) for f in plugins.adapter(i).values()} == {value}
    return value


def value_of_model(folder):
    """The number that a model in a folder consists of, its configuration, weights and plugins."""
    model = TocomModel.from_pretrained(folder)
    value = model.plugins.config.training["value"]
    for name, parameter in model.named_parameters():
        if "k_proj.weight" in name:
            continue
        # four plugins of rank 2 at scale 0.1
        composed = value + 0.1 * 4 * 2 * value**2
        expected = composed if name.endswith(("q_proj.weight", "v_proj.weight")) else value
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, expected), msg=name)
    return value


KINDS = {"set": value_of_set, "model": value_of_model}
VALUES = (1.0, 2.0)


def make_uniform(what, value):
    return uniform_model(value) if what == "model" else uniform(value, make_model(num_hidden_layers=1))


@pytest.mark.parametrize("what", KINDS)
def test_a_save_at_any_moment_of_a_load_shows_no_mixture(tmp_path, monkeypatch, what):
    """Somebody saves before the first file that a load opens, before the second, and so on to the last."""
    former, latter = (make_uniform(what, value) for value in VALUES)
    original = io.open
    seen = []
    for moment in range(100):
        former.save_pretrained(tmp_path)
        count = itertools.count()

        def open_after_save(path, *arguments, count=count, moment=moment, **keywords):
            if str(path).startswith(str(tmp_path)) and next(count) == moment:
                latter.save_pretrained(tmp_path)
            return original(path, *arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(io, "open", open_after_save)
            patch.setattr(builtins, "open", open_after_save)
            seen.append(KINDS[what](tmp_path))
        if next(count) <= moment:
            break
    assert set(seen) == set(VALUES)
    assert len(seen) > 5  # a configuration and four plugins, at least


def keep_saving(folder, what, value, until):
    # tqdm's lock is shared with forked processes: one that is stopped while it has it would block the others for ever
    tqdm.set_lock(threading.RLock())
    saved = make_uniform(what, value)
    while time.monotonic() < until:
        saved.save_pretrained(folder)
        time.sleep(random.uniform(0, 0.1))  # somebody may read, too


@pytest.mark.parametrize(("what", "count"), [("set", 40), ("model", 6)])
def test_concurrent_saves_and_loads_never_show_a_mixture(tmp_path, what, count):
    folder, until = tmp_path / "shared", time.monotonic() + 60
    probe = folder / ("tocom_config.json" if what == "set" else "config.json")
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=keep_saving, args=(folder, what, value, until)) for value in VALUES]
    for writer in writers:
        writer.start()
    loads, seen = 0, set()
    try:
        while (loads < count or len(seen) < 2) and time.monotonic() < until:
            if probe.exists():
                seen.add(KINDS[what](folder))
                loads += 1
    finally:
        for writer in writers:
            writer.terminate()
            writer.join()
    assert seen == set(VALUES)
    assert loads >= count
    generation(folder, probe.name)  # a writer may have been stopped mid-way
    json.loads(probe.read_text())


def load_all(plugins):
    plugins.compose(0, 4)
    return plugins


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
