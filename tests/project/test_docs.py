# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The pages: their code runs, what they name exists, and their figures are those of the files that they come from."""

import dataclasses
import importlib
import importlib.util
import json
import re
import shlex
import sys

import matplotlib
import pytest
import torch
import yaml
from helpers.models import make_model, make_plugins
from helpers.paths import ROOT
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel
from transformers.utils import logging

from tocom_hf import PluginFileError, PluginSet, TocomModel
from tocom_hf.merging.backbones import find_backbone
from tocom_hf.merging.patching import get_settings
from tocom_hf.plugins.config import BackboneFacts, PluginSetConfig


DOCS = ROOT / "docs"
PLUGINS = str(ROOT / "hub_cards" / "tocom-vit-mix")
NOTEBOOK = ROOT / "examples" / "walkthrough.ipynb"
SITE_PAGES = sorted(DOCS.rglob("*.md"))
PAGES = [
    ROOT / "README.md",
    ROOT / "SECURITY.md",
    *SITE_PAGES,
    ROOT / "examples" / "README.md",
    ROOT / "examples" / "configs" / "README.md",
    *sorted((ROOT / "benchmarks").glob("*.md")),
    *sorted((ROOT / "benchmarks" / "fidelity").glob("*.md")),
]
PYTHON_PAGES = [
    "index",
    "usage",
    "recipes",
    "scales",
    "cost",
    "distillation",
    "evaluation",
    "plugin-format",
    "migration",
    "export",
]


def read(path):
    return path.read_text(encoding="utf-8")


def name(path):
    return path.relative_to(ROOT).as_posix()


def load(script):
    """A Python file of `docs/` as a module."""
    spec = importlib.util.spec_from_file_location(script, DOCS / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- links, paths and commands ------------------------------------------------------------------------------------


def without_code(text):
    """The text without blocks of code."""
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path):
    """What links may lead to on a page: its headings as GitHub writes them, and explicit anchors."""
    text = without_code(read(path))
    found = set(re.findall(r'<a id="([^"]+)"', text))
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower())
        found.add(plain.strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)", without_code(read(page))):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_and_modules_exist(page):
    text = read(page)
    for path in re.findall(r"(?:python|launch) ((?:examples|benchmarks|docs)/[\w/]+\.py)", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:tocom_hf|examples|benchmarks|docs|tests|hub_cards)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path
    for dotted in set(re.findall(r"\btocom_hf(?:\.\w+)+", text)):
        resolve(dotted)


def resolve(dotted):
    """Import what a dotted name means: a module, or a name in one."""
    if dotted.startswith("tocom_hf.cli") and importlib.util.find_spec("tocom_hf.cli") is None:
        return
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return
    raise AssertionError(dotted)


