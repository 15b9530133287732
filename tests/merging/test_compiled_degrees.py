# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""A compiled model compiles once for each degree, so that switching among degrees reuses what was captured."""

import pytest
import torch
from helpers.models import make_model, make_plugins
from torch._dynamo.testing import CompileCounter

from tocom_hf import TocomModel, apply_tome


def merging_model():
    model = make_model(num_hidden_layers=2)
    return model, lambda degree: apply_tome(model, degree)


def tocom_model():
    plain = make_model(num_hidden_layers=2)
    model = TocomModel.from_pretrained(plain, plugins=make_plugins(plain), source_r=0)
    return model, model.set_target_r


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [pytest.param(merging_model, marks=pytest.mark.slow, id="apply_tome"), pytest.param(tocom_model, id="TocomModel")],
)
def test_a_degree_is_compiled_once(make, pixel_values):
    torch.compiler.reset()
    model, set_degree = make()
    set_degree(0)
    expected = {}
    for degree in (6, 3, 0):
        set_degree(degree)
        expected[degree] = model(pixel_values).logits
    counter = CompileCounter()
    model.compile(backend=counter, fullgraph=True)
    counts = []
    for degree in (6, 3, 6, 0, 3, 0):
        set_degree(degree)
        torch.testing.assert_close(model(pixel_values).logits, expected[degree], rtol=1e-4, atol=1e-5)
        counts.append(counter.frame_count)
    assert counts == [1, 2, 2, 3, 3, 3]


@torch.no_grad()
def test_degrees_beyond_torchs_limit_run_uncompiled(pixel_values):
    """torch's own limit is 8; docs/gpu.md says how to raise it for a model of more degrees."""
    torch.compiler.reset()
    model, counter = make_model(num_hidden_layers=1), CompileCounter()
    apply_tome(model, 0)
    model.compile(backend=counter)
    with torch._dynamo.config.patch(recompile_limit=2):
        for degree in (1, 2, 3, 1, 2, 3):
            apply_tome(model, degree)
            model(pixel_values)
    assert counter.frame_count == 2
