# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The folder of an export: what its manifest says, and its files, each checked once against the checksum in there."""

import hashlib
import re
from pathlib import Path
from typing import Any

from tocom_hf.errors import PluginFileError
from tocom_hf.storage.json_files import read_json


FORMAT_VERSION = 1
MANIFEST, LABELS, PROCESSOR = "manifest.json", "labels.json", "preprocessor_config.json"
WEIGHTS, PLUGINS = "weights.safetensors", "plugins.safetensors"
GRAPH_SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
# all files that an export may have, so that none of an earlier export stays behind
EXPORTED_FILES = (
    r"(manifest|labels|preprocessor_config)\.json|(weights|plugins)\.safetensors|degree_\d+\.(onnx|xml|pt2)"
)


class ExportedFolder:
    """An export on disk.

    Args:
        folder: Where it is.

    Attributes:
        folder: Where it is.
        manifest: The content of its `manifest.json`.
        degrees: The degrees that it has a graph of, in ascending order.

    Raises:
        PluginFileError: if there is no manifest, or it is not one that this version reads.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = _read_json(self.folder / MANIFEST)
        self._checked: set[str] = set()
        version = self.manifest.get("format_version")
        if version != FORMAT_VERSION:
            raise PluginFileError(
                f"{self.folder / MANIFEST} has format_version {version!r:.50}, this version of tocom-hf reads "
                f"{FORMAT_VERSION}. Export the model again, or install the version that wrote it."
            )
        problem = _problem(self.manifest)
        if problem is not None:
            raise PluginFileError(f"{self.folder / MANIFEST}: {problem}. Export the model again.")
        self.degrees = sorted(int(degree) for degree in self.manifest["degrees"])

    def has(self, name: str) -> bool:
        """Whether the export has a file of this name."""
        return name in self.manifest["files"]

    def path(self, name: str) -> Path:
        """The path of a file, whose content was compared with its checksum when it was first asked for.

        Raises:
            PluginFileError: if the file is missing, damaged, or not part of the export.
        """
        path = self.folder / name
        if name in self._checked:
            return path
        if not self.has(name):
            raise PluginFileError(f"{self.folder / MANIFEST} lists no file {name}. Export the model again.")
        if not path.is_file():
            raise PluginFileError(f"{path} is missing. Copy the folder again, or export the model again.")
        found = sha256(path)
        if found != self.manifest["files"][name]:
            raise PluginFileError(
                f"{path} is damaged: its SHA-256 is {found[:12]}..., the manifest says "
                f"{self.manifest['files'][name][:12]}... . Copy the folder again, or export the model again."
            )
        self._checked.add(name)
        return path

    def graph(self, degree: int) -> str:
        """The name of the file with the graph of a degree."""
        return self.manifest["degrees"][str(degree)]["graph"]

    def json(self, name: str) -> dict[str, Any] | None:
        """The content of a JSON file, `None` where the export has none of this name."""
        return _read_json(self.path(name)) if self.has(name) else None


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise PluginFileError(f"{path} is missing. Expected a folder written by tocom_hf.export.")
    return read_json(path, "Export the model again.")


def _problem(manifest: dict[str, Any]) -> str | None:
    """What is wrong with a manifest, or `None`. Names of files must not lead out of the folder."""
    if manifest.get("format") not in GRAPH_SUFFIXES:
        return f"format is {manifest.get('format')!r:.50}, expected one of {', '.join(GRAPH_SUFFIXES)}"
    kinds: dict[str, type] = {"standalone": bool, "dtype": str, "input": dict, "output": str, "degrees": dict}
    for key, kind in {**kinds, "composed": dict, "files": dict}.items():
        if not isinstance(manifest.get(key), kind):
            return f"{key} is missing or no {kind.__name__}"
    for name, checksum in manifest["files"].items():
        if not re.fullmatch(EXPORTED_FILES, name) or not isinstance(checksum, str):
            return f"files lists {name!r:.100}, which is no file of an export"
    for degree, entry in manifest["degrees"].items():
        graph = entry.get("graph") if isinstance(entry, dict) else None
        if not re.fullmatch(r"\d{1,5}", degree) or graph not in manifest["files"]:
            return f"the entry of degree {degree!r:.20} names no graph"
        if not {*entry.get("composed", ())} <= {*manifest["composed"]}:
            return f"the entry of degree {degree} composes unknown weights"
    shape = manifest["input"].get("shape")
    sides = shape[1:] if isinstance(shape, list) else []
    if not isinstance(manifest["input"].get("name"), str) or not sides or not all(type(side) is int for side in sides):
        return "input has no name or no shape"
    plugins = manifest.get("plugins")
    if manifest["composed"] and not isinstance(plugins, dict):
        return "weights are composed, but plugins is missing"
    return None
