# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What huggingface_hub raises, as errors of this package that say what to do."""

import contextlib
from collections.abc import Iterator

import httpx2
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

from tocom_hf.errors import HubError, PluginFileError, TocomError
from tocom_hf.storage.transaction import disk_is_full


_LOGIN = "Log in with `hf auth login`, or pass token=..."
_RETRY = "Files that have arrived are kept; try again."


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