@pytest.mark.parametrize("page", [page for page in PAGES if "\ntocom " in read(page)], ids=name)
def test_commands_are_understood_as_pages_write_them(page):
    """The parser of each command takes the options that the page gives it, and misses none."""
    commands = pytest.importorskip("tocom_hf.cli.main").COMMANDS
    for block in re.findall(r"```bash\n(.*?)```", read(page), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["tocom"]:
                module = importlib.import_module(f"tocom_hf.cli.{commands[words[1]][0]}")
                # a set to start from is opened for its rank; pages name one that the reader has made
                words = [PLUGINS if word == "tocom-deit-base" else word for word in words]
                assert module.parse_args(words[2:]) is not None


# -- form ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", SITE_PAGES, ids=name)
def test_every_page_of_the_site_says_first_who_it_is_for(page):
    title, blank, first = read(page).split("\n")[:3]
    assert title.startswith("# ")
    assert blank == ""
    assert first.startswith("For those ")


def test_every_page_is_in_the_navigation():
    def files(entry):
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [file for value in values for file in files(value)]

    found = files(yaml.safe_load(read(ROOT / "mkdocs.yml"))["nav"])
    assert sorted(found) == sorted(page.relative_to(DOCS).as_posix() for page in SITE_PAGES)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_figures_of_several_tasks_have_names(page):
    """Shares of three tasks stand in named columns, or each beside the name of its task."""
    assert re.findall(r"-?[0-9.]+ / -?[0-9.]+ / -?[0-9.]+", without_code(read(page))) == []


def test_links_out_of_the_site_lead_to_the_repository():
    link = load("site_links").repository_link
    assert link("usage.md", "../SECURITY.md", "https://host/repo") == "https://host/repo/blob/main/SECURITY.md"
    assert (
        link("api/index.md", "../../README.md#use", "https://host/repo") == "https://host/repo/blob/main/README.md#use"
    )
    assert link("api/index.md", "../usage.md", "https://host/repo") is None


# -- what is generated --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generate():
    return load("generate")


def test_the_generated_tables_are_those_of_the_files(generate):
    stale = [name(path) for path, text in generate.generate().items() if not path.exists() or read(path) != text]
    assert stale == [], "run python docs/generate.py"


def test_the_share_of_the_gap_is_that_of_the_study(generate):
    """The share and its error, computed anew from which images were right, against the table that the study wrote."""
    grid = json.loads(read(generate.RESULTS / "study_a_mix" / "orientation" / "grid.json"))
    share, error = generate._gap_closed(grid)
    row = generate.Row("fine-tuned", "one set for all", "study_a_mix")
    assert f"{100 * share:.0f} %" == generate._share(row, "orientation", "no labels", "gap closed")
    # the study drew the test images anew 2,000 times; here one draws a few, with a seed
    moved = [c for c in grid["cells"] if c["source_r"] != c["target_r"]]
    gains = sum(c["compensated"]["unlabelled"]["gain"] for c in moved)
    assert share == pytest.approx(gains / sum(c["gap"] for c in moved))
    assert 0.03 < error < 0.1


def test_a_stale_table_is_noticed(generate, tmp_path, monkeypatch):
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("<!-- generated: memory -->\n| old |\n<!-- end -->\n", encoding="utf-8")
    monkeypatch.setattr(generate, "pages", lambda: [page])
    monkeypatch.setattr(generate, "api_pages", dict)
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(generate, "RESULTS", tmp_path / "benchmarks/fidelity/results")
    monkeypatch.setattr(generate, "STUDIES", tmp_path / "benchmarks/fidelity")
    monkeypatch.setitem(generate.TABLES, "memory", lambda: "| new |")
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    assert generate.main() == 1
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    assert generate.main() == 0
    assert read(page) == "<!-- generated: memory -->\n\n| new |\n\n<!-- end -->\n"


# -- the format of plugin sets ------------------------------------------------------------------------------------


def rows(text, first):
    """The rows of the tables whose first column has this name: key, type and range."""
    tables = re.findall(rf"^\| {first} \| type \| range .*?\n\n", text, re.DOTALL | re.MULTILINE)
    lines = [line for table in tables for line in table.strip().splitlines()[2:]]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


FORMAT = rows(read(DOCS / "plugin-format.md"), "key")


def test_every_key_of_a_plugin_set_is_specified():
    keys = {row[0].strip("`") for row in FORMAT}
    wanted = {field.name for facts in (PluginSetConfig, BackboneFacts) for field in dataclasses.fields(facts)}
    assert keys == (wanted - {"extra"}) | {"format_version", "tocom_hf_version"}


@pytest.mark.parametrize("row", [row for row in FORMAT if re.fullmatch(r"\S+ to \S+", row[2])], ids=lambda row: row[0])
def test_numbers_outside_the_range_that_is_specified_are_refused(row, tmp_path):
    key, (low, high) = row[0].strip("`"), row[2].split(" to ")
    if low.startswith("`"):
        low, high = "0", "4"
    path = tmp_path / "tocom_config.json"
    make_plugins(make_model()).config.to_json_file(path)
    content = json.loads(read(path))
    holder = content["backbone"] if key in content["backbone"] else content
    step = 1 if row[1].startswith("int") else 10.0
    for outside in (type(step)(float(low)) - step, type(step)(float(high)) + step):
        if key == "source_r":
            outside = -1 if outside < 0 else content["max_r"] + 1
        holder[key] = outside
        path.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(PluginFileError, match=key):
            PluginSetConfig.from_json_file(path)


@pytest.fixture(autouse=True)
def one_thread():
    """The models are so small that a second thread costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- code ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A working directory in which the relative paths of the pages exist."""
    for folder in ("examples", "hub_cards"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(page):
    """Run the blocks of Python on a page from top to bottom, and return the names that they define."""
    namespace = {}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", read(DOCS / f"{page}.md"), re.DOTALL)):
        exec(compile(block, f"{page}.md block {number}", "exec"), namespace)
    return namespace


def test_no_page_with_code_is_forgotten():
    assert sorted(page.stem for page in SITE_PAGES if "```python\n" in read(page)) == sorted(PYTHON_PAGES)


def test_the_first_page_runs(clone):
    assert run("index")["logits"].shape == (1, 10)


def test_usage_runs(clone):
    found = run("usage")
    plain = TocomModel.from_pretrained("examples/digits/checkpoint", source_r=0)
    with torch.no_grad():
        expected = plain(pixel_values=found["pixel_values"]).logits
    torch.testing.assert_close(found["exact"], expected)
    assert found["chain"].rank == 4 * found["plugins"].config.rank
    assert (clone / "composite" / "adapter_model.safetensors").exists()


def test_recipes_run(clone):
    found = run("recipes")
    settings = get_settings(find_backbone(found["model"]))
    assert settings.recipe == found["recipe"]
    assert settings.schedule == found["recipe"].schedules[8]


def test_scales_run(clone):
    found = run("scales")
    assert found["scale"] > 0  # merging at 8 costs this checkpoint much, which plugins win back
    assert found["fitted"].config.source_r == 0
    assert TocomModel.from_pretrained("my-digits").target_r == 8


def test_cost_runs(clone):
    found = run("cost")
    degree = found["model"].target_r
    assert found["calibration"][degree].gflops <= 0.03 < found["calibration"][degree - 1].gflops
    assert found["Calibration"].from_json_file("calibration.json").degrees == list(range(9))


@pytest.mark.slow
def test_export_runs(clone):
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    found = run("export")
    assert (found["exported"].target_r, found["logits"].shape) == (0, (2, 10))
    assert 0 < found["score"] <= 1


def test_distillation_runs(clone):
    run("distillation")
    assert PluginSet.from_pretrained("two-steps").config.max_r == 2


def test_evaluation_runs(clone):
    found = run("evaluation")
    assert found["result"].target_r == 8
    assert found["result"].accuracy_tocom > found["result"].accuracy_plain + 0.1


def test_the_format_of_plugins_loads_without_this_package(clone):
    found = run("plugin-format")
    expected = TocomModel.from_pretrained(
        AutoModel.from_pretrained("examples/digits/backbone", add_pooling_layer=False),
        plugins="hub_cards/tocom-vit-mix",
        source_r=4,
        target_r=8,
    )
    path = "layers.3.mlp.fc1.weight"
    torch.testing.assert_close(found["model"].get_parameter(path), expected.get_parameter(path))


def test_the_lora_recipe(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "checkpoint")
    tuned = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    make_plugins(model).save_pretrained(tmp_path / "plugins")
    composed = run("migration")["compose"](*(str(tmp_path / part) for part in ("checkpoint", "adapter", "plugins")), 4)
    assert isinstance(composed, TocomModel)
    assert not isinstance(composed, PeftModel)
    assert composed.target_r == 4


# -- examples -----------------------------------------------------------------------------------------------------


# what the notebook does at length, and what is enough to see that it runs
SHORTER = {
    "batch_size=64, seconds=2": "batch_size=8, seconds=0",
    "images.select(range(400))": "images.select(range(8))",
}


def test_the_notebook_runs_and_has_been_run(monkeypatch, tmp_path):
    cells = [cell for cell in json.loads(read(NOTEBOOK))["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells)
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    sources = ["".join(cell["source"]) for cell in cells]
    for long, short in SHORTER.items():
        assert sum(long in source for source in sources) == 1
        sources = [source.replace(long, short) for source in sources]
    matplotlib.use("Agg")
    monkeypatch.chdir(ROOT / "examples")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    namespace = {}
    try:
        for number, source in enumerate(sources):
            exec(compile(source, f"walkthrough.ipynb cell {number}", "exec"), namespace)
    finally:
        logging.enable_progress_bar()
    assert namespace["again"].target_r == namespace["model"].target_r


def test_the_index_of_the_examples_is_complete():
    index = read(ROOT / "examples" / "README.md")
    programs = {path.name for path in (ROOT / "examples").glob("*.py") if "__main__" in read(path)}
    scripts = programs | {"walkthrough.ipynb", "space"}
    assert [script for script in sorted(scripts) if script not in index] == []
