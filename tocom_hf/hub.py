# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Uploading to the Hugging Face Hub in one commit, and saying what to do when the Hub refuses."""

import contextlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .errors import HubError, PluginFileError, TocomError
from .folders import disk_is_full, outdated


PUSH_ARGUMENTS = ("private", "token", "revision", "commit_message", "create_pr")
_LOGIN = "Log in with `hf auth login`, or pass token=..."
_RETRY = "Files that have arrived are kept; try again."


def upload_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload with tocom_hf",
    create_pr: bool = False,
    replaces: Sequence[str] = (),
    keeps: Collection[str] = (),
) -> str:
    """Upload a folder to the Hub in one commit, making the repository and the branch if need be.

    `HfApi.upload_folder` may make several commits; here a reader sees all of an upload or nothing of it. An upload
    that another one overtakes fails instead of mixing with it.

    Args:
        folder: The folder.
        repo_id: Hub id of the repository.
        private: Whether a new repository is private.
        token: As in `HfApi`.
        revision: The branch; `main` by default.
        commit_message: Message of the commit.
        create_pr: Open a pull request instead of committing to `main`.
        replaces: Kinds of files, as regular expressions for their paths in the repository. Where the folder has a file
            of a kind, all others of that kind are deleted.
        keeps: Files of the folder that are left out where the repository has one of that name.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        HubError: if the Hub refuses or fails a request, or cannot be reached. Nothing is committed then; a new
            repository stays, empty.
    """
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    api = HfApi(token=token)
    with translated_errors(f"Uploading to {repo_id!r}", repo_id, revision):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.model_info(repo_id, revision=None if create_pr else revision)
        present = {sibling.rfilename for sibling in info.siblings or ()}
        gone = outdated(names, present, replaces)
        fresh = {name: path for name, path in names.items() if name not in keeps or name not in present}
        operations: list[Any] = [CommitOperationAdd(name, path) for name, path in fresh.items()]
        commit = api.create_commit(
            repo_id,
            operations=operations + [CommitOperationDelete(name) for name in gone],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            # files that are on the Hub already are not sent, so the commit holds only on top of this one
            parent_commit=info.sha,
        )
    return commit.pr_url or commit.commit_url


@contextlib.contextmanager
def translated_errors(action: str, repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub raises in the block into errors of this package that say what to do.

    Args:
        action: What the block does, for the message: "Uploading to 'user/name'".
        repo_id: The repository.
        revision: Its branch, tag or commit.
    """
    try:
        yield
    except TocomError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, httpx2.HTTPError) as error:
        raise _translate(error, action, repo_id, revision) from error


def _translate(error: BaseException, action: str, repo_id: str, revision: str | None) -> TocomError:
    chain = _causes(error)
    if disk_is_full(error):
        return HubError(f"{action} failed: the disk is full. Free some space, or pass cache_dir=... on another disk.")
    answer = next((cause for cause in chain if isinstance(cause, HfHubHTTPError)), None)
    if answer is not None:
        status = answer.response.status_code
        text = f"{action} failed with status {status}: {_advice(answer, repo_id, revision)}"
        if status == 404 and isinstance(answer, EntryNotFoundError):
            return PluginFileError(text)
        return HubError(text + (f" The Hub says: {answer.server_message}" if answer.server_message else ""), status)
    if isinstance(error, HFValidationError):
        return PluginFileError(f"{repo_id!r} is neither a local folder nor a valid Hub id: {error}")
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in chain) or "disk cache" in str(error):
        return HubError(
            f"{action} failed: it is not in the cache, and the Hub may not be asked (local_files_only or "
            "HF_HUB_OFFLINE). Load it once with the Hub in reach."
        )
    if any(isinstance(cause, httpx2.HTTPError | LocalEntryNotFoundError) for cause in chain):
        cause = next((cause for cause in chain if isinstance(cause, httpx2.HTTPError)), error)
        return HubError(
            f"{action} failed: the Hub cannot be reached, or the connection broke ({type(cause).__name__}: {cause}). "
            f"{_RETRY}"
        )
    if "Consistency check failed" in str(error):
        return HubError(f"{action} failed: the Hub sent fewer or more bytes than it had announced. {_RETRY}")
    return HubError(f"{action} failed: {error}")


def _advice(answer: HfHubHTTPError, repo_id: str, revision: str | None) -> str:
    status = answer.response.status_code
    if isinstance(answer, GatedRepoError):
        return (
            f"{repo_id!r} is gated. Accept its conditions on its page on the Hub, and pass the token of that account."
        )
    if isinstance(answer, RevisionNotFoundError):
        return (
            f"{repo_id!r} has no revision {revision or 'main'!r}. Pass revision= one of its branches, tags or commits."
        )
    if isinstance(answer, EntryNotFoundError):
        return f"the repository {repo_id!r} is there, but has no such file at {revision or 'main'!r}."
    if isinstance(answer, RepositoryNotFoundError) or status == 404:
        return f"{repo_id!r} does not exist, or it is private and you may not see it. Check the name. {_LOGIN}"
    if status == 401:
        return f"the token is missing or no longer valid. {_LOGIN}"
    if status == 403:
        return f"the token may not do this with {repo_id!r}. Use one with the permission (for uploads: to write)."
    if status in (409, 412):
        return f"somebody else changed {repo_id!r} meanwhile. Nothing was committed; try again."
    if status == 429:
        return "too many requests. Wait some minutes and try again; with a token the limit is higher."
    if status >= 500:
        return "the Hub has a problem of its own. Try again later; see https://status.huggingface.co."
    return "the Hub refused the request."


def _causes(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
