# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint is whole or not there, and only a whole one of the same run is gone on from."""

import json

import pytest
import torch

from tocom_hf.distillation.run_state import STATE_FILE, TENSOR_FILE, RunState, find_state, list_checkpoints
from tocom_hf.errors import CheckpointError


def make(step, **settings):
    return RunState(step, {"max_r": 4, "seed": 0, **settings}, {"a": torch.arange(4.0) + step}, {"skipped": 0})


def test_checkpoints_come_back_as_they_were(tmp_path):
    path = make(7).save(tmp_path, keep=2)
    loaded = RunState.load(path)
    assert (loaded.step, loaded.settings, loaded.progress) == (7, {"max_r": 4, "seed": 0}, {"skipped": 0})
    assert torch.equal(loaded.tensors["a"], torch.arange(4.0) + 7)


def test_the_newest_are_kept(tmp_path):
    for step in (5, 50, 200, 1000):
        make(step).save(tmp_path, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1000", "checkpoint-200"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1000", "checkpoint-200"]


def test_what_is_written_after_a_fall_back_is_kept(tmp_path):
    """A damaged checkpoint of a later step must not count as one of the newest."""
    for step in (100, 200):
        make(step).save(tmp_path, keep=2)
    (tmp_path / "checkpoint-200" / TENSOR_FILE).write_bytes(b"")
    for step in (150, 180):
        make(step).save(tmp_path, keep=1)
        assert find_state(tmp_path, "latest")[1].step == step
    make(200).save(tmp_path, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-200"]
    assert find_state(tmp_path, "latest")[1].step == 200


def test_an_interrupted_save_leaves_no_checkpoint(tmp_path, monkeypatch):
    make(1).save(tmp_path, keep=2)
    monkeypatch.setattr(json, "dumps", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(2).save(tmp_path, keep=2)
    monkeypatch.undo()
    assert find_state(tmp_path, "latest")[1].step == 1
    make(2).save(tmp_path, keep=2)  # over what the interrupted one left
    assert find_state(tmp_path, "latest")[1].step == 2


DAMAGES = {
    "truncated tensors": lambda path: (path / TENSOR_FILE).write_bytes((path / TENSOR_FILE).read_bytes()[:-3]),
    "changed tensors": lambda path: (path / TENSOR_FILE).write_bytes((path / TENSOR_FILE).read_bytes()[:-1] + b"\xff"),
    "no tensors": lambda path: (path / TENSOR_FILE).unlink(),
    "no state": lambda path: (path / STATE_FILE).unlink(),
    "truncated state": lambda path: (path / STATE_FILE).write_text((path / STATE_FILE).read_text()[:-20]),
    "other JSON": lambda path: (path / STATE_FILE).write_text("[1]"),
    "missing key": lambda path: (path / STATE_FILE).write_text(json.dumps({"step": 1})),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, damage, caplog):
    make(1).save(tmp_path, keep=3)
    DAMAGES[damage](make(2).save(tmp_path, keep=3))
    with caplog.at_level("WARNING"):
        path, checkpoint = find_state(tmp_path, "latest")
    assert (path.name, checkpoint.step) == ("checkpoint-1", 1)
    assert "checkpoint-2" in caplog.text
    with pytest.raises(CheckpointError, match="checkpoint-2"):
        find_state(tmp_path, str(tmp_path / "checkpoint-2"))
    DAMAGES[damage](tmp_path / "checkpoint-1")
    with pytest.raises(CheckpointError, match="None of the 2 checkpoints"):
        find_state(tmp_path, "latest")


def test_no_checkpoint_means_to_start_and_an_unwanted_one_is_an_error(tmp_path):
    assert find_state(tmp_path / "new", "latest") is None
    assert find_state(tmp_path / "new", None) is None
    make(1).save(tmp_path, keep=1)
    with pytest.raises(CheckpointError, match="resume_from_checkpoint='latest'"):
        find_state(tmp_path, None)


def test_other_settings_are_refused_with_what_differs(tmp_path):
    checkpoint = make(1)
    checkpoint.check_settings({"max_r": 4, "seed": 0}, tmp_path)
    with pytest.raises(CheckpointError) as error:
        checkpoint.check_settings({"max_r": 8, "seed": 0, "rank": 2}, tmp_path)
    assert "max_r: 4 in the checkpoint, now 8" in str(error.value)
    assert "rank: None in the checkpoint, now 2" in str(error.value)
    assert "seed" not in str(error.value)
