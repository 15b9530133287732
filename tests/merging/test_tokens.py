# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from helpers import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from tocom_hf import DegreeError
from tocom_hf.merging.schedule import clamp_r, resolve_schedule, tokens_per_layer
from tocom_hf.merging.tokens import (
    match_tokens,
    merge_tokens,
    output_positions,
)


def merge_twice(metric, hidden_states, r, protected):
    """Two layers of merging with the package: tokens and sizes after each."""
    results, sizes = [], None
    for _ in range(2):
        degree = clamp_r(r, hidden_states.shape[1], protected)
        if degree:
            plan = match_tokens(metric, degree, protected)
            metric, _ = merge_tokens(metric, sizes, plan)
            hidden_states, sizes = merge_tokens(hidden_states, sizes, plan)
        results.append((hidden_states, sizes))
    return results


def merge_twice_slowly(metric, hidden_states, r, protected):
    results = [[], []]
    for tokens, keys in zip(hidden_states, metric, strict=True):
        sizes = [1] * len(tokens)
        for layer in range(2):
            edges = reference.match(keys.tolist(), min(r, (len(tokens) - protected) // 2), protected)
            keys, _ = reference.merge(keys, sizes, edges, protected)
            tokens, sizes = reference.merge(tokens, sizes, edges, protected)
            results[layer].append((tokens, torch.tensor(sizes)))
    return [(torch.stack([t for t, _ in image]), torch.stack([s for _, s in image])) for image in results]


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    patches=st.integers(1, 24),
    r=st.integers(1, 30),
    protected=st.integers(0, 5),
    seed=st.integers(0, 2**31),
)
def test_merging_equals_the_loop_in_float64(batch, patches, r, protected, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, patches + protected)
    metric = torch.randn(*shape, 5, dtype=torch.float64, generator=generator)
    hidden_states = torch.randn(*shape, 7, dtype=torch.float64, generator=generator)
    expected = merge_twice_slowly(metric, hidden_states, r, protected)
    for (tokens, sizes), (slow_tokens, slow_sizes) in zip(
        merge_twice(metric, hidden_states, r, protected), expected, strict=True
    ):
        # shares are float32, so the agreement is to float32
        torch.testing.assert_close(tokens, slow_tokens, rtol=1e-6, atol=1e-6)
        assert (sizes is None and (slow_sizes == 1).all()) or torch.equal(sizes, slow_sizes.float())


@pytest.mark.parametrize("protected", [0, 1, 2, 5])
@pytest.mark.parametrize("tokens", [6, 7, 18])
def test_ties_lose_no_token(tokens, protected):
    """All tokens alike: any choice is right, but every token must be counted once and protected ones left alone."""
    metric = torch.ones(2, tokens, 4)
    hidden_states = torch.randn(2, tokens, 3, dtype=torch.float64)
    r = clamp_r(tokens, tokens, protected)
    assert r == max(0, (tokens - protected) // 2)
    if r == 0:
        return
    plan = match_tokens(metric, r, protected)
    merged, sizes = merge_tokens(hidden_states, None, plan)
    assert merged.shape[1] == sizes.shape[1] == tokens - r
    assert (sizes.sum(1) == tokens).all()
    torch.testing.assert_close((merged * sizes[..., None]).sum(1), hidden_states.sum(1), rtol=1e-6, atol=1e-6)
    assert torch.equal(merged[:, :protected], hidden_states[:, :protected])
    everything = torch.cat([plan.kept, plan.merged], dim=1).flatten().sort().values
    assert torch.equal(everything, torch.arange(2 * tokens))
    # of equals the first come first: the first A tokens, and all of them into the first B token
    first_a = protected + protected % 2
    assert plan.merged[0].tolist() == list(range(first_a, first_a + 2 * r, 2))
    number_of_b = len(range(protected + 1 - protected % 2, tokens, 2))
    assert (sizes[:, -number_of_b] == 1 + r).all()


def test_positions_are_those_in_each_image():
    """By a loop over the plan's rows."""
    metric = torch.randn(3, 14, 4, generator=torch.Generator().manual_seed(0))
    plan = match_tokens(metric, 5, 2)
    positions = output_positions(plan)
    for image in range(3):
        for position, row in enumerate(plan.kept[image].tolist()):
            assert positions[image, row - 14 * image] == position
        for row, into in zip(plan.merged[image].tolist(), plan.into[image].tolist(), strict=True):
            assert positions[image, row - 14 * image] == into - 9 * image


def test_zero_keys_do_not_make_nan():
    metric, hidden_states = torch.zeros(1, 9, 4), torch.randn(1, 9, 3)
    merged, _ = merge_tokens(hidden_states, None, match_tokens(metric, 3, 1))
    assert merged.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_merges_the_same_tokens_as_its_values_in_float64(dtype):
    metric = torch.randn(2, 33, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    plan = match_tokens(metric, 8, 1)
    for image in range(2):
        edges = reference.match(metric[image].tolist(), 8, 1)
        assert {a for a, _ in edges} == {row - 33 * image for row in plan.merged[image].tolist()}


def test_autocast_does_not_round_the_comparison():
    metric = torch.randn(4, 65, 16, generator=torch.Generator().manual_seed(0))
    expected = match_tokens(metric, 16, 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = match_tokens(metric, 16, 1)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_gradients_of_merging_are_those_of_the_weighted_mean():
    metric = torch.randn(2, 11, 4, generator=torch.Generator().manual_seed(0))
    plan = match_tokens(metric, 4, 1)
    # in float64, so that the shares are no coarser than the differences that are checked
    sizes = torch.ones(2, 11, dtype=torch.float64)
    hidden_states = torch.randn(2, 11, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: merge_tokens(x, sizes, plan)[0], (hidden_states,))


@pytest.mark.parametrize(
    ("r", "expected"),
    [
        (3, (3, 3, 3, 3)),
        (0, (0, 0, 0, 0)),
        ([4, 3, 0, 7], (4, 3, 0, 7)),
        ((6, 0.0), (6, 6, 6, 6)),
        ((6, -1), (12, 8, 4, 0)),
        ((6, 1.0), (0, 4, 8, 12)),
        ((7, 0.5), (3, 5, 8, 11)),  # from 3.5, truncated, to 14 - 3
    ],
)
def test_schedules(r, expected):
    assert resolve_schedule(r, 4) == expected


@settings(deadline=None)
@given(r=st.integers(0, 40), inflection=st.floats(-1, 1), num_layers=st.integers(2, 48))
def test_inflected_schedules_are_those_of_tome(r, inflection, num_layers):
    """ToMe's rule: the first degree is truncated, the last is 2 r minus it, those between are truncated."""
    first = int(r * (1.0 - inflection))
    last = 2 * r - first
    exact = [first + (last - first) * layer / (num_layers - 1) for layer in range(num_layers)]
    found = resolve_schedule((r, inflection), num_layers)
    # an exact integer may come out of floating point just below itself
    assert all(degree in (int(value), round(value)) for degree, value in zip(found, exact, strict=True))
    assert all(abs(degree - value) < 1 for degree, value in zip(found, exact, strict=True))
    assert found[0] == first


def test_schedule_of_one_layer():
    assert resolve_schedule((6, -1.0), 1) == (12,)


@pytest.mark.parametrize(
    "r", [-1, 1.5, True, "4", None, [1, 2], [1, 2, 3, -4], (4, 2.0), (4, "1"), (4, 0.5, 1), (-4, 0.5)]
)
def test_wrong_schedules_are_refused(r):
    with pytest.raises(DegreeError):
        resolve_schedule(r, 4)


def test_tokens_per_layer_stop_at_what_can_merge():
    # ViT-B/16 at r = 16: the last layer has 20 patch tokens left and merges 10 of them
    assert tokens_per_layer(16, 12, 197, 1) == [181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11]
    assert tokens_per_layer(100, 4, 17, 1) == [9, 5, 3, 2]
