# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The parts of `benchmarks/fidelity` that need neither pictures nor fonts of the system."""

import json
import math
import random
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.evaluation import make_run
from helpers.models import make_plugins
from helpers.paths import ROOT
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from tocom_hf import PluginSet, TocomModel
from tocom_hf.cost.timing import DegreeCost
from tocom_hf.data.tasks import load_labelled
from tocom_hf.evaluation import reports
from tocom_hf.evaluation.grid import CellRun
from tocom_hf.evaluation.reports import Report


FOLDER = ROOT / "benchmarks" / "fidelity"
CHECKPOINT = ROOT / "examples" / "fashion_mnist" / "checkpoint"


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in ("halve_patches", "images", "linear", "mix", "pretrain", "probe", "publish", "run"):
        sys.modules.pop(name, None)


def test_the_images_of_a_task_depend_on_the_seed_alone(tmp_path):
    import images

    for name in ("one", "same", "other"):
        style = images.STYLES["cluttered"]
        images.write_task("count", tmp_path / name, {"train": 6, "test": 4}, 48, int(name == "other"), style)
    first, same, other = (load_labelled(str(tmp_path / name), "train")[0] for name in ("one", "same", "other"))
    assert [sample["image"].tobytes() for sample in first] == [sample["image"].tobytes() for sample in same]
    assert [sample["image"].tobytes() for sample in first] != [sample["image"].tobytes() for sample in other]
    assert first[0]["image"].size == (48, 48)
    assert first.features["label"].names == [str(number) for number in range(1, 9)]
    assert len(load_labelled(str(tmp_path / "one"), "test")[0]) == 4


