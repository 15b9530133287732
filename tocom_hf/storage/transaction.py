# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Replacing the files of a folder all at once, whatever fails and whoever reads or writes it meanwhile.

A save writes its files into `.tocom-saving/new` and then renames them into place one by one. While it does, a journal
lists what it replaces and `.tocom-saving/old` keeps the former files, so that a failed save is undone: by itself, or by
the next process where it was killed. A lock file lets one process save at a time. Readers take no lock: they note the
`generation` of a folder before and after, and read again if it has changed.
"""

import contextlib
import errno
import json
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TypeVar

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from tocom_hf.errors import PluginFileError, TocomError


T = TypeVar("T")
_LOCK, _SAVING, _JOURNAL = ".tocom.lock", ".tocom-saving", "journal.json"
_PATIENCE = 60.0  # seconds that a reader waits for renames, which take milliseconds
_FULL = (errno.ENOSPC, errno.EDQUOT)


class FolderChangedError(PluginFileError):
    """A folder was saved anew while it was being read."""


@contextlib.contextmanager
def write_folder(directory: str | os.PathLike, *, replaces: Sequence[str] = ()) -> Iterator[Path]:
    """Write files beside those of a folder, and put all of them in place when the block ends.

    After an exception, in the block or behind it, the folder is as it was before. Other files in it stay.

    Args:
        directory: The folder; made if missing.
        replaces: Kinds of files, as regular expressions for their paths relative to the folder. Where the block writes
            a file of a kind, all others of that kind are removed.

    Yields:
        An empty folder to write to.

    Raises:
        PluginFileError: if a file is in the way, or the disk is full.
    """
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise PluginFileError(f"{target} is a file; expected a folder to write to.")
    made = [path for path in (target, *target.parents) if not path.exists()]
    target.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(target):
            _clean_up(target)
            fresh = target / _SAVING / "new"
            fresh.mkdir(parents=True)
            try:
                yield fresh
                _replace(target, replaces)
            finally:
                _clean_up(target)
    except BaseException as error:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        _explain(error, f"Saving to {target}")
        raise


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for the time of the block, with the errors of `write_folder`."""
    with tempfile.TemporaryDirectory() as name:
        try:
            yield Path(name)
        except BaseException as error:
            _explain(error, f"Writing temporary files to {tempfile.gettempdir()}")
            raise


def generation(folder: Path, probe: str) -> tuple[int, ...]:
    """A number for the state of a folder, which every save changes. Waits while files are being replaced.

    Args:
        folder: The folder, or one directly within it.
        probe: Name of a file that every save replaces.

    Raises:
        PluginFileError: if a save was interrupted and cannot be undone.
    """
    for place in (folder, folder.parent):
        _await_writer(place)
    try:
        facts = (folder / probe).stat()
    except FileNotFoundError as error:
        raise FolderChangedError(f"{folder / probe} is gone. Save the folder again.") from error
    return facts.st_ino, facts.st_ctime_ns, facts.st_mtime_ns, facts.st_size


def retry_while_saved(load: Callable[[], T], attempts: int = 100) -> T:
    """Call `load` again where a folder was saved anew while it was being read.

    Between two attempts it waits for a random time, longer each time up to 0.1 s, so that it does not stay in step with
    a writer. There are many of them: on a busy machine most loads of a folder that is saved all the time are overtaken.
    """
    for attempt in range(attempts - 1):
        with contextlib.suppress(FolderChangedError):
            return load()
        time.sleep(random.uniform(0, min(0.1, 0.01 * (attempt + 1))))
    return load()


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an exception, or one that caused it, says that there is no space left on a disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if isinstance(error, SafetensorError) and "No space left" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def outdated(fresh: Iterable[str], present: Iterable[str], kinds: Sequence[str]) -> list[str]:
    """Which of the present files belong to an earlier save: those of a kind that has fresh files, but not these."""
    names = set(fresh)
    written = [kind for kind in kinds if any(re.fullmatch(kind, name) for name in names)]
    return sorted(name for name in set(present) - names if any(re.fullmatch(kind, name) for kind in written))


def require_relative(name: str, what: str) -> None:
    """Raise `PluginFileError` for a name that leaves the folder that it is in, on this or another system."""
    if not _is_relative(name):
        raise PluginFileError(f"The {what} {name!r} leaves the repository. Expected a relative path without '..'.")


def find_snapshots(path: Path) -> Path | None:
    """The folder of snapshots that a path in the cache of huggingface_hub goes through: `.../models--*/snapshots`."""
    for folder in path.parents:
        if folder.name == "snapshots" and folder.parent.name.startswith("models--"):
            return folder
    return None


def require_inside(path: Path, root: Path) -> None:
    """Raise `PluginFileError` if a path, with its symbolic links followed, leaves the folder `root`.

    A snapshot in the cache of huggingface_hub consists of links to files elsewhere in that cache, which are allowed.
    """
    base, real = root.resolve(), path.resolve()
    snapshots = find_snapshots(base)
    if snapshots is not None:
        base = snapshots.parent.parent
    if not real.is_relative_to(base):
        raise PluginFileError(f"{path} links to {real}, outside of {root}. Replace the link by the file itself.")


