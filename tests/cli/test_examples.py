# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The commands do their work on the real images that the repository carries."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate.commands.config.config_args import load_config_from_file
from helpers.paths import ROOT
from helpers.scripts import load_script
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from tocom_hf import PluginSet, TocomModel, apply_tome, save_composite
from tocom_hf.cli.endings import WrongOptionError
from tocom_hf.data.images import TrainingImages, load_images, with_pixel_values
from tocom_hf.evaluation.reports import Report


CHECKPOINT = ROOT / "examples" / "fashion_mnist" / "checkpoint"
IMAGES = ROOT / "examples" / "fashion_mnist" / "test.parquet"
PLUGINS = ROOT / "hub_cards" / "tocom-vit-fashion-mnist"


ACCELERATE = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", 2]


def launch(*command, cwd):
    """Run Python with these arguments in processes of their own."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(cwd / "cache"),
        "ACCELERATE_USE_CPU": "true",
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """400 of the embedded images, as the checkpoint's processor makes them."""
    images = load_images(str(IMAGES), split="test", label_column="label", max_samples=400)
    dataset = with_pixel_values(images, AutoImageProcessor.from_pretrained(CHECKPOINT), label_column="label")
    return next(iter(DataLoader(dataset, batch_size=400)))


def logits(model, pixel_values):
    with torch.no_grad():
        return model(pixel_values=pixel_values).logits


@pytest.fixture(scope="module")
def dense(batch):
    """The logits of the untouched checkpoint."""
    return logits(AutoModelForImageClassification.from_pretrained(CHECKPOINT), batch["pixel_values"])


def test_the_embedded_checkpoint_is_respectable(batch, dense):
    assert (dense.argmax(-1) == batch["labels"]).float().mean() > 0.88


@pytest.mark.parametrize("target_r", [4, 6, 8])
def test_the_sign_of_the_shipped_set(batch, dense, target_r):
    """Design: adding brings the outputs closer to those at r = 0, subtracting takes them further away."""

    def divergence(scale):
        model = TocomModel.from_pretrained(CHECKPOINT, plugins=PLUGINS, target_r=target_r, scale=scale)
        student = logits(model, batch["pixel_values"]).log_softmax(-1)
        return F.kl_div(student, dense.log_softmax(-1), log_target=True, reduction="batchmean").item()

    trained = PluginSet.from_pretrained(PLUGINS).config.trained_scale
    assert divergence(trained) < 0.95 * divergence(0.0) < 0.95 * divergence(-trained)


def test_each_shipped_plugin_loads_with_stock_peft(batch):
    plugins = PluginSet.from_pretrained(PLUGINS)
    for index in range(plugins.config.max_r):
        name = f"P_{index}_{index + 1}"
        backbone = AutoModel.from_pretrained(CHECKPOINT, add_pooling_layer=False)
        with torch.no_grad():
            plain = backbone(batch["pixel_values"][:2]).last_hidden_state
            adapted = PeftModel.from_pretrained(backbone, PLUGINS, subfolder=name)(
                pixel_values=batch["pixel_values"][:2]
            ).last_hidden_state
        assert not torch.equal(adapted, plain)


