# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
import math
import statistics

import pytest
import torch
from accelerate import Accelerator
from helpers.evaluation import divergence_from_source, make_run
from helpers.models import make_model, make_plugins
from torch.utils.data import get_worker_info

from tocom_hf import ArgumentError, DatasetError, DegreeError, TocomModel, apply_tome
from tocom_hf.evaluation.grid import evaluate_checkpoint, pick_scales, summarize


@pytest.fixture(scope="module")
def images():
    """Random images with labels that a model is right about now and then."""
    generator = torch.Generator().manual_seed(5)
    pixel_values = torch.randn(24, 3, 32, 32, generator=generator)
    labels = make_model()(pixel_values).logits.argmax(-1)
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(pixel_values, labels, strict=True)]


def right(model, images):
    with torch.no_grad():
        logits = model(torch.stack([sample["pixel_values"] for sample in images])).logits
    return logits.argmax(-1) == torch.tensor([sample["labels"] for sample in images])


class ReadBy(list):
    """Images that only worker processes can read, or only the process itself."""

    def __init__(self, images, workers):
        super().__init__(images)
        self.workers = workers

    def __getitem__(self, index):
        assert (get_worker_info() is not None) == self.workers
        return super().__getitem__(index)


def test_worker_processes_read_the_images_and_change_nothing(images):
    tocom = TocomModel.from_pretrained(make_model(), plugins=make_plugins(make_model()), source_r=2)
    settings = {"scales": [0.1, 0.3], "batch_size": 5, "accelerator": Accelerator(cpu=True)}
    alone, helped = (
        evaluate_checkpoint(
            tocom, "", [0, 5], *(ReadBy(part, workers > 0) for part in (images[8:], images[:8])),
            num_workers=workers, **settings,
        )
        for workers in (0, 2)
    )  # fmt: skip
    for one, other in zip(alone, helped, strict=True):
        assert torch.equal(one.plain, other.plain)
        assert one.validation == other.validation


def test_each_cell_is_what_its_model_makes_of_the_images(images):
    model = make_model()
    plugins = make_plugins(model)
    tocom = TocomModel.from_pretrained(make_model(), plugins=plugins, source_r=2, target_r=1)
    runs = evaluate_checkpoint(
        tocom, "seed 0", [0, 2, 5], images[8:], images[:8], scales=[0.1, 0.3], fixed_scales=[-0.1], batch_size=5,
        accelerator=Accelerator(cpu=True),
    )  # fmt: skip
    assert tocom.target_r == 1
    assert [(run.source_r, run.target_r) for run in runs] == [(2, 0), (2, 2), (2, 5)]
    for run in runs:
        assert torch.equal(run.plain, right(apply_tome(make_model(), run.target_r), images[8:]))
        assert set(run.at_scale) == ({*run.picked.values(), -0.1} if run.target_r != 2 else set())
        for scale, found in run.at_scale.items():
            with tocom.at(run.target_r, scale):
                assert torch.equal(found, right(tocom, images[8:]))
        for scale, (accuracy, _, divergence) in run.validation.items():
            assert divergence == pytest.approx(divergence_from_source(tocom, run.target_r, scale, images[:8]), abs=1e-6)
            with tocom.at(run.target_r, scale):
                assert accuracy == right(tocom, images[:8]).double().mean()


def test_the_scale_does_not_depend_on_test_images(images):
    tocom = TocomModel.from_pretrained(make_model(), plugins=make_plugins(make_model()), source_r=0)
    flipped = [{**sample, "labels": (sample["labels"] + 1) % 5} for sample in images]
    picked = [evaluate_checkpoint(tocom, "", [4], test, images[:8])[0].picked for test in (images[8:], flipped[8:])]
    assert picked[0] == picked[1]


