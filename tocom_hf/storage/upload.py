# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Uploading to the Hugging Face Hub in one commit."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from tocom_hf.storage.hub_errors import translated_errors
from tocom_hf.storage.transaction import outdated


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
