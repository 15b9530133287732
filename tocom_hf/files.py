# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Reading from a local folder or the Hub alike, and writing a folder all or nothing."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from .errors import PluginFileError


@dataclass(frozen=True)
class Repository:
    """A local folder, or a repository on the Hub at one fixed commit.

    Attributes:
        name: The folder's path or the Hub id, as the user gave it.
        folder: The local folder, or `None` for the Hub.
        subfolder: Where in the repository its files are.
        download: Arguments for `hf_hub_download`.
    """

    name: str
    folder: Path | None
    subfolder: str = ""
    download: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, name: str | Path, *, probe: str, subfolder: str = "", **download: Any) -> "Repository":
        """Find a repository by a file that it must have; on the Hub, fix the commit that this file came from.

        Raises:
            PluginFileError: if the folder or the repository is not there, or lacks the file.
        """
        if Path(name).is_dir():
            repository = cls(str(name), Path(name) / subfolder)
            repository.path(probe)
            return repository
        repository = cls(str(name), None, subfolder, download)
        commit = _commit_of(repository.path(probe))
        return repository if commit is None else cls(str(name), None, subfolder, {**download, "revision": commit})

    def path(self, filename: str) -> Path:
        """The local path of one file, downloaded if need be.

        Raises:
            PluginFileError: if it is not there or cannot be fetched.
        """
        if self.folder is not None:
            path = self.folder / filename
            if not path.is_file():
                raise PluginFileError(f"{path} is missing. Expected a folder written by PluginSet.save_pretrained.")
            return path
        where = f"{filename} of {self.name!r}"
        try:
            return Path(hf_hub_download(self.name, filename, subfolder=self.subfolder or None, **self.download))
        except HFValidationError as error:
            raise PluginFileError(f"{self.name!r} is neither a local folder nor a valid Hub id: {error}") from error
        except LocalEntryNotFoundError as error:
            raise PluginFileError(f"{where} is not in the cache and the Hub cannot be reached: {error}") from error
        except EntryNotFoundError as error:
            raise PluginFileError(f"{where} is not in the repository: {error}") from error
        except (HfHubHTTPError, OSError) as error:
            raise PluginFileError(f"{where} could not be fetched from the Hub: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        PluginFileError: if the file does not hold one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PluginFileError(f"{path} is not valid JSON: {error}. Download or copy the plugin set again.") from error
    if not isinstance(content, dict):
        raise PluginFileError(
            f"{path} must hold a JSON object, found {type(content).__name__}. Download or copy the plugin set again."
        )
    return content


@contextlib.contextmanager
def write_folder(directory: str | Path) -> Iterator[Path]:
    """Write files beside `directory` and move them into it when the block ends; after an exception nothing has changed.

    Entries of the same name are replaced, others stay.
    """
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise PluginFileError(f"{target} is a file; expected a folder to write to.")
    target.mkdir(parents=True, exist_ok=True)
    # inside the target, because moving is atomic only within one file system
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=target) as temporary:
        fresh, old = Path(temporary, "new"), Path(temporary, "old")
        fresh.mkdir()
        old.mkdir()
        yield fresh
        # files last: the configuration of a set appears only after all that it lists
        for entry in sorted(fresh.iterdir(), key=lambda entry: (entry.is_file(), entry.name)):
            destination = target / entry.name
            if destination.is_dir():
                shutil.move(destination, old / entry.name)
            os.replace(entry, destination)


PUSH_ARGUMENTS = ("private", "token", "revision", "commit_message", "create_pr")


def upload_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload with tocom_hf",
    create_pr: bool = False,
) -> str:
    """Upload a folder to the Hub in one commit, making the repository if need be. Returns the address of the commit."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message, create_pr=create_pr
    )
    return commit.commit_url


def _commit_of(path: Path) -> str | None:
    """The commit in the cache path of a downloaded file: `.../snapshots/<commit>/...`."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None