def components(mask):
    """Number of connected regions, by flood fill."""
    mask, number = mask.copy(), 0
    while mask.any():
        number, stack = number + 1, [tuple(np.argwhere(mask)[0])]
        while stack:
            row, column = stack.pop()
            if 0 <= row < mask.shape[0] and 0 <= column < mask.shape[1] and mask[row, column]:
                mask[row, column] = False
                stack += [(row + y, column + x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    return number


def test_the_labels_are_what_is_drawn():
    import images

    style = images.STYLES["plain"]
    drawn, labels, names = images.count(12, 112, 0, style)
    for image, label in zip(drawn, labels, strict=True):
        assert components(np.asarray(image)[..., 0] > 0) == int(names[label])
    drawn, labels, _ = images.orientation(8, 112, 0, style)
    for image, label in zip(drawn, labels, strict=True):
        rows, columns = np.nonzero(np.asarray(image)[..., 0])
        _, vectors = np.linalg.eigh(np.cov(columns, rows))
        x, y = vectors[:, -1]
        assert abs((np.degrees(np.arctan2(y, x)) - 22.5 * (label + 0.5) + 90) % 180 - 90) < 11.25 + 3


def test_the_summary_joins_seeds(tmp_path, monkeypatch):
    import run

    # ten reports are written, and none of their pictures looked at
    monkeypatch.setattr(reports, "plot_heat_map", lambda report, path: None)
    monkeypatch.setattr(reports, "plot_tradeoff", lambda report, path: None)
    for seed in (0, 1):
        for r in (0, 4):
            runs = [make_run(r, r, seed, 0.9), make_run(r, 4 - r, seed, 0.5, 0.7)]
            report = Report(
                {"dataset": "x", "checkpoints": [""]}, runs, [DegreeCost(0, (), 2.0), DegreeCost(4, (), 1.0)]
            )
            for task in ("count", "fitted-count"):
                report.save(run.grid(tmp_path, task, r, seed))
    tasks = ["count", "fitted-count", "not there"]
    run.tabulate({"degrees": [0, 4]}, tmp_path, tmp_path / "results", tasks, [0, 1, 2])
    content = json.loads((tmp_path / "results" / "count" / "grid.json").read_text())
    assert [cell["checkpoints"] for cell in content["cells"]] == [2] * 4
    moved = [cell for cell in content["cells"] if cell["source_r"] != cell["target_r"]]
    share = sum(c["compensated"]["paper"]["gain"] for c in moved) / sum(c["gap"] for c in moved)
    summary = (tmp_path / "results" / "summary.md").read_text()
    assert f"| {100 * share:.0f} % |" in summary
    gains = [cell["compensated"]["paper"]["gain"] for cell in moved]
    lost = [cell["lost"] for cell in moved]  # all of them clear
    assert f"| count | 2 of 2 | {100 * sum(lost) / 2:.1f} | {100 * sum(gains) / sum(lost):.0f} % |" in summary
    below = sum(c["compensated"]["paper"]["gain"] < -c["compensated"]["paper"]["gain_se"] for c in moved)
    for group in ("fine-tuned", "fine-tuned, fitted plugins"):
        assert f"| {group} | 2 | {100 * sum(gains) / 2:+.2f} ({below}) |" in summary
    changes = (tmp_path / "results" / "changes.md").read_text().splitlines()
    (line,) = [row for row in changes if row.startswith("| `count` | 0 to 4 |")]
    cell = next(cell for cell in moved if cell["source_r"] == 0)
    paper = cell["compensated"]["paper"]
    assert line.startswith(f"| `count` | 0 to 4 | {100 * cell['plain']:.1f} ({-100 * cell['lost']:+.1f} ± ")
    assert f"| {100 * cell['trained']:.1f} ({100 * cell['gap']:+.1f} ± " in line
    assert f"| {100 * paper['gain']:+.1f} ± {100 * paper['gain_se']:.1f} |" in line


def test_rows_without_a_checkpoint_at_the_target_have_no_gap_to_sum(tmp_path):
    import run

    runs = [make_run(4, 4, 0, 0.9), make_run(4, 0, 0, 0.5, 0.7)]
    Report({"dataset": "x", "checkpoints": [""]}, runs, [DegreeCost(0, (), 2.0), DegreeCost(4, (), 1.0)]).save(
        run.grid(tmp_path, "count", 4, 0)
    )
    run.tabulate({"degrees": [0, 4]}, tmp_path, tmp_path / "results", ["count"], [0])
    summary = (tmp_path / "results" / "summary.md").read_text()
    assert "cells with a clear gap" not in summary  # not even an empty table
    assert "| count | 1 of 1 |" in summary
    assert "| `count` | 4 to 0 |" in (tmp_path / "results" / "changes.md").read_text()


def test_settings_override_the_configuration():
    import run

    config = {"finetuning": {"learning_rate": 3e-3, "num_train_epochs": 15}, "seeds": [0, 1]}
    run.override(config, ["finetuning.learning_rate=1e-3", "seeds=[2]"])
    assert config == {"finetuning": {"learning_rate": 1e-3, "num_train_epochs": 15}, "seeds": [2]}
    with pytest.raises(SystemExit, match=r"no finetuning\.rate"):
        run.override(config, ["finetuning.rate=1"])
    with pytest.raises(SystemExit, match=r"no model\.rate"):
        run.override(config, ["model.rate=1"])
    with pytest.raises(SystemExit, match="must be JSON"):
        run.override(config, ["seeds=linear"])


def test_the_configurations_fit_the_scripts():
    import images

    for path in FOLDER.glob("study_*.json"):
        config = json.loads(path.read_text())
        assert set(config["tasks"]) <= set(images.TASKS)
        if "distillation" in config:  # the set of study C has settings of its own
            assert max(config["degrees"]) <= config["distillation"]["max_r"]
        shared = ("max_r", "rank", "scale")  # what a fitted set takes over from the one that it starts from
        for name in shared if "fitting" in config else ():
            assert config["fitting"][name] == config["distillation"][name]
        assert config["style"] in images.STYLES
        if config["model"].startswith("examples/"):
            model = AutoConfig.from_pretrained(FOLDER.parents[1] / config["model"])
            assert model.image_size == config["image_size"]


def test_the_base_takes_images_of_the_study_and_records_no_degree(tmp_path):
    import run

    run.make_base({"image_size": 20}, str(CHECKPOINT), tmp_path / "base")
    assert hasattr(AutoConfig.from_pretrained(CHECKPOINT), "tocom")
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "base"), "tocom")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "base")
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    assert processor(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 20, 20)