def test_the_most_accurate_scale_wins_and_loss_decides_between_equals():
    sweep = {
        0.0: (0.9, 0.1, 0.5), 0.05: (0.7, 1.0, 0.4), 0.1: (0.8, 0.9, 0.3), 0.15: (0.8, 0.7, 0.35),
        0.2: (0.8, 0.6, 0.6), 0.3: (0.75, 0.1, 0.9),
    }  # fmt: skip
    picked = pick_scales(sweep, [0.05, 0.1, 0.15, 0.2, 0.3])
    assert picked == {"paper": 0.15, "wide": 0.2, "unlabelled": 0.1}
    assert pick_scales({0.0: (0.1, 2.0, 0.2), 0.2: (0.5, 1.0, 0.3)}, [0.2]) == {"wide": 0.2, "unlabelled": 0.0}


def test_a_model_without_plugins_runs_plain(images):
    tocom = TocomModel.from_pretrained(make_model(), source_r=0)
    (run,) = evaluate_checkpoint(tocom, "", [4], images, None)
    assert torch.equal(run.plain, right(apply_tome(make_model(), 4), images))
    assert not run.at_scale


def test_summaries_against_a_loop_over_images():
    runs = [make_run(0, 0, s, 0.9) for s in (0, 1)] + [make_run(0, 4, s, 0.6, 0.75) for s in (0, 1)]
    runs += [make_run(4, 4, s, 0.85) for s in (0, 1)]
    cells = {(cell.source_r, cell.target_r): cell for cell in summarize(runs)}
    assert list(cells) == [(0, 0), (0, 4), (4, 4)]
    cell = cells[0, 4]
    plain, tocom, trained, own = [], [], [], []
    for image in range(200):
        own.append(sum(float(run.plain[image]) for run in runs[:2]) / 2)
        plain.append(sum(float(run.plain[image]) for run in runs[2:4]) / 2)
        tocom.append(sum(float(run.at_scale[run.picked["paper"]][image]) for run in runs[2:4]) / 2)
        trained.append(sum(float(run.plain[image]) for run in runs[4:]) / 2)

    def mean_and_error(values):
        return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))

    gains = [b - a for a, b in zip(plain, tocom, strict=True)]
    gaps = [b - a for a, b in zip(plain, trained, strict=True)]
    losses = [b - a for a, b in zip(plain, own, strict=True)]
    paper = cell.compensated["paper"]
    assert (cell.plain, cell.plain_se) == pytest.approx(mean_and_error(plain))
    assert (paper.accuracy, paper.se) == pytest.approx(mean_and_error(tocom))
    assert (paper.gain, paper.gain_se) == pytest.approx(mean_and_error(gains))
    assert (cell.trained, cell.trained_se) == pytest.approx(mean_and_error(trained))
    assert (cell.gap, cell.gap_se) == pytest.approx(mean_and_error(gaps))
    assert (cell.lost, cell.lost_se) == pytest.approx(mean_and_error(losses))
    assert paper.gap_closed == pytest.approx(statistics.mean(gains) / statistics.mean(gaps))
    assert paper.scales == (0.1, 0.11)
    assert cell.compensated["scale -0.1"].scales == (-0.1, -0.1)
    assert cells[0, 0].gap is None
    assert cells[0, 0].lost is None
    assert not cells[0, 0].compensated


def test_without_a_gap_there_is_no_share_of_it():
    runs = [make_run(0, 4, 0, 0.9, 0.95), make_run(4, 4, 0, 0.5)]
    assert summarize(runs)[0].compensated["paper"].gap_closed is None
    assert summarize(runs[:1])[0].gap is None
    assert summarize(runs)[0].lost is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"degrees": [9]}, DegreeError, "target_r=9 is outside the plugin set"),
        ({"test": []}, DatasetError, "no test images"),
        ({"validation": []}, DatasetError, "no validation images"),
        ({"scales": []}, ArgumentError, "no scales"),
    ],
)
def test_wrong_arguments_are_found_before_the_first_forward_pass(images, arguments, error, message):
    tocom = TocomModel.from_pretrained(make_model(), plugins=make_plugins(make_model()), source_r=0)
    tocom.forward = None
    settings = {"degrees": [4], "test": images, "validation": images, **arguments}
    degrees, test, validation = (settings.pop(name) for name in ("degrees", "test", "validation"))
    with pytest.raises(error, match=message):
        evaluate_checkpoint(tocom, "", degrees, test, validation, **settings)
