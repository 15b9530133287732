# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The pages of `docs/`, the index of the examples, and the notebook: their code runs, and what they name exists."""

import json
import re
from pathlib import Path

import matplotlib
import pytest
import torch
from conftest import make_model
from peft import LoraConfig, get_peft_model
from transformers.utils import logging

from tocom_hf import TocomModel


ROOT = Path(__file__).parent.parent
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


def authors_checkpoint(dim, max_r):
    generator = torch.Generator().manual_seed(3)
    return {
        f"blocks.{layer}.attn.{name}_tocom.adapter_{part}.weight": 0.3 * torch.randn(shape, generator=generator)
        for layer in range(4)
        for name in "qv"
        for part, shape in (("down", (dim * max_r, 32)), ("up", (32, dim * max_r)))
    }


@pytest.mark.parametrize(("source_r", "target_r"), [(0, 6), (5, 1), (2, 3)])
def test_a_converted_checkpoint_acts_as_in_the_authors_code(checkpoint, source_r, target_r):
    """There a mask selects the last `dim * r` rows for either degree, and the difference of the masks weighs them."""
    dim, max_r, scale = 2, 6, 0.1
    state_dict = authors_checkpoint(dim, max_r)
    plugins = run(MIGRATION[0], "migration.md")["convert"](state_dict, str(checkpoint), dim, max_r)
    composite = plugins.compose(source_r, target_r, scale)
    for layer in range(4):
        for name in "qv":
            down, up = (
                state_dict[f"blocks.{layer}.attn.{name}_tocom.adapter_{part}.weight"] for part in ("down", "up")
            )
            mask = [
                float(row >= dim * (max_r - target_r)) - float(row >= dim * (max_r - source_r)) for row in range(12)
            ]
            expected = scale * up @ (torch.tensor(mask)[:, None] * down)
            found = composite.apply(f"layers.{layer}.attention.{name}_proj", torch.zeros(32, 32))
            torch.testing.assert_close(found, expected)


def test_the_lora_recipe(checkpoint, plugins, tmp_path):
    tuned = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    plugins.save_pretrained(tmp_path / "plugins")
    compose = run(MIGRATION[1], "migration.md")["compose"]
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
    for path in re.findall(r"(?:python|launch|flock) ((?:examples|benchmarks|docs)/[\w/]+\.py)", text):
        assert (ROOT / path).exists(), path