def test_arguments_without_a_value_are_left_to_the_script(monkeypatch):
    import run

    commands = []
    monkeypatch.setattr(run.subprocess, "run", lambda command, check: commands.append(command))
    run.run("distill.py", source_r=None, degrees=[0, 4], scales=[], max_r=8)
    assert commands[0][2:] == ["--degrees", "0", "4", "--max_r", "8"]


def test_a_plugin_set_for_each_source_degree_serves_its_checkpoints(tmp_path, monkeypatch):
    import run

    made = []

    def distil_set(config, root, folder, more):
        folder.mkdir(parents=True)
        made.append((folder.relative_to(root).as_posix(), more))

    monkeypatch.setattr(run, "distil_set", distil_set)
    run.distil({"distillation": {"source_r": None}, "degrees": [0, 4]}, tmp_path / "one")
    run.distil({"distillation": {"source_r": run.EACH}, "degrees": [0, 4]}, tmp_path / "each")
    assert made == [("plugins", {}), ("plugins/r0", {"source_r": 0}), ("plugins/r4", {"source_r": 4})]
    assert run.plugins_folder(tmp_path / "one", "digits", 4, 0) == tmp_path / "one" / "plugins"
    assert run.plugins_folder(tmp_path / "each", "digits", 4, 0) == tmp_path / "each" / "plugins" / "r4"
    assert run.plugins_folder(tmp_path / "each", "fitted-digits", 4, 0).parts[-3:] == ("fitted", "digits", "r4-seed0")


def test_one_adapted_plugin_set_serves_all_checkpoints_of_a_task(tmp_path, monkeypatch):
    import run

    config = {
        "precision": "no",
        "distillation": {"objective": "features", "learning_rate": 0.03},
        "fitting": {"objective": "auto", "learning_rate": 0.1, "max_steps": 5},
    }
    calls = []

    def distill(script, output_dir, **arguments):
        output_dir.mkdir(parents=True)
        (output_dir / run.CONFIG_NAME).touch()
        calls.append(arguments)

    monkeypatch.setattr(run, "run", distill)
    for task in ("adapted-digits", "adapted-linear-digits"):
        run.adapt(config, tmp_path, task)
    (call,) = calls
    assert call["model_name_or_path"] == tmp_path / "base"
    assert call["dataset_name"] == tmp_path / "data" / "digits" / "train.parquet"
    assert (call["objective"], call["learning_rate"], call["max_steps"]) == ("features", 0.03, 5)
    folders = {
        run.plugins_folder(tmp_path, task, r, 1) for task in ("adapted-digits", "adapted-linear-digits") for r in (0, 8)
    }
    assert folders == {tmp_path / "adapted" / "digits"}
    assert run.checkpoint(tmp_path, "adapted-linear-digits", 4, 0).parts[-2:] == ("linear-digits", "r4-seed0")


def test_scales_are_fitted_to_each_checkpoint_on_the_images_that_scales_are_picked_on(tmp_path, monkeypatch):
    import run

    calls = []

    def fit(script, output_dir, **arguments):
        output_dir.mkdir(parents=True)
        (output_dir / run.CONFIG_NAME).touch()
        calls.append({"script": script, **arguments})

    monkeypatch.setattr(run, "run", fit)
    for _ in range(2):  # the second time it is there
        run.scale({"scale_fitting": {"max_steps": 5}}, tmp_path, "scaled-linear-digits", 4, 1)
    (call,) = calls
    assert call["model_name_or_path"] == run.checkpoint(tmp_path, "linear-digits", 4, 1)
    assert call["plugins"] == run.plugins_folder(tmp_path, "linear-digits", 4, 1)
    assert call["dataset_name"] == tmp_path / "data" / "digits" / "validation.parquet"
    assert call["max_steps"] == 5
    assert run.plugins_folder(tmp_path, "scaled-digits", 4, 0) == tmp_path / "scaled" / "digits" / "r4-seed0"
    assert run.group_name("scaled-digits") == "fine-tuned, fitted scales"


def test_strokes_depend_on_the_seed_alone():
    import images

    drawn = []
    for seed in (0, 0, 1):
        canvas = images.Image.new("RGB", (96, 96))
        images._strokes(canvas, images.STYLES["plain"], random.Random(seed))
        drawn.append(np.asarray(canvas))
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    assert all(image.any() for image in drawn)


