# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of a distillation: small, without pickle, written all or nothing, and checked before they are trusted."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from transformers.utils import logging

from tocom_hf.errors import CheckpointError


logger = logging.get_logger(__name__)

STATE_FILE, TENSOR_FILE = "trainer_state.json", "state.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass
class RunState:
    """What a checkpoint holds: all that a run needs to go on as if it had never stopped.

    Random numbers are functions of keys, so they need no state.

    Attributes:
        step: Steps that were done.
        settings: What decides the result of a run; a run that goes on must have the same.
        tensors: Plugins, optimiser state and moving average.
        progress: Counters and figures so far.
    """

    step: int
    settings: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    progress: dict[str, Any] = field(default_factory=dict)

    def save(self, output_dir: str | Path, keep: int) -> Path:
        """Write `checkpoint-<step>` and delete all but the newest `keep` of it and those before it.

        Those of later steps stay: the run went on from before them, because they are damaged or another was named.

        The folder is written under another name, flushed to disk and renamed: it is there as a whole or not at all.
        """
        target = Path(output_dir) / f"checkpoint-{self.step}"
        writing = target.with_name(f".writing-{target.name}")
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, writing / TENSOR_FILE)
        content = {
            "step": self.step,
            "sha256": hashlib.sha256((writing / TENSOR_FILE).read_bytes()).hexdigest(),
            "settings": self.settings,
            "progress": self.progress,
        }
        (writing / STATE_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for path in (writing / TENSOR_FILE, writing / STATE_FILE, writing):
            _flush(path)
        shutil.rmtree(target, ignore_errors=True)
        writing.rename(target)
        _flush(target.parent)
        existing = list_checkpoints(output_dir)
        for old in existing[existing.index(target) + keep :]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    @classmethod
    def load(cls, folder: str | Path) -> "RunState":
        """Read a checkpoint.

        Raises:
            CheckpointError: if a file is missing, truncated or changed.
        """
        folder = Path(folder)
        try:
            content = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
            data = (folder / TENSOR_FILE).read_bytes()
            if hashlib.sha256(data).hexdigest() != content["sha256"]:
                raise CheckpointError(f"{folder / TENSOR_FILE} is truncated or was changed: its checksum differs.")
            return cls(content["step"], content["settings"], load(data), content["progress"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{folder} is not a complete checkpoint: {error}") from error

    def check_settings(self, settings: dict[str, Any], folder: str | Path) -> None:
        """Raise `CheckpointError`, with what differs, unless a run has the settings of this checkpoint."""
        names = sorted(self.settings.keys() | settings.keys())
        # through JSON, which has no tuples
        now = json.loads(json.dumps(settings))
        changed = [
            f"  {name}: {self.settings.get(name)!r} in the checkpoint, now {now.get(name)!r}"
            for name in names
            if self.settings.get(name) != now.get(name)
        ]
        if changed:
            raise CheckpointError(
                f"{folder} belongs to a run with other settings:\n"
                + "\n".join(changed)
                + "\nStart with the same settings to go on, or with another output_dir to start anew."
            )


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints in a folder, the newest first."""
    found = [(int(match[1]), path) for path in Path(output_dir).glob("*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def make_output_dir(output_dir: str | Path) -> None:
    """Make the folder of a run where there is none, so that one that cannot be is found before any work is done.

    Raises:
        CheckpointError: if it cannot be made, or nothing can be written into it.
    """
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise CheckpointError(
            f"Nothing can be written into {output_dir}: {error}. Choose another output_dir."
        ) from error


def find_state(output_dir: str | Path, resume_from: str | None) -> tuple[Path, RunState] | None:
    """The checkpoint to go on from: the one named, or with `latest` the newest that is whole.

    Returns:
        Folder and checkpoint; `None` where a run shall start from the beginning.

    Raises:
        CheckpointError: if the checkpoint named is damaged, if all are, or if there are some but none was asked for.
    """
    existing = list_checkpoints(output_dir)
    if resume_from is None:
        if existing:
            raise CheckpointError(
                f"{output_dir} has checkpoints of another run, the newest is {existing[0].name}. Pass "
                "resume_from_checkpoint='latest' to go on with it, or another output_dir to start anew."
            )
        return None
    if resume_from != "latest":
        return Path(resume_from), RunState.load(resume_from)
    for path in existing:
        try:
            return path, RunState.load(path)
        except CheckpointError as error:
            logger.warning("Falling back to the checkpoint before: %s", error)
    if existing:
        raise CheckpointError(
            f"None of the {len(existing)} checkpoints in {output_dir} is whole. "
            "Delete them, or choose another output_dir, to start anew."
        )
    logger.warning("There is no checkpoint in %s yet: starting from the beginning.", output_dir)
    return None


def _flush(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():  # Windows opens no folders
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
