# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The algebra of plugin chains over models and sets that hypothesis draws."""

import os
import tempfile
from pathlib import Path

import torch
from helpers.families import FAMILIES
from helpers.models import make_plugins
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tocom_hf import PluginSet, TocomModel
from tocom_hf.merging.backbones import find_backbone


EXAMPLES = max(int(os.environ.get("FUZZ_EXAMPLES", "0")) // 20, 12)
properties = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
MAX_R = 5
DEGREES = st.integers(0, MAX_R)
SCALES = st.floats(-2, 2, allow_nan=False).filter(lambda scale: scale == 0 or abs(scale) > 1e-3)


@st.composite
def cases(draw):
    """A stock model of any family, its inputs, and a random plugin set for it."""
    family = draw(st.sampled_from(FAMILIES))
    model = family.make()
    plugins = make_plugins(
        model,
        max_r=MAX_R,
        rank=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 99)),
        size=draw(st.floats(0.01, 0.5)),
        recommended_scale=draw(SCALES),
    )
    return family, model, plugins


def product(plugins, source_r, target_r, scale=None):
    """`scale * sign * sum_i B_i A_i` of every layer, in float64, by a loop over the single plugins."""
    low, high, sign = min(source_r, target_r), max(source_r, target_r), 1 if target_r > source_r else -1
    scale = plugins.config.recommended_scale if scale is None else scale
    totals = {}
    for index in range(low, high):
        for path, (lora_A, lora_B) in plugins.adapter(index).items():
            totals[path] = totals.get(path, 0) + scale * sign * (lora_B.double() @ lora_A.double())
    return totals


def change(composite, path):
    factors = composite.factors.get(path)
    return 0 if factors is None else composite.scale * (factors.lora_B.double() @ factors.lora_A.double())


def weights(model):
    return {path: layer.weight.detach().clone() for path, layer in find_backbone(model).projections().items()}


def vanishes(difference):
    return torch.as_tensor(difference).abs().max() < 1e-9


@properties
@given(cases(), DEGREES, DEGREES, DEGREES, SCALES)
def test_chains_add_up_and_reverse(case, m, n, k, scale):
    _, _, plugins = case
    for path in plugins.adapter(0):
        there, on, whole = (change(plugins.compose(a, b, scale), path) for a, b in ((m, n), (n, k), (m, k)))
        back = change(plugins.compose(n, m, scale), path)
        assert vanishes(there + on - whole)
        assert vanishes(there + back)
        assert vanishes(there - product(plugins, m, n, scale).get(path, 0))


@properties
@given(cases(), DEGREES, st.lists(DEGREES, min_size=1, max_size=5))
def test_weights_depend_on_the_end_of_a_walk_only_and_fold_back(case, source_r, walk):
    _family, model, plugins = case
    start = weights(model)
    composed = TocomModel.from_pretrained(model, plugins=plugins, source_r=source_r)
    for degree in walk:
        composed.set_target_r(degree)
    changes = product(plugins, source_r, walk[-1])
    for path, weight in weights(composed).items():
        expected = (start[path].double() + changes.get(path, 0)).float()
        assert torch.equal(weight, expected)
    composed.set_target_r(source_r)
    assert all(torch.equal(weight, start[path]) for path, weight in weights(composed).items())


@properties
@given(cases(), DEGREES, DEGREES, SCALES)
def test_saving_and_loading_is_the_identity(case, source_r, target_r, scale):
    family, model, plugins = case
    inputs = family.inputs()
    composed = TocomModel.from_pretrained(model, plugins=plugins, source_r=source_r, target_r=target_r, scale=scale)
    with tempfile.TemporaryDirectory() as name:
        plugins.save_pretrained(Path(name, "set"))
        loaded = PluginSet.from_pretrained(Path(name, "set"))
        assert loaded.config == plugins.config
        for index in range(MAX_R):
            for path, factors in plugins.adapter(index).items():
                assert all(torch.equal(a, b) for a, b in zip(factors, loaded.adapter(index)[path], strict=True))
        composed.save_pretrained(Path(name, "model"))
        again = TocomModel.from_pretrained(Path(name, "model"))
        assert (again.source_r, again.target_r, again.config.tocom) == (source_r, target_r, composed.config.tocom)
        for key, value in composed.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), key
        torch.testing.assert_close(family.result(again, inputs), family.result(composed, inputs), rtol=1e-5, atol=1e-5)


@properties
@given(cases(), DEGREES, DEGREES, st.lists(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), max_size=3))
def test_casts_and_moves_compose_anew(case, source_r, target_r, dtypes):
    family, model, plugins = case
    reference = family.make()
    composed = TocomModel.from_pretrained(model, plugins=plugins, source_r=source_r, target_r=target_r)
    for dtype in dtypes:
        composed.to("cpu", dtype)
        reference.to(dtype)  # the source weights are rounded on the way, as anybody's are
    fresh = TocomModel.from_pretrained(reference, plugins=plugins, source_r=source_r, target_r=target_r)
    for key, value in fresh.state_dict().items():
        assert torch.equal(composed.state_dict()[key], value), key
    shape_only = TocomModel.from_pretrained(family.make(), plugins=plugins, source_r=source_r, target_r=target_r)
    assert {p.device.type for p in shape_only.to("meta").parameters()} == {"meta"}


@properties
@given(cases(), DEGREES, DEGREES, st.permutations(range(2)))
def test_an_image_does_not_see_the_others_of_its_batch(case, source_r, target_r, order):
    family, model, plugins = case
    composed = TocomModel.from_pretrained(model, plugins=plugins, source_r=source_r, target_r=target_r).double()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in family.inputs().items()}
    whole = family.result(composed, inputs)
    batch = whole.shape[0]
    order = [index for index in order if index < batch] or [0]
    part = family.result(composed, {name: x[order] if x.shape[:1] == (batch,) else x for name, x in inputs.items()})
    torch.testing.assert_close(part, whole[order], rtol=1e-9, atol=1e-9)