def test_the_letters_to_distil_on_are_no_digits():
    import images

    assert len(set(images.LETTERS)) == len(images.LETTERS) > 300
    assert all(letter.isalpha() for letter in images.LETTERS)
    assert not {*"OoIl\u041e\u0417\u0437\u039f"} & {*images.LETTERS}


def test_linear_heads_are_fitted_to_what_the_head_reads(tmp_path, monkeypatch):
    import images
    import linear

    images.write_task("count", tmp_path / "data", {"train": 60, "validation": 4}, 28, 0, images.STYLES["plain"])
    arguments = {"model": CHECKPOINT, "data": tmp_path / "data", "source_r": 4, "output_dir": tmp_path / "head"}
    pairs = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["linear.py", *pairs])
    linear.main()
    model = TocomModel.from_pretrained(tmp_path / "head")
    assert model.source_r == 4
    dataset, _ = load_labelled(str(tmp_path / "data"), "train")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "head")
    with torch.no_grad():
        logits = model(**processor(images=list(dataset["image"]), return_tensors="pt")).logits
    assert (logits.argmax(-1) == torch.tensor(dataset["label"][:])).float().mean() > 0.5  # chance is 1 in 8
    frozen = AutoModelForImageClassification.from_pretrained(CHECKPOINT)
    for name, weight in frozen.vit.state_dict().items():
        assert torch.equal(weight, model.vit.state_dict()[name]), name


def test_a_halved_patch_answers_as_its_enlargement_did():
    import halve_patches

    generator = torch.Generator().manual_seed(0)
    weight, patch = torch.randn(5, 3, 4, 4, generator=generator), torch.randn(1, 3, 2, 2, generator=generator)
    enlarged = np.stack(
        [np.asarray(Image.fromarray(channel.numpy()).resize((4, 4), Image.BILINEAR)) for channel in patch[0]]
    )
    expected = F.conv2d(torch.tensor(enlarged)[None], weight)
    torch.testing.assert_close(F.conv2d(patch, halve_patches.patch_projection(weight)), expected)


def test_halved_patches_give_four_times_the_tokens_in_the_same_places():
    import halve_patches

    model = ViTForImageClassification.from_pretrained(CHECKPOINT)
    with torch.no_grad():  # every position holds its row and column
        table = model.vit.embeddings.position_embeddings
        table[0, 1:] = 0
        table[0, 1:, 0], table[0, 1:, 1] = torch.arange(49) // 7, torch.arange(49) % 7
    finer = halve_patches.halve_patches(model)
    positions = finer.vit.embeddings.position_embeddings[0, 1:, :2].unflatten(0, (14, 14))
    centres = (torch.arange(14) - 0.5) / 2  # of the halved patches, in widths of the old ones
    inside = slice(4, 10)  # where the interpolation does not meet the border
    near = {"rtol": 0, "atol": 0.05}  # a bicubic interpolation is not exact on a slope
    torch.testing.assert_close(positions[inside, inside, 0], centres[inside, None].expand(6, 6), **near)
    torch.testing.assert_close(positions[inside, inside, 1], centres[inside].expand(6, 6), **near)
    torch.testing.assert_close(finer.vit.embeddings.position_embeddings[0, 0], table[0, 0])
    tokens = finer.vit(torch.zeros(1, 3, 28, 28)).last_hidden_state
    assert tokens.shape == (1, 197, 64)
    assert not hasattr(finer.config, "tocom")
    assert model.config.patch_size == 4


def test_an_odd_patch_cannot_be_halved():
    import halve_patches

    model = ViTForImageClassification(
        ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, patch_size=7)
    )
    with pytest.raises(ValueError, match="7 pixels"):
        halve_patches.halve_patches(model)


