# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The pages of `docs/`, the index of the examples, and the notebook: their code runs, and what they name exists."""

import json
import re

import matplotlib
import pytest
from helpers.models import make_model
from helpers.paths import ROOT
from peft import LoraConfig, get_peft_model
from transformers.utils import logging

from tocom_hf import TocomModel


MIGRATION = re.findall(r"```python\n(.*?)```", (ROOT / "docs/migration.md").read_text(encoding="utf-8"), re.DOTALL)
NOTEBOOK = ROOT / "examples" / "walkthrough.ipynb"


def run(code, name):
    namespace = {}
    exec(compile(code, name, "exec"), namespace)
    return namespace


@pytest.fixture
def checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_the_lora_recipe(checkpoint, plugins, tmp_path):
    tuned = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    plugins.save_pretrained(tmp_path / "plugins")
    compose = run(MIGRATION[0], "migration.md")["compose"]
    model = compose(str(checkpoint), str(tmp_path / "adapter"), str(tmp_path / "plugins"), 4)
    assert isinstance(model, TocomModel)
    assert model.target_r == 4


def test_the_notebook_runs_and_has_been_run(monkeypatch, tmp_path):
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells)
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    matplotlib.use("Agg")
    monkeypatch.chdir(ROOT / "examples")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    namespace = {}
    try:
        for number, cell in enumerate(cells):
            exec(compile("".join(cell["source"]), f"walkthrough.ipynb cell {number}", "exec"), namespace)
    finally:
        logging.enable_progress_bar()
    assert namespace["again"].target_r == namespace["model"].target_r


def test_the_index_of_the_examples_is_complete():
    index = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    scripts = {path.name for path in (ROOT / "examples").glob("*.py")} | {"walkthrough.ipynb", "space"}
    assert [name for name in sorted(scripts) if name not in index] == []


@pytest.mark.parametrize(
    "page", ["README.md", "docs/degrees.md", "docs/migration.md", "examples/README.md", "benchmarks/README.md"]
)
def test_links_and_paths_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert ((ROOT / page).parent / target).exists(), target
    for path in re.findall(r"(?:python|launch) ((?:examples|benchmarks|docs)/[\w/]+\.py)", text):
        assert (ROOT / path).exists(), path
