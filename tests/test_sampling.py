# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Degrees are functions of seed and step, and spread as their samplers promise."""

import collections

import pytest

from tocom_hf import ArgumentError
from tocom_hf.sampling import SAMPLERS, adjacent, antithetic, find_sampler, uniform


def test_uniform_pairs_cover_all_ordered_pairs_alike():
    counts = collections.Counter(pair for step in range(6000) for pair in uniform(0, step, 3))
    assert set(counts) == {(m, n) for m in range(4) for n in range(4) if m != n}
    assert all(abs(count - 500) < 100 for count in counts.values())


def test_adjacent_pairs_are_the_likelier_the_closer():
    counts = collections.Counter(abs(m - n) for step in range(6000) for m, n in adjacent(0, step, 3))
    total = 1 + 1 / 2 + 1 / 3
    for distance in (1, 2, 3):
        assert abs(counts[distance] / 6000 - 1 / distance / total) < 0.03
    ups = sum(n > m for step in range(2000) for m, n in adjacent(0, step, 3))
    assert abs(ups - 1000) < 100


def test_antithetic_steps_go_both_ways():
    for step in range(20):
        [(m, n), back] = antithetic(0, step, 16)
        assert [(m, n)] == uniform(0, step, 16)
        assert back == (n, m)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_are_functions_of_seed_and_step(name):
    sampler = find_sampler(name)
    drawn = [sampler(0, step, 16) for step in range(9)]
    assert drawn == [sampler(0, step, 16) for step in range(9)]
    assert drawn != [sampler(1, step, 16) for step in range(9)]
    for [(m, n), *_] in drawn:
        assert m != n
        assert min(m, n) >= 0
        assert max(m, n) <= 16
    assert {pair for step in range(20) for pair in sampler(0, step, 1)} == {(0, 1), (1, 0)}


def test_a_sampler_that_is_not_there_is_named():
    with pytest.raises(ArgumentError, match="uniform, adjacent, antithetic, got 'random'"):
        find_sampler("random")
