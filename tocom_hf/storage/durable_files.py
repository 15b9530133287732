# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Writing one file so that it is there as a whole or not at all, whatever stops the process or the machine."""

import contextlib
import os
from pathlib import Path


UNFINISHED = ".writing-"
"""What the name of a file begins with until it is complete."""


def write_durably(path: Path, content: bytes) -> None:
    """Replace a file: written under another name, flushed to the disk, and renamed.

    Args:
        path: The file, in a folder that exists.
        content: What it shall hold.

    Raises:
        OSError: if it cannot be written. Then a file that was there before is unchanged, and nothing else is left.
    """
    writing = path.with_name(f"{UNFINISHED}{path.name}")
    try:
        with writing.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(writing, path)
    except BaseException:
        with contextlib.suppress(OSError):
            writing.unlink()
        raise
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Flush the names in a folder, so that a file that was renamed keeps its new name."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
