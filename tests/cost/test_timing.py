# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The one stopwatch: what it makes of times that are known, whoever asks it."""

import pytest
import torch
from helpers.clock import TokenClock
from helpers.models import make_model

from tocom_hf.cost.flops import Example
from tocom_hf.cost.timing import measure_costs, time_degrees
from tocom_hf.merging.backbones import find_backbone


@pytest.fixture
def example(pixel_values):
    model = make_model()
    return Example(find_backbone(model), model, pixel_values)


def seconds_at(degree):
    """What a pass takes by the clock of the tests: one second for each token that enters the last of four layers."""
    return 65 - 3 * degree


def test_costs_are_those_of_the_clock(example, monkeypatch):
    TokenClock(monkeypatch, example.module)
    for cost, degree in zip(measure_costs(example, [2, 4], rounds=3), (2, 4), strict=True):
        seconds = seconds_at(degree)
        assert cost.target_r == degree
        assert cost.tokens == tuple(65 - degree * layer for layer in range(5))
        assert cost.latency_ms == pytest.approx(1e3 * seconds)
        assert cost.images_per_second == pytest.approx(3 / seconds)
        assert cost.speedup == pytest.approx(seconds_at(0) / seconds)  # degree 0 is timed though it was not asked for
        assert cost.rounds == 3


def test_without_rounds_operations_are_counted_alone(example):
    dense, merged = measure_costs(example, [0, 4], rounds=0)
    assert not dense.timed
    assert dense.gflops > merged.gflops


@pytest.mark.parametrize(("rounds", "seconds", "expected"), [(3, 0, 3), (1, 130, 2), (1, 115, 1)])
def test_it_goes_on_until_both_rounds_and_seconds_are_full(example, monkeypatch, rounds, seconds, expected):
    """A round of degrees 0 and 5 takes 115 seconds by this clock; the one that warms up does not count."""
    TokenClock(monkeypatch, example.module)
    times = time_degrees(example, [0, 5], rounds=rounds, seconds=seconds)
    assert {degree: len(found) for degree, found in times.items()} == {0: expected, 5: expected}
    assert times[5] == pytest.approx([seconds_at(5)] * expected)


def test_the_model_merges_as_before_afterwards(example, pixel_values):
    with torch.no_grad():
        expected = example.module(pixel_values).logits
        measure_costs(example, [4], rounds=1)
        assert torch.equal(example.module(pixel_values).logits, expected)
