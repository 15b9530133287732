# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Weights of an export: arrays in a file that is mapped into memory, and those of another degree, summed by numpy."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tocom_hf.deployed.manifest import PLUGINS, ExportedFolder
from tocom_hf.errors import PluginFileError


_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "I16": np.int16,
    "I8": np.int8, "U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64, "BOOL": np.bool_,
}  # fmt: skip


class MappedWeights(Mapping[str, np.ndarray]):
    """The arrays of a safetensors file. Nothing is read before it is used, and processes share what was read.

    safetensors' own reader makes a copy of every array.

    Args:
        path: The file, whose checksum was compared.

    Attributes:
        bytes: The whole file, uint8. Writing to it changes neither the file nor what other processes see.

    Raises:
        PluginFileError: if it is not a safetensors file.
    """

    def __init__(self, path: Path):
        self.bytes = np.memmap(path, dtype=np.uint8, mode="c")
        try:
            self._start, self._entries = _read_header(self.bytes)
        except (ValueError, KeyError, TypeError) as error:
            raise PluginFileError(f"{path} is not a safetensors file: {error}. Export the model again.") from error

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        start, end = self.span(name)
        return self.bytes[start:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def span(self, name: str) -> tuple[int, int]:
        """Where in the file an array begins and ends, in bytes."""
        start, end = self._entries[name]["data_offsets"]
        return self._start + start, self._start + end


class Composer:
    """The weights that plugins change, at any degree of an export that is composed when it is loaded.

    Args:
        exported: The export.
        weights: Its weights, those of the source degree.
    """

    def __init__(self, exported: ExportedFolder, weights: MappedWeights):
        self._weights = weights
        self._composed: dict[str, Any] = exported.manifest["composed"]
        self._names = exported.manifest["degrees"]
        self._settings: dict[str, Any] = exported.manifest.get("plugins") or {}
        self._factors = MappedWeights(exported.path(PLUGINS)) if exported.has(PLUGINS) else None

    def at(self, degree: int) -> dict[str, np.ndarray]:
        """The weights that differ from those of the source degree, by name; empty at that degree itself.

        They are `W + s * sum(B_i A_i)`, or minus the sum on the way down (ToCom, eq. 4 and 5), summed in float64 and
        rounded once.
        """
        source: int = self._settings.get("source_r", degree)
        if self._factors is None or degree == source:
            return {}
        steps = range(min(source, degree), max(source, degree))
        factor = self._settings["scale"] * (1 if degree > source else -1)
        found = {}
        for name in self._names[str(degree)]["composed"]:
            entry = self._composed[name]
            weight = self._weights[name]
            change = np.zeros(weight.shape[::-1] if entry["transposed"] else weight.shape)  # (out, in)
            for step in steps:
                lora_A = self._factors[f"P_{step}_{step + 1}.{entry['path']}.lora_A"]  # (rank, in)
                lora_B = self._factors[f"P_{step}_{step + 1}.{entry['path']}.lora_B"]  # (out, rank)
                change += lora_B.astype(np.float64) @ lora_A.astype(np.float64)
            total = weight.astype(np.float64) + factor * (change.T if entry["transposed"] else change)
            found[name] = np.ascontiguousarray(total.astype(weight.dtype))
        return found


def _read_header(content: np.ndarray) -> tuple[int, dict[str, Any]]:
    """Where the arrays begin, and the entry of each, all of them within the file."""
    length = int.from_bytes(content[:8].tobytes(), "little")
    start = 8 + length
    if len(content) < 8 or start > len(content):
        raise ValueError("it is truncated")
    entries = json.loads(content[8:start].tobytes())
    entries.pop("__metadata__", None)
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        size = int(np.prod(entry["shape"], dtype=np.int64)) * np.dtype(_DTYPES[entry["dtype"]]).itemsize
        if not 0 <= begin <= end <= len(content) - start or end - begin != size:
            raise ValueError(f"{name} does not lie within it")
    return start, entries
