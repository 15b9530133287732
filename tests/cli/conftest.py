# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
from typing import NamedTuple

import datasets
import pytest
from helpers.scripts import load_script

from tocom_hf.cli.main import COMMANDS, main


class Ended(NamedTuple):
    """How a command has ended, and what it has printed."""

    code: int
    output: str
    errors: str


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty folder to work in, no Hub, no accelerator, and a cache that is thrown away."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(offline, capsys):
    """Run a subcommand of `tocom`, or an example script, in this process: `run(name, *arguments)`."""

    def run(name, *arguments):
        capsys.readouterr()
        given = [str(argument) for argument in arguments]
        code = main([name, *given]) if name in COMMANDS else load_script(name).main(given)
        printed = capsys.readouterr()
        return Ended(code, printed.out, printed.err)

    return run


@pytest.fixture
def refused(run):
    """Run a command that must refuse its arguments, and return the one line that it ends with."""

    def refused(name, *arguments):
        ended = run(name, *arguments)
        assert ended.code == 2, ended
        lines = ended.errors.splitlines()
        assert len(lines) == 1, ended.errors
        command = f"tocom {name}" if name in COMMANDS else f"{name}.py"
        assert lines[0].startswith(f"{command}: error: ")
        return lines[0]

    return refused