def test_a_shipped_chain_as_one_peft_adapter(batch, tmp_path):
    plugins = PluginSet.from_pretrained(PLUGINS)
    save_composite(plugins.compose(2, 8), tmp_path)
    model = apply_tome(AutoModelForImageClassification.from_pretrained(CHECKPOINT), 8)
    PeftModel.from_pretrained(model.vit, tmp_path)
    unrecorded = AutoModelForImageClassification.from_pretrained(CHECKPOINT)
    del unrecorded.config.tocom
    composed = TocomModel.from_pretrained(unrecorded, plugins=plugins, source_r=2, target_r=8)
    pixel_values = batch["pixel_values"][:16]
    torch.testing.assert_close(logits(composed, pixel_values), logits(model, pixel_values), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def script():
    return load_script("reproduce_fashion_mnist")


@pytest.fixture
def reproduce(script, tmp_path, monkeypatch):
    """The script up to where it reads its data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in script.FILES:
        (tmp_path / "data" / name).touch()

    def parse(*arguments):
        return script.parse_args(["--data_dir", "data", "--output_dir", "out", *map(str, arguments)])

    return parse


def test_the_views_that_the_shipped_set_is_distilled_on(script):
    images = load_images(str(IMAGES), split="test", max_samples=3)
    own = torch.full((5, 28, 28), 255, dtype=torch.uint8)  # white, but for what a shift brings in
    more = TrainingImages(images, script.PROCESSOR, min_crop=1.0, flip=0.0)
    views = script.Views(own, more, 12, seed=0)
    values = [views[index]["pixel_values"] for index in range(len(views))]
    assert len(values) == 12
    for index, value in enumerate(values):
        assert value.shape == (3, 28, 28)
        assert value.dtype == torch.float32
        if index % 2:  # every second view is of the other images, in turn, as the checkpoint's processor makes them
            expected = script.PROCESSOR(images[index // 2 % 3]["image"].convert("RGB"), return_tensors="pt")
            torch.testing.assert_close(value, expected["pixel_values"][0], rtol=0, atol=1e-6)
        else:
            assert value[:, 2:-2, 2:-2].eq(1).all()
    assert any(not value.eq(1).all() for value in values[::2])  # shifted
    same, other = script.Views(own, more, 12, seed=0), script.Views(own, more, 12, seed=1)
    assert all(torch.equal(same[index]["pixel_values"], values[index]) for index in reversed(range(12)))
    assert any(not torch.equal(other[index]["pixel_values"], values[index]) for index in range(12))
    alone = script.Views(own, None, 4, seed=0)
    assert all(alone[index]["pixel_values"][:, 2:-2, 2:-2].eq(1).all() for index in range(4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--more_images", "none.parquet"], "There is no file none.parquet"),
        (["--checkpoint", "none"], "There is no checkpoint in none"),
        (["--checkpoint", "other"], "no ViT for the 28 px"),
        (["--checkpoint", "merging"], "trained while merging"),
    ],
)
def test_reproducing_finds_wrong_input_at_once(tmp_path, reproduce, arguments, message):
    for name, changes in (("other", {"image_size": 224}), ("merging", {"tocom": {"source_r": 4, "target_r": 4}})):
        config = AutoConfig.from_pretrained(CHECKPOINT)
        config.update(changes)
        config.save_pretrained(tmp_path / name)
    with pytest.raises(WrongOptionError, match=message):
        reproduce(*arguments)
    assert not (tmp_path / "out").exists()


def test_reproducing_goes_on_with_the_same_settings_only(reproduce):
    assert reproduce("--plugin_steps", "7").plugin_steps == 7
    assert reproduce("--plugin_steps", "7").plugin_steps == 7
    with pytest.raises(WrongOptionError, match="out was begun with --checkpoint None, --plugin_steps 7"):
        reproduce("--checkpoint", CHECKPOINT)


def test_quickstart_prints_its_table_and_writes_its_plot(run, tmp_path):
    code, output, errors = run("quickstart", "--target_r", 0, 8, "--dataset_split", "test[:100]")
    assert code == 0, errors
    rows = [line.split() for line in output.splitlines() if line.lstrip()[:1].isdigit()]
    (zero, *_), (eight, _, plain, tocom, *_) = (row for row in rows if len(row) == 6)
    assert (zero, eight) == ("0", "8")
    assert float(tocom.rstrip("%")) > float(plain.rstrip("%")) + 5  # the effect, on a task that the plugins never saw
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("launched", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_distil_on_real_images(run, tmp_path, launched):
    """Also by accelerate, which without MPI starts one process on a CPU; tests/distillation starts several."""
    arguments = [
        "--preset", "paper", "--eval_degrees", 0, 8, "--model_name_or_path", CHECKPOINT, "--dataset_name", IMAGES,
        "--dataset_split", "test", "--max_train_samples", 64, "--per_device_train_batch_size", 16,
        "--num_train_epochs", 1, "--learning_rate", 0.03, "--output_dir", tmp_path / "set",
    ]  # fmt: skip
    if launched:
        output = launch(*ACCELERATE, "-m", "tocom_hf.cli.distill", *arguments, cwd=tmp_path)
    else:
        output = run("distill", *arguments).output
    plugins = PluginSet.from_pretrained(tmp_path / "set")
    assert plugins.config.training["steps"] == 3  # of 64 images, 6 are held out
    assert plugins.config.training["mixup"] == 0.8
    assert plugins.config.training["agreement"]["degrees"] == [0, 8]
    assert (tmp_path / "set" / "agreement.png").read_bytes().startswith(b"\x89PNG")
    assert "teacher m \\ student n" in output
    assert plugins.config.training["num_processes"] == 1
    model = TocomModel.from_pretrained(CHECKPOINT, plugins=plugins, target_r=16)
    assert model.target_r == 16


def test_distil_on_one_checkpoint(run, tmp_path):
    code, output, errors = run(
        "distill", "--init_plugins", PLUGINS, "--source_r", 0,
        "--max_steps", 3, "--attn_implementation", "eager",
        "--model_name_or_path", CHECKPOINT, "--dataset_name", IMAGES,
        "--dataset_split", "test", "--max_train_samples", 64, "--per_device_train_batch_size", 16,
        "--eval_degrees", 4, 8, "--output_dir", tmp_path / "set",
    )  # fmt: skip
    assert code == 0, errors
    config = PluginSet.from_pretrained(tmp_path / "set").config
    assert (config.source_r, config.max_r) == (0, 8)
    assert config.training["attn_implementation"] == "eager"
    assert config.training["init_plugins"]["steps"] == PluginSet.from_pretrained(PLUGINS).config.training["steps"]
    assert len(config.training["agreement"]["plain"]) == 1
    assert [line.split()[0] for line in output.splitlines() if ">" in line] == ["0"]


def test_finetune_records_its_source_degree_and_resumes(run, tmp_path):
    command = [
        "finetune", "--dataset_name", IMAGES, "--train_split", "test[:64]",
        "--eval_split", "test[64:128]", "--source_r", 4, "--per_device_train_batch_size", 16, "--learning_rate", 1e-4,
        "--output_dir", tmp_path / "tuned", "--report_to", "none", "--use_cpu", "--save_steps", 6,
        "--lr_scheduler_type", "constant", "--model_name_or_path", CHECKPOINT,
    ]  # fmt: skip
    code, _, errors = run(*command, "--max_steps", 6)
    assert code == 0, errors
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["tocom"]["source_r"] == 4
    assert json.loads((tmp_path / "tuned" / "eval_results.json").read_text())["eval_accuracy"] > 0.8
    model = TocomModel.from_pretrained(tmp_path / "tuned", plugins=PLUGINS, target_r=6)
    assert (model.source_r, model.target_r) == (4, 6)

    # resumed at its end, Trainer takes one more step; that must start from the six before, not from the beginning
    start = AutoModelForImageClassification.from_pretrained(CHECKPOINT).state_dict()
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned").state_dict()
    checkpoint = tmp_path / "tuned" / "checkpoint-6"
    code, _, errors = run(*command, "--max_steps", 6, "--resume_from_checkpoint", checkpoint)
    assert code == 0, errors
    resumed = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned").state_dict()

    def distance(one, other):
        return sum((one[name] - other[name]).abs().mean() for name in one if "layers" in name)

    assert distance(resumed, saved) < 0.5 * distance(start, saved)


def test_finetune_ends_at_the_best_checkpoint_if_asked(run, tmp_path):
    """The best of two is the first here, because it is told that a high loss is good."""
    code, _, errors = run(
        "finetune", "--dataset_name", IMAGES, "--train_split", "test[:32]", "--eval_split",
        "test[64:80]", "--per_device_train_batch_size", 16, "--learning_rate", 1e-4, "--report_to", "none", "--use_cpu",
        "--output_dir", tmp_path / "tuned", "--model_name_or_path", CHECKPOINT, "--max_steps", 2, "--save_steps", 1,
        "--eval_strategy", "steps", "--eval_steps", 1, "--load_best_model_at_end", "--metric_for_best_model",
        "eval_loss", "--greater_is_better", "True",
    )  # fmt: skip
    assert code == 0, errors
    best, last, result = (
        AutoModelForImageClassification.from_pretrained(tmp_path / "tuned" / name).state_dict()
        for name in ("checkpoint-1", "checkpoint-2", "")
    )
    state = json.loads((tmp_path / "tuned" / "checkpoint-2" / "trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]).name == "checkpoint-1"
    assert all(torch.equal(result[name], weight) for name, weight in best.items())
    assert not any(torch.equal(result[name], weight) for name, weight in last.items() if "q_proj.weight" in name)


def test_finetune_with_lora_writes_an_ordinary_checkpoint_and_resumes(run, tmp_path):
    command = [
        "finetune", "--dataset_name", IMAGES, "--train_split", "test[:64]",
        "--eval_split", "test[64:128]", "--source_r", 4, "--per_device_train_batch_size", 16, "--learning_rate", 1e-3,
        "--output_dir", tmp_path / "tuned", "--report_to", "none", "--use_cpu", "--save_steps", 4, "--lora_rank", 4,
        "--lora_target_modules", "fc1", "q_proj", "--lr_scheduler_type", "constant", "--model_name_or_path", CHECKPOINT,
    ]  # fmt: skip

    def deltas():
        start = AutoModelForImageClassification.from_pretrained(CHECKPOINT).state_dict()
        tuned = TocomModel.from_pretrained(tmp_path / "tuned", plugins=PLUGINS, target_r=4)
        assert tuned.source_r == 4
        return {name: (value - start[name]).flatten(1) for name, value in tuned.state_dict().items() if value.ndim == 2}

    code, _, errors = run(*command, "--max_steps", 4)
    assert code == 0, errors
    assert json.loads((tmp_path / "tuned" / "eval_results.json").read_text())["eval_accuracy"] > 0.8
    first = deltas()
    linear = {name: delta for name, delta in first.items() if "layers" in name or "classifier" in name}
    assert len(linear) == 12 * 6 + 1
    for name, delta in linear.items():
        assert delta.any() == any(part in name for part in ("fc1", "q_proj", "classifier")), name
        if "classifier" not in name:
            assert torch.linalg.matrix_rank(delta, rtol=1e-4) <= 4, name

    code, _, errors = run(
        *command, "--max_steps", 4, "--resume_from_checkpoint", tmp_path / "tuned" / "checkpoint-4"
    )  # one step more, from the four before
    assert code == 0, errors
    moved = sum((delta - first[name]).norm() for name, delta in deltas().items())
    assert moved < 0.7 * sum(delta.norm() for delta in first.values())


def test_fit_scales_writes_a_set_for_the_checkpoint(run, refused, tmp_path):
    command = [
        "fit-scales", "--model_name_or_path", CHECKPOINT, "--plugins", PLUGINS, "--dataset_name",
        IMAGES, "--dataset_split", "test[:40]", "--max_samples", 24, "--max_steps", 2, "--target_r", 8,
    ]  # fmt: skip
    code, output, errors = run(*command, "--output_dir", tmp_path / "set")
    assert code == 0, errors
    assert "source_r=0, r=0..8" in output
    fitted = PluginSet.from_pretrained(tmp_path / "set")
    training = fitted.config.training
    assert (training["num_images"], training["max_steps"], training["target_r"]) == (24, 2, [8])
    assert training["dataset_split"] == "test[:40]"
    assert TocomModel.from_pretrained(CHECKPOINT, plugins=fitted, target_r=8).target_r == 8
    error = refused(*command, "--output_dir", tmp_path / "none", "--target_r", 0)
    assert "ArgumentError: The model was trained at target_r=0" in error
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_evaluate_writes_the_same_figures_on_any_number_of_processes(run, tmp_path, processes):
    arguments = [
        "--checkpoints", CHECKPOINT, "--plugins", PLUGINS, "--dataset_name", IMAGES, "--validation_split", "test[:40]",
        "--test_split", "test[40:101]", "--target_r", 0, 8, "--scales", 0.1, 0.2, "--per_device_eval_batch_size", 16,
        "--speed_rounds", 1, "--output_dir", tmp_path / "grid",
    ]  # fmt: skip
    if processes == 1:
        code, output, errors = run("evaluate", *arguments)
        assert code == 0, errors
    else:
        output = launch(*TORCHRUN, ROOT / "examples/evaluate.py", *arguments, cwd=tmp_path)
    assert output.count("target r = 8") == 1
    report = Report.load(tmp_path / "grid" / "grid.json")
    dataset = with_pixel_values(
        load_images(str(IMAGES), split="test[40:101]", label_column="label"),
        AutoImageProcessor.from_pretrained(CHECKPOINT),
        label_column="label",
    )
    images = next(iter(DataLoader(dataset, batch_size=61)))
    model = apply_tome(AutoModelForImageClassification.from_pretrained(CHECKPOINT), 8)
    expected = logits(model, images["pixel_values"]).argmax(-1) == images["labels"]
    assert torch.equal(report.runs[1].plain, expected)
    assert [cost.target_r for cost in report.costs] == [0, 8]


def test_model_arithmetic_adds_the_difference_of_two_models(run, tmp_path):
    """With task A for task B, M_m^A - M_n^A + M_n^A is M_m^A."""
    trained_at_8 = AutoModelForImageClassification.from_pretrained(CHECKPOINT)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trained_at_8.vit.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    trained_at_8.config.tocom = {"source_r": 8, "target_r": 8, "scale": None}
    trained_at_8.save_pretrained(tmp_path / "r8")
    code, output, errors = run(
        "model_arithmetic", "--target_a", tmp_path / "r8", "--source_a", CHECKPOINT, "--source_b",
        CHECKPOINT, "--target_b", tmp_path / "r8", "--dataset_name", IMAGES, "--test_split", "test[:60]", "--output",
        tmp_path / "arithmetic.json",
    )  # fmt: skip
    assert code == 0, errors
    assert "M_8^A - M_0^A + M_0^B" in output
    (row,) = json.loads((tmp_path / "arithmetic.json").read_text())["rows"]
    assert row["arithmetic"] == row["trained_at_target"] != row["plain"]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("distill", ["--image_column", "picture"], "DatasetError: The data set .* has no column 'picture'"),
        ("distill", ["--max_train_samples", "3"], "DatasetError: The data set has 3 images"),
        ("distill", ["--max_r", "0"], "DegreeError: max_r must be at least 1"),
        ("quickstart", ["--target_r", "9"], "DegreeError: target_r=9 is outside the plugin set"),
        ("quickstart", ["--source_r", "4"], "DegreeError: source_r=4 contradicts"),
        ("evaluate", ["--target_r", "9"], "DegreeError: target_r=9 is outside the plugin set"),
        ("evaluate", ["--source_r", "0", "4"], "ArgumentError: There are 1 checkpoints and 2 values of --source_r"),
        (
            "evaluate",
            ["--plugins", PLUGINS, PLUGINS],
            "ArgumentError: There are 1 checkpoints and 2 values of --plugins",
        ),
        (
            "distill",
            ["--init_plugins", PLUGINS, "--rank", "4"],
            "ArgumentError: Cannot start from .* with max_r=8 and rank=4",
        ),
        ("distill", ["--init_plugins", "no/where/set"], "no/where/set"),
        ("distill", ["--source_r", "17"], "DegreeError: source_r=17 is above max_r=16"),
        (
            "evaluate",
            ["--validation_split", "test[:20]"],
            "20 images are in the validation split and in the test split",
        ),
    ],
)
def test_wrong_use_writes_nothing(refused, tmp_path, script, arguments, message):
    common = ["--model_name_or_path", CHECKPOINT, "--dataset_name", IMAGES, "--dataset_split", "test[:20]"]
    output = ["--output", tmp_path / "plot.png"] if script == "quickstart" else ["--output_dir", tmp_path / "set"]
    if script == "quickstart":
        common += ["--plugins", PLUGINS]
    if script == "evaluate":
        common = [
            "--checkpoints", CHECKPOINT, "--plugins", PLUGINS, "--dataset_name", IMAGES, "--test_split", "test[:20]",
            "--validation_split", "test[20:40]", "--target_r", 4,
        ]  # fmt: skip
    assert re.search(message, refused(script, *common, *output, *arguments))
    assert not (tmp_path / "set").exists()
    assert not (tmp_path / "plot.png").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "configs").glob("[!r]*.yaml")), ids=lambda path: path.stem)
def test_configurations_are_accelerates(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == 8 * config.num_machines
    assert config.mixed_precision == "bf16"
