# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Checks of safetensors files from strangers that come before the library parses them."""

import struct
from pathlib import Path

from .errors import PluginFileError


_MAX_ENTRY = 512  # bytes of a header that describe one tensor, besides its name
_METADATA = 65_536  # bytes of a header that may be metadata


def require_small_header(path: Path, names: list[str] | None = None) -> None:
    """Refuse a file whose header is longer than the file, or than the tensors in it can need.

    The header is JSON and takes several times its length in memory, so its length is checked before it is parsed.

    Args:
        path: The safetensors file.
        names: The tensors that it must hold, where they are known.

    Raises:
        PluginFileError: if the header is too long, or the file too short for one.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
    if len(start) < 8:
        raise PluginFileError(f"{path} is truncated: it has {size} bytes. Download or copy it again.")
    (length,) = struct.unpack("<Q", start)
    if length > size - 8:
        raise PluginFileError(
            f"{path} is truncated or not a safetensors file: its header claims {length} bytes, "
            f"the file has {size}. Download or copy it again."
        )
    if names is not None and length > _METADATA + sum(len(name) + _MAX_ENTRY for name in names):
        raise PluginFileError(f"{path} has a header of {length} bytes, far more than its {len(names)} tensors need.")
