# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""A file is replaced as a whole or not at all."""

import errno
import os

import pytest

from tocom_hf.storage.durable_files import write_durably


def test_it_is_replaced(tmp_path):
    for content in (b"before", b"", b"after"):
        write_durably(tmp_path / "x", content)
        assert (tmp_path / "x").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch, step, error):
    def fail(*args):
        raise error

    write_durably(tmp_path / "x", b"before")
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)):
        write_durably(tmp_path / "x", b"after")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"before"


def test_it_is_flushed_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda descriptor, fsync=os.fsync: (done.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths, replace=os.replace: (done.append("replace"), replace(*paths)))
    write_durably(tmp_path / "x", b"content")
    assert done == ["fsync", "replace", "fsync"]  # the last one is of the folder
