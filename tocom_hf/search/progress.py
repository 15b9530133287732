# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What a search has measured so far, in a file, so that one that was cut off goes on where it stopped."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tocom_hf.errors import ArgumentError


class Progress:
    """Measurements by name, kept in a file of one JSON object.

    Args:
        path: The file; `None` keeps them in memory only.
        facts: What the measurements depend on: the model, the images, the seed.

    Raises:
        ArgumentError: if the file is of another search.
    """

    def __init__(self, path: Path | None, facts: dict[str, Any]):
        self.path = path
        self.facts = json.loads(json.dumps(facts))
        self.known: dict[str, Any] = {}
        if path is None or not path.exists():
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            facts, self.known = content["facts"], content["known"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArgumentError(f"{path} is no progress of a search: {error!r}. Delete it to start anew.") from error
        if facts != self.facts:
            raise ArgumentError(
                f"{path} is the progress of a search with another model, other images or another seed. Delete it to "
                "start anew, or choose another folder."
            )

    def measured(self, name: str, measure: Callable[[], Any]) -> Any:
        """What is known by this name; if nothing is, it is measured and kept."""
        if name not in self.known:
            self.known[name] = measure()
            self._write()
        return self.known[name]

    def _write(self) -> None:
        if self.path is None:
            return
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text(json.dumps({"facts": self.facts, "known": self.known}), encoding="utf-8")
        os.replace(scratch, self.path)