def test_shapes_depend_on_the_seed_alone_and_dots_are_counted():
    import mix

    first, same, other = ([mix.shape(generator) for _ in range(120)] for generator in map(random.Random, (0, 0, 1)))
    assert [(image.tobytes(), label) for image, label in first] == [(image.tobytes(), label) for image, label in same]
    assert [label for _, label in first] != [label for _, label in other]
    assert {label for _, label in first} == set(range(len(mix.SHAPES)))
    for image, label in first:
        kind, _, number = mix.SHAPES[label].partition(" ")
        mask = np.asarray(image.convert("L")) > 0
        if kind == "dots":
            assert components(mask) == int(number)
        elif kind in ("ellipse", "ring", "arc", "cross", "star"):
            assert components(mask) == 1
        assert not any(edge.any() for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1])) or kind not in (
            "dots",
            "arc",
        )


def test_distillation_takes_as_many_images_of_every_group_of_the_mix(monkeypatch):
    import mix

    sizes = {"clothing": 30, "letter": 50}
    groups = {
        name: mix.Group(np.full((size, 28, 28), index, np.uint8) + np.arange(size, dtype=np.uint8)[:, None, None] * 2,
                        np.zeros(size, np.int64), ["a"])
        for index, (name, size) in enumerate(sizes.items())
    }  # fmt: skip
    monkeypatch.setattr(mix, "make_mix", lambda: groups)
    values = [[np.asarray(row["image"])[0, 0, 0] for row in mix.distillation_images(40, seed)] for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]
    assert len(set(values[0])) == 40  # none twice
    assert sum(value % 2 for value in values[0]) == 20


def test_images_are_shifted_and_only_mirrored_where_that_is_allowed():
    import pretrain

    image = torch.zeros(28, 28, dtype=torch.uint8)
    image[10:14, 8:10], image[10, 8:16] = 200, 100  # not its own mirror image
    images = image.expand(300, 28, 28)
    shifted = {
        (mirrored, rows, columns): torch.roll(image.flip(-1) if mirrored else image, (rows, columns), (0, 1))
        for mirrored in (False, True)
        for rows in range(-2, 3)
        for columns in range(-2, 3)
    }
    for mirrored in (False, True):
        made = pretrain.augment(images, mirrored, torch.Generator().manual_seed(0))
        found = {key for view in made for key, expected in shifted.items() if torch.equal(view, expected)}
        assert all(any(torch.equal(view, expected) for expected in shifted.values()) for view in made)
        assert {key[0] for key in found} == {False, mirrored}
        assert {key[1:] for key in found} == {(rows, columns) for rows in range(-2, 3) for columns in range(-2, 3)}


def test_pose_is_that_of_a_drawn_bar():
    import pretrain

    rows, columns = np.mgrid[:28, :28] / 13.5 - 1
    drawn, expected = [], []
    for x, y, angle, length in ((0.2, -0.3, 0.4, 0.4), (-0.1, 0.1, 2.0, 0.3), (0.0, 0.0, math.pi / 2, 0.5)):
        along = (columns - x) * math.cos(angle) + (rows - y) * math.sin(angle)
        across = (rows - y) * math.cos(angle) - (columns - x) * math.sin(angle)
        # a Gaussian, whose moments are known
        width = length / 3
        drawn.append(255 * np.exp(-((along / length) ** 2 + (across / width) ** 2) / 0.5))
        longer, shorter = 0.25 * length**2, 0.25 * width**2
        shape = (longer - shorter) / (longer + shorter)
        turned = shape * math.cos(2 * angle), shape * math.sin(2 * angle)
        expected.append([x, y, math.log(longer + shorter), *turned])
    images = torch.from_numpy(np.stack([*drawn, np.zeros((28, 28))]).astype(np.uint8))
    found = pretrain.pose_of(images)
    torch.testing.assert_close(found[:3], torch.tensor(expected, dtype=torch.float32), rtol=0.03, atol=0.03)
    torch.testing.assert_close(found[3, [0, 1, 3, 4]], torch.zeros(4), rtol=0, atol=1e-5)


