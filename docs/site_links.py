# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""A hook of MkDocs: links from a page to files outside `docs/` become links to the repository.

In the repository such a link leads to the file beside the page. The site does not hold that file.
"""

import posixpath
import re


BRANCH = "main"
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((\.\./[^)\s]*)\)")


def repository_link(page: str, target: str, repo_url: str) -> str | None:
    """The address in the repository of what a page links to.

    Args:
        page: The page's path in `docs/`.
        target: The link as it stands on the page, relative to it.
        repo_url: Address of the repository.

    Returns:
        The address, or `None` for what lies in `docs/`.
    """
    path, _, anchor = target.partition("#")
    resolved = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), path))
    if resolved.startswith("docs/"):
        return None
    address = f"{repo_url}/blob/{BRANCH}/{resolved}"
    return f"{address}#{anchor}" if anchor else address


def on_page_markdown(markdown, page, config, files):
    """Called by MkDocs for every page before it is rendered."""

    def replace(match: re.Match) -> str:
        address = repository_link(page.file.src_uri, match[3], config["repo_url"])
        return match[0] if address is None else f"{match[1]}[{match[2]}]({address})"

    return _LINK.sub(replace, markdown)
