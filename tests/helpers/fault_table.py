# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Inject every fault of hub_faults.py, and write what happened into the table in docs/faults.md: `make faults`."""

from helpers import hub_listener  # isort: skip  # before anything imports huggingface_hub

import re
import tempfile
import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from helpers import hub_server
from helpers.hub_faults import FAULTS, Situation
from helpers.models import make_model, make_plugins
from helpers.paths import ROOT


TITLES = {"load": "loading", "push": "pushing", "save": "saving"}
BEGIN, END = "<!-- fault table -->\n", "<!-- end -->\n"


def run(row, hub: hub_server.Hub) -> str:
    """Inject one fault, and return its line of the table."""
    hub.reset()
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as monkeypatch:
        folder = Path(name)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        outcome = row.run(Situation(hub, make_plugins(make_model()), make_model(), folder, monkeypatch))
        if not outcome.model_unchanged:
            raise AssertionError(f"{row.name}: the model has changed")
        seen = "nothing; it is tried again, or the cache is used"
        if outcome.error is not None:
            text = str(outcome.error).replace(name, "...").replace(hub.storage, "https://storage")
            text = re.sub(r"[0-9a-f]{20,}", "...", text.replace(hub.endpoint, "https://huggingface.co"))
            text = re.sub(r"\s+", " ", text).replace("|", r"\|")
            seen = f"`{type(outcome.error).__name__}`: {text}"
    return f"| {TITLES[row.during.__name__]} | {row.name} | {seen} | {outcome.left} |"


def main() -> None:
    huggingface_hub.logging.set_verbosity_error()
    huggingface_hub.utils.disable_progress_bars()
    hub = hub_server.Hub(hub_listener.HUB_LISTENER)
    lines = ["| while | fault | what the user sees | what is left |", "|---|---|---|---|"]
    lines += [run(row, hub) for row in FAULTS]
    path = ROOT / "docs" / "faults.md"
    text = path.read_text(encoding="utf-8")
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    path.write_text(before + "\n" + "\n".join(lines) + "\n\n" + after, encoding="utf-8")
    print(f"{len(FAULTS)} faults")


if __name__ == "__main__":
    main()
