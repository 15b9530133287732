# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
import copy

import pytest
import torch
from conftest import make_model, make_plugins
from torch.utils.data import DataLoader

from tocom_hf import TocomModel, apply_tome
from tocom_hf.evaluation import accuracy, count_flops, evaluate_degrees, plain_merging, throughput


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


def flops_by_hand(model, r):
    """Two for every multiplication and addition of the matrix products, layer by layer."""
    config = model.config
    hidden, heads, tokens = (
        config.hidden_size,
        config.num_attention_heads,
        (config.image_size // config.patch_size) ** 2,
    )
    total = 2 * tokens * hidden * 3 * config.patch_size**2
    tokens += 1
    for _ in range(config.num_hidden_layers):
        merged = min(r, (tokens - 1) // 2)
        after = tokens - merged
        total += 3 * 2 * tokens * hidden**2  # queries, keys, values
        total += 2 * 2 * tokens**2 * hidden  # attention
        if merged:
            # similarities of tokens at even and odd positions, by the head-averaged keys
            total += 2 * (tokens - tokens // 2) * (tokens // 2) * (hidden // heads)
        total += 2 * after * hidden**2  # the output projection runs on merged tokens
        total += 2 * 2 * after * hidden * config.intermediate_size
        tokens = after
    return total + 2 * hidden * config.num_labels


@pytest.mark.parametrize("r", [0, 4])
def test_flops_are_those_of_the_matrix_products(tocom, pixel_values, r):
    counted = count_flops(tocom, [r], pixel_values)[r]
    assert counted == pytest.approx(flops_by_hand(tocom, r), rel=0.01)
    assert count_flops(tocom, [r], pixel_values[:1])[r] == counted


def test_accuracy_and_throughput_leave_the_model_as_it_was(tocom, pixel_values):
    tocom.set_target_r(4)
    weights = copy.deepcopy(tocom.state_dict())
    rows = evaluate_degrees(tocom.train(), samples(pixel_values), [0, 4], batch_size=2)
    assert [row.target_r for row in rows] == [0, 4]
    assert rows[1].tokens == 65 - 4 * 4
    assert (tocom.target_r, tocom.training) == (4, True)
    for name, weight in tocom.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    assert throughput(tocom, [0, 4], pixel_values, rounds=1)[0][1] == 1


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
