# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Degrees are functions of seed and step, and spread as their samplers promise."""

import collections

import pytest

from tocom_hf import ArgumentError, DegreeError, DistillationArguments
from tocom_hf.distillation.degrees import SAMPLERS, adjacent, antithetic, find_sampler, from_source, uniform


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


@pytest.mark.parametrize("source_r", [0, 2, 3])
def test_with_a_source_degree_students_cover_the_others_alike(source_r):
    sampler = find_sampler("uniform", source_r)
    counts = collections.Counter(pair for step in range(3000) for pair in sampler(0, step, 3))
    assert set(counts) == {(source_r, n) for n in range(4) if n != source_r}
    assert all(abs(count - 1000) < 100 for count in counts.values())
    assert [sampler(0, step, 3) for step in range(9)] == [from_source(source_r)(0, step, 3) for step in range(9)]


@pytest.mark.parametrize("name", ["adjacent", "antithetic"])
def test_samplers_of_both_degrees_take_no_source_degree(name):
    with pytest.raises(ArgumentError, match=f"leave out degree_sampler='{name}'"):
        find_sampler(name, 2)


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


def test_only_listed_degrees_are_drawn():
    pairs = collections.Counter(find_sampler("uniform", None, [8, 0, 3])(0, step, 8)[0] for step in range(3000))
    assert set(pairs) == {(m, n) for m in (0, 3, 8) for n in (0, 3, 8) if m != n}
    assert all(abs(count - 500) < 100 for count in pairs.values())
    sampler = find_sampler("uniform", 4, [0, 8])
    assert {pair for step in range(50) for pair in sampler(0, step, 8)} == {(4, 0), (4, 8)}


@pytest.mark.parametrize("degrees", [[], [8], [1, 8], [0, 7], [0, 9], [0, -1, 8]])
def test_plugins_that_would_learn_nothing_are_refused(degrees):
    with pytest.raises(DegreeError, match="train_degrees"):
        DistillationArguments(max_r=8, train_degrees=degrees)


def test_the_source_degree_is_drawn_in_any_case():
    assert DistillationArguments(max_r=8, source_r=0, train_degrees=[8]).train_degrees == [8]


def test_the_grid_has_the_degrees_that_are_learnt():
    assert DistillationArguments(max_r=8, source_r=0, train_degrees=[5, 8]).degrees() == [0, 5, 8]
    assert DistillationArguments(max_r=8, train_degrees=[0, 8], eval_degrees=[0, 4, 8]).degrees() == [0, 4, 8]
