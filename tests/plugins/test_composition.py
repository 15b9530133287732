# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from helpers.models import make_plugins

from tocom_hf import DegreeError
from tocom_hf.plugins.composition import chain


def formula(plugins, source_r, target_r, scale, path, weight):
    """The design's formula in float64: W + sign * s * sum_i B_i A_i."""
    sign = 1 if target_r > source_r else -1
    total = weight.double().clone()
    for i in range(min(source_r, target_r), max(source_r, target_r)):
        lora_A, lora_B = plugins.adapter(i)[path]
        total += sign * scale * lora_B.double() @ lora_A.double()
    return total


def test_the_chain_adds_upwards_and_subtracts_downwards():
    assert chain(4, 16) == (range(4, 16), 1)
    assert chain(16, 4) == (range(4, 16), -1)
    assert chain(8, 8) == (range(8, 8), 0)


@pytest.mark.parametrize(("source_r", "target_r"), [(0, 6), (6, 0), (1, 4), (5, 2), (2, 3)])
@pytest.mark.parametrize("scale", [None, 0.1, 0.25, 0, -0.5])
def test_composed_weights_equal_the_formula(plugins, source_r, target_r, scale):
    composite = plugins.compose(source_r, target_r, scale)
    used = plugins.config.recommended_scale if scale is None else scale
    for path in composite.factors:
        weight = torch.randn(32, 32)
        expected = formula(plugins, source_r, target_r, used, path, weight)
        torch.testing.assert_close(composite.apply(path, weight).double(), expected, rtol=1e-5, atol=1e-5)
    assert composite.rank == 2 * abs(source_r - target_r)


def test_equal_degrees_change_nothing(plugins):
    composite = plugins.compose(3, 3)
    assert composite.factors == {}
    assert composite.rank == 0


def test_there_and_back_is_the_identity(plugins):
    up, down = plugins.compose(1, 5), plugins.compose(5, 1)
    for path in up.factors:
        weight = torch.randn(32, 32, dtype=torch.float64)
        torch.testing.assert_close(down.apply(path, up.apply(path, weight)), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_keep_their_dtype_and_are_rounded_once(plugins, dtype):
    composite = plugins.compose(0, 6)
    for path in composite.factors:
        weight = torch.randn(32, 32).to(dtype)
        found = composite.apply(path, weight)
        assert found.dtype == dtype
        expected = formula(plugins, 0, 6, 0.1, path, weight)
        torch.testing.assert_close(found, expected.to(dtype), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("source_r", "target_r", "message"),
    [
        (0, 7, "target_r=7 is outside"),
        (7, 0, "source_r=7 is outside"),
        (-1, 2, "source_r must be a non-negative integer"),
        (0, 2.0, "target_r must be a non-negative integer"),
        (True, 2, "source_r must be"),
        (0, "4", "target_r must be"),
    ],
)
def test_degrees_outside_the_set_are_refused(plugins, source_r, target_r, message):
    with pytest.raises(DegreeError, match=message):
        plugins.compose(source_r, target_r)


@pytest.mark.parametrize("scale", ["0.1", float("nan"), float("inf"), True])
def test_scales_must_be_finite_numbers(plugins, scale):
    with pytest.raises(DegreeError, match="scale"):
        plugins.compose(0, 2, scale)


def test_a_set_that_starts_above_zero(model):
    plugins = make_plugins(model, max_r=6, min_r=2)
    assert plugins.compose(2, 6).rank == 8
    with pytest.raises(DegreeError, match=r"r = 2\.\.6"):
        plugins.compose(0, 4)
