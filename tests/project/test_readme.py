# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The README is short, its code runs as it stands, and prints what it says."""

import os
import re

import pytest
import transformers as hf
from helpers.paths import ROOT

from tocom_hf import BackboneMismatchError, TocomModel
from tocom_hf.cli.main import COMMANDS


TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
OUTPUT = re.search(r"```text\n(.*?)```", TEXT, flags=re.DOTALL)[1]
RESULTS = re.search(r"<!-- generated: readme-results -->(.*?)<!-- end -->", TEXT, flags=re.DOTALL)[1]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A working directory in which the README's relative paths exist."""
    for name in ("examples", "hub_cards"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(index):
    namespace = {}
    exec(compile(BLOCKS[index], f"README.md block {index}", "exec"), namespace)
    return namespace


def test_the_quickstart_prints_what_it_says(clone, capsys):
    namespace = run(0)
    assert capsys.readouterr().out == OUTPUT
    assert isinstance(namespace["model"], TocomModel)


def test_the_set_for_everybody_fits_its_backbone_alone(clone):
    """The block as it stands, with a model of random weights in the place of the reader's."""
    config = hf.Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14, num_labels=10)
    hf.Dinov2ForImageClassification(config).save_pretrained(clone / "you" / "dinov2-small-finetuned")
    with pytest.raises(BackboneMismatchError, match="was not fine-tuned from it"):
        run(1)


@pytest.mark.slow
@pytest.mark.skipif("DINOV2_SMALL" not in os.environ, reason="needs DINOV2_SMALL, a folder of facebook/dinov2-small")
def test_the_set_for_everybody_runs(clone):
    config = hf.AutoConfig.from_pretrained(os.environ["DINOV2_SMALL"], num_labels=10)
    model = hf.Dinov2ForImageClassification.from_pretrained(os.environ["DINOV2_SMALL"], config=config)
    model.save_pretrained(clone / "you" / "dinov2-small-finetuned")
    model = run(1)["model"]
    assert model.target_r == 16


def test_merging_alone_is_undone(clone):
    model = run(2)["model"]
    assert not any("tome" in name for module in model.modules() for name in vars(module))


def test_every_block_of_code_is_run():
    assert len(BLOCKS) == 3


def test_it_takes_two_minutes_to_read():
    words = TEXT.split()
    assert 1000 <= len(words) <= 1300
    assert len(re.findall(r"!\[", TEXT)) == 1  # one picture


def test_there_is_one_table_of_results_of_at_most_25_numbers():
    assert TEXT.count("<!-- generated: ") == 2  # the other names the supported models
    assert 0 < len(re.findall(r"\d+(?:\.\d+)?", RESULTS)) <= 25


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_place(command):
    assert f"tocom {command}" in TEXT or command == "calibrate"  # of which the table names the function
