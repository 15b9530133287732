# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Reading files from a local folder or the Hub alike, none of which is trusted."""

import contextlib
import hashlib
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from tocom_hf.errors import PluginFileError
from tocom_hf.storage.hub_errors import translated_errors
from tocom_hf.storage.transaction import (
    FolderChangedError,
    find_snapshots,
    generation,
    require_inside,
    require_relative,
)


DOWNLOAD_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download")
_MAX_ENTRY = 512  # bytes of a header that describe one tensor, besides its name
_METADATA = 65_536  # bytes of a header that may be metadata


@dataclass(frozen=True)
class Repository:
    """A local folder in one state, or a repository on the Hub at one fixed commit.

    Attributes:
        name: The folder's path or the Hub id, as the user gave it.
        folder: The local folder, whose path does not depend on the working directory, or `None` for the Hub.
        probe: A file that the repository must have, and that every save replaces.
        subfolder: Where in the repository its files are.
        download: Arguments for `hf_hub_download`.
        generation: The state of a local folder when it was opened.
        fetched: The files that have come from the Hub and were checked, by name.
    """

    name: str
    folder: Path | None
    probe: str
    subfolder: str = ""
    download: dict[str, Any] = field(default_factory=dict)
    generation: tuple[int, ...] = ()
    fetched: dict[str, Path] = field(default_factory=dict)

    @classmethod
    def open(cls, name: str | Path, *, probe: str, subfolder: str = "", **download: Any) -> "Repository":
        """Find a repository by a file that it must have; on the Hub, fix the commit that this file came from.

        Args:
            name: Local folder or Hub id.
            probe: The file.
            subfolder: Where in the repository its files are.
            **download: `revision`, `cache_dir`, `token`, `local_files_only` and `force_download` of `hf_hub_download`.

        Raises:
            PluginFileError: if the folder or the repository lacks the file.
            HubError: if the Hub refuses or fails the request, or cannot be reached.
        """
        require_relative(subfolder, "subfolder")
        if Path(name).is_dir():
            folder = Path(name).absolute() / subfolder
            repository = cls(str(name), folder, probe, subfolder)
            repository.path(probe)
            return cls(str(name), folder, probe, subfolder, generation=generation(folder, probe))
        repository = cls(str(name), None, probe, subfolder, download)
        commit = _commit_of(repository.path(probe))
        download = {**download, "revision": commit or download.get("revision")}
        return cls(str(name), None, probe, subfolder, download, fetched=repository.fetched)

    def path(self, filename: str) -> Path:
        """The local path of one file, downloaded if need be and checked to be what the Hub announced.

        Raises:
            PluginFileError: if it is not there, leaves the folder, or arrived damaged.
            HubError: if the Hub refuses or fails the request, or cannot be reached.
        """
        require_relative(filename, "file name")
        if self.folder is not None:
            path = self.folder / filename
            require_inside(path, Path(str(self.folder).removesuffix(self.subfolder)))
            if not path.is_file():
                raise PluginFileError(f"{path} is missing. Expected a folder written by save_pretrained.")
            return path
        if filename not in self.fetched:
            with translated_errors(f"Loading {filename} of {self.name!r}", self.name, self.download.get("revision")):
                path = Path(hf_hub_download(self.name, filename, subfolder=self.subfolder or None, **self.download))
            _verify_checksum(path)
            self.fetched[filename] = path
        return self.fetched[filename]

    def require_unchanged(self) -> None:
        """Raise `FolderChangedError` if a local folder was saved anew since it was opened."""
        if self.folder is not None and generation(self.folder, self.probe) != self.generation:
            raise FolderChangedError(f"{self.folder} was saved anew after it had been opened. Load it again.")


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


def _commit_of(path: Path) -> str | None:
    """The commit in the cache path of a downloaded file: `.../snapshots/<commit>/...`."""
    snapshots = find_snapshots(path)
    return None if snapshots is None else path.parts[len(snapshots.parts)]


def _verify_checksum(path: Path) -> None:
    """Compare a file in the cache with the hash that the Hub announced, which its blob is named by.

    huggingface_hub compares sizes only. Where its cache has no links (Windows), there is nothing to compare with.
    """
    if not path.is_symlink():
        return
    blob = path.parent / path.readlink()
    if re.fullmatch("[0-9a-f]{64}", blob.name):  # a large file: the SHA-256 of its content
        digest = hashlib.sha256()
    elif re.fullmatch("[0-9a-f]{40}", blob.name):  # a small one: its id in git
        digest = hashlib.sha1(f"blob {blob.stat().st_size}\0".encode(), usedforsecurity=False)
    else:
        return
    with blob.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    if digest.hexdigest() != blob.name:
        for damaged in (path, blob):
            with contextlib.suppress(OSError):
                damaged.unlink()
        raise PluginFileError(
            f"{path.name} arrived damaged: its checksum is {digest.hexdigest()[:12]}..., the Hub announced "
            f"{blob.name[:12]}... . The damaged copy was removed from the cache; load it again."
        )
