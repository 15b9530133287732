# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
import copy

import pytest
import torch
from helpers.clock import TokenClock
from helpers.models import make_model, make_plugins
from torch.utils.data import DataLoader

from tocom_hf import TocomModel, apply_tome
from tocom_hf.evaluation.degrees import accuracy, evaluate_degrees, plain_merging, throughput


@pytest.fixture
def tocom(model, plugins):
    return TocomModel.from_pretrained(model, plugins=plugins, source_r=2)


def samples(pixel_values):
    return [{"pixel_values": image, "labels": index % 5} for index, image in enumerate(pixel_values)]


def test_plain_merging_runs_the_source_weights_at_another_degree(tocom, pixel_values):
    expected = apply_tome(make_model(), 5)(pixel_values).logits
    tocom.set_target_r(4)
    before = tocom(pixel_values).logits
    with plain_merging(tocom, 5):
        torch.testing.assert_close(tocom(pixel_values).logits, expected)
    torch.testing.assert_close(tocom(pixel_values).logits, before)


def test_accuracy_and_throughput_leave_the_model_as_it_was(tocom, pixel_values):
    tocom.set_target_r(4)
    weights = copy.deepcopy(tocom.state_dict())
    rows = evaluate_degrees(tocom.train(), samples(pixel_values), [0, 4], batch_size=2)
    assert [row.target_r for row in rows] == [0, 4]
    assert rows[1].tokens == 65 - 4 * 4
    assert (tocom.target_r, tocom.training) == (4, True)
    for name, weight in tocom.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    throughput(tocom, [0, 4], pixel_values, rounds=1)
    assert (tocom.target_r, tocom.training) == (4, True)
    for name, weight in tocom.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_throughput_is_images_by_time_and_speedups_are_over_the_first_degree(tocom, pixel_values, monkeypatch):
    TokenClock(monkeypatch, tocom)
    found = throughput(tocom, [1, 5], pixel_values, rounds=3)
    # by this clock one second for each token that enters the last of the four layers
    seconds = {1: 65 - 3 * 1, 5: 65 - 3 * 5}
    assert found[1] == pytest.approx((3 / seconds[1], 1.0))
    assert found[5] == pytest.approx((3 / seconds[5], seconds[1] / seconds[5]))


def test_accuracy_counts_the_largest_logits(pixel_values):
    model = make_model()
    with torch.no_grad():
        labels = model(pixel_values).logits.argmax(-1)
    labels[0] = (labels[0] + 1) % 5
    loader = DataLoader([{"pixel_values": x, "labels": y} for x, y in zip(pixel_values, labels, strict=True)], 2)
    assert accuracy(model, loader) == pytest.approx(2 / 3)


def test_make_plugins_change_the_outcome(tocom, pixel_values):
    """The other tests would hold for plugins without effect."""
    other = TocomModel.from_pretrained(make_model(), plugins=make_plugins(make_model(), seed=2), source_r=2, target_r=4)
    tocom.set_target_r(4)
    assert not torch.allclose(tocom(pixel_values).logits, other(pixel_values).logits, atol=1e-3)