def _explain(error: BaseException, action: str) -> None:
    if isinstance(error, OSError | SafetensorError) and not isinstance(error, TocomError):
        advice = (
            "Free some space, or save elsewhere." if disk_is_full(error) else "Remove the cause, or save elsewhere."
        )
        raise PluginFileError(f"{action} failed: {error}. No file has changed. {advice}") from error


def _replace(target: Path, replaces: Sequence[str]) -> None:
    saving = target / _SAVING
    fresh, old, journal = saving / "new", saving / "old", saving / _JOURNAL
    names = sorted(path.relative_to(fresh).as_posix() for path in fresh.rglob("*") if not path.is_dir())
    gone = outdated(names, _files(target), replaces)
    for name in (*names, *gone):
        require_inside((target / name).parent, target)
        if (target / name).is_dir():
            raise PluginFileError(f"{target / name} is a folder; expected a file to replace.")
    existed = {name: os.path.lexists(target / name) for name in (*names, *gone)}
    (saving / "journal.tmp").write_text(json.dumps(existed), encoding="utf-8")
    os.replace(saving / "journal.tmp", journal)
    for name in (*names, *gone):
        destination = target / name
        if existed[name]:
            _keep(destination, old / name)
        if name in gone:
            destination.unlink()
        else:
            destination.parent.mkdir(parents=True, exist_ok=True)
            os.replace(fresh / name, destination)
    for name in gone:
        with contextlib.suppress(OSError):
            (target / name).parent.rmdir()
    journal.unlink()  # from here on the new files hold


def _clean_up(target: Path) -> None:
    """Undo the save that a journal tells of, if there is one, and remove its traces. The lock must be held."""
    saving = target / _SAVING
    fresh, old, journal = saving / "new", saving / "old", saving / _JOURNAL
    if journal.exists():
        for name, existed in _read_journal(target).items():
            destination, kept = target / name, old / name
            if os.path.lexists(kept):
                os.replace(kept, destination)
            elif not existed and not (fresh / name).exists():
                destination.unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    destination.parent.rmdir()
        journal.unlink()
    shutil.rmtree(saving, ignore_errors=True)


def _read_journal(target: Path) -> dict[str, bool]:
    """The journal of a save: whether each file existed before it.

    It may come from a stranger, with the rest of the folder, so it must not move files into or out of it.
    """
    saving = target / _SAVING
    try:
        content = json.loads((saving / _JOURNAL).read_text(encoding="utf-8"))
        for name in content:
            if not _is_relative(name) or not isinstance(content[name], bool):
                raise ValueError(name)
            for path in (target / name, saving / "old" / name, saving / "new" / name):
                if not path.parent.resolve().is_relative_to(target.resolve()):
                    raise ValueError(name)
    except (ValueError, TypeError, RecursionError) as error:
        raise PluginFileError(
            f"{saving / _JOURNAL} is not one that this package wrote ({str(error)[:100]!r}). Remove {saving} if you "
            "trust the other files of the folder."
        ) from error
    return content


def _is_relative(name: str) -> bool:
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    absolute = posix.is_absolute() or windows.is_absolute() or bool(windows.drive)
    return not absolute and ".." not in (*posix.parts, *windows.parts)


def _keep(source: Path, kept: Path) -> None:
    """Give a file a second name; the first one stays in place, so that a plain reader never misses it."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, kept, follow_symlinks=False)
    except (OSError, NotImplementedError):  # not every file system has hard links
        partial = kept.with_name(kept.name + ".tmp")
        shutil.copy2(source, partial, follow_symlinks=False)
        os.replace(partial, kept)


def _files(target: Path) -> list[str]:
    """Paths of the files below `target`, at most two folders deep."""
    found = (path for depth in ("*", "*/*", "*/*/*") for path in target.glob(depth) if path.is_file())
    return [path.relative_to(target).as_posix() for path in found]


@contextlib.contextmanager
def _locked(target: Path, timeout: float = -1) -> Iterator[None]:
    path = target / _LOCK
    with FileLock(path, timeout=timeout):
        try:
            yield
        finally:
            # whoever waits on this inode notices that it has lost its name, and tries anew
            with contextlib.suppress(OSError):
                path.unlink()


def _await_writer(folder: Path) -> None:
    deadline = time.monotonic() + _PATIENCE
    journal = folder / _SAVING / _JOURNAL
    while journal.exists():
        try:
            with _locked(folder, timeout=0.05):
                _clean_up(folder)  # its writer is dead, else the lock would be held
        except Timeout:
            pass
        except PluginFileError:
            raise
        except OSError as error:  # no permission to write
            if time.monotonic() > deadline - _PATIENCE + 5:
                raise PluginFileError(
                    f"Saving {folder} was interrupted, and undoing it failed: {error}. Save the folder again."
                ) from error
            time.sleep(0.05)
        if time.monotonic() > deadline:
            raise PluginFileError(f"{folder} is still being saved after {_PATIENCE:g} seconds. Try again later.")