def test_pre_training_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    import mix
    import pretrain

    values = np.random.default_rng(0)
    groups = {
        name: mix.Group(values.integers(0, 256, (60, 28, 28), dtype=np.uint8), values.integers(0, 3, 60), list("abc"))
        for name in pretrain.BATCH
    }
    monkeypatch.setattr(pretrain, "make_mix", lambda: groups)
    monkeypatch.setattr(pretrain, "HELD_OUT", 10)
    monkeypatch.setattr(pretrain, "SAVE_STEPS", 2)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=28, patch_size=7
    )
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(tmp_path / "start")
    AutoImageProcessor.from_pretrained(CHECKPOINT).save_pretrained(tmp_path / "start")

    def train(folder):
        arguments = ["--model", str(tmp_path / "start"), "--output_dir", str(tmp_path / folder), "--max_steps", "4"]
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments])
        pretrain.main()

    def killed(*args):
        raise KeyboardInterrupt

    train("whole")
    with monkeypatch.context() as context:
        context.setattr(pretrain, "accuracies", killed)
        with pytest.raises(KeyboardInterrupt):
            train("stopped")
    train("stopped")
    whole, stopped = (
        AutoModelForImageClassification.from_pretrained(tmp_path / name / "backbone") for name in ("whole", "stopped")
    )
    assert [whole.config.id2label[index] for index in (3, 8)] == ["letter: a", "shape: c"]
    assert whole.classifier.weight.shape == (9, 16)  # a class for every drawing is of no use afterwards
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, stopped.state_dict()[name]), name


def test_what_is_published_records_the_figures_of_the_study(tmp_path, monkeypatch):
    import images
    import publish

    model = ViTForImageClassification.from_pretrained(CHECKPOINT)
    make_plugins(model, max_r=4, training={"num_images": 1234}).save_pretrained(tmp_path / "plugins")
    images.write_task("count", tmp_path / "data" / "count", {"train": 2, "test": 6}, 28, 0, images.STYLES["plain"])
    source = tmp_path / "checkpoints" / "count" / "r0-seed0"
    TocomModel.from_pretrained(model, source_r=0).save_pretrained(source)
    AutoImageProcessor.from_pretrained(CHECKPOINT).save_pretrained(source)
    (source / "training_args.bin").write_bytes(b"")
    right = {0.1: [1, 1, 1, 0], -0.1: [0, 0, 0, 1]}
    tocom = {scale: torch.tensor(row, dtype=torch.bool) for scale, row in right.items()}
    plain = torch.tensor([1, 1, 0, 0], dtype=torch.bool)
    runs = [
        CellRun("0", 0, 0, plain, {}, {}, (), {}),
        CellRun("0", 0, 4, plain, tocom, {"paper": 0.1}, (-0.1, 0.1), {}),
    ]
    report = Report({"dataset": "count", "checkpoints": [""]}, runs, [DegreeCost(0, (), 2.0), DegreeCost(4, (), 1.0)])
    report.save(tmp_path / "grids" / "count" / "r0-seed0")
    arguments = {
        "backbone": CHECKPOINT, "study": tmp_path, "task": "count", "base_model": "vit", "num_test_images": 5,
        "example_dir": tmp_path / "example", "set_dir": tmp_path / "set",
    }  # fmt: skip
    command = ["publish.py", *(text for name, value in arguments.items() for text in (f"--{name}", str(value)))]
    monkeypatch.setattr(sys, "argv", command)
    publish.main()
    same, moved = PluginSet.from_pretrained(tmp_path / "set").config.evaluation
    assert (same["target_r"], same["plain"], same["tocom"]) == (0, 0.5, 0.5)
    assert (moved["target_r"], moved["plain"], moved["tocom"], moved["sign_flipped"]) == (4, 0.5, 0.75, 0.25)
    assert len(load_labelled(str(tmp_path / "example" / "test.parquet"), "test")[0]) == 5
    assert TocomModel.from_pretrained(tmp_path / "example" / "checkpoint", plugins=tmp_path / "set").source_r == 0
    assert not (tmp_path / "example" / "checkpoint" / "training_args.bin").exists()
    assert (tmp_path / "example" / "backbone" / "model.safetensors").exists()
    monkeypatch.setattr(sys, "argv", [*command, "--backbone", str(tmp_path / "example" / "backbone")])
    publish.main()  # again, from the backbone that is published
    assert (tmp_path / "example" / "backbone" / "model.safetensors").exists()
    with pytest.raises(SystemExit, match=r"lacks the scale 0\.2"):
        publish.entries(report, "count", 0.2)
