# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The policy in a simulated service: random arrivals at multiples of what the dense model carries, without a clock."""

import itertools
import random
import statistics
import subprocess
import sys
from collections import deque
from dataclasses import dataclass, field

import pytest

from tocom_hf.serving import DegreePolicy


# a full batch of ten images takes so long: degree 0 serves 100 images a second, degree 8 serves 250
SECONDS = {0: 0.1, 2: 0.08, 4: 0.05, 8: 0.04}
BATCH, OBJECTIVE = 10, 1.0
DENSE = BATCH / SECONDS[0]


@dataclass
class Simulation:
    """What became of a run.

    Attributes:
        latencies: Seconds from arrival to answer, of the answered requests in their order.
        refused: Arrivals that found the queue full.
        batches: When each batch began, and its degree.
    """

    latencies: list[float] = field(default_factory=list)
    refused: int = 0
    batches: list[tuple[float, int]] = field(default_factory=list)

    @property
    def p95(self):
        return statistics.quantiles(self.latencies, n=20)[-1]

    @property
    def degrees(self):
        return [degree for _, degree in self.batches]

    @property
    def switches(self):
        return sum(one != other for one, other in itertools.pairwise(self.degrees))


def poisson(rate, begin, end, seed=0):
    """Times of arrival between `begin` and `end`, at `rate` a second on average."""
    chance, now, times = random.Random(seed), begin, []
    while True:
        now += chance.expovariate(rate)
        if now >= end:
            return times
        times.append(now)


def simulate(policy, arrivals, slower=1.0):
    """One model behind one queue: what waits when it becomes free is its next batch, of ten images at most.

    Args:
        policy: The policy, with `SECONDS` as its calibration.
        arrivals: Times at which single images arrive, ascending.
        slower: By which factor the service is slower than calibrated.
    """
    result, coming, waiting, now = Simulation(), deque(arrivals), deque(), 0.0
    while coming or waiting:
        if not waiting:
            now = max(now, coming[0])
        while coming and coming[0] <= now:
            arrived = coming.popleft()
            if len(waiting) + 1 > policy.capacity() and waiting:
                result.refused += 1
            else:
                waiting.append(arrived)
        degree = policy.choose(len(waiting))
        size = min(BATCH, len(waiting))
        # a part of a batch's time does not depend on its size
        seconds = slower * SECONDS[degree] * (0.3 + 0.7 * size / BATCH)
        result.batches.append((now, degree))
        policy.observe(degree, size, seconds)
        now += seconds
        result.latencies += [now - waiting.popleft() for _ in range(size)]
    return result


def policy(**arguments):
    return DegreePolicy(SECONDS, BATCH, OBJECTIVE, **arguments)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("load", [0.5, 1, 2])
def test_the_objective_holds_where_a_degree_can_carry_the_load(load, seed):
    run = simulate(policy(), poisson(load * DENSE, 0, 60, seed))
    assert run.refused == 0
    assert run.p95 <= OBJECTIVE


@pytest.mark.parametrize("seed", range(3))
def test_what_is_more_than_the_largest_degree_carries_is_refused_and_the_rest_answered_in_time(seed):
    """Four times the dense capacity, of which the largest degree carries two and a half."""
    arrivals = poisson(4 * DENSE, 0, 60, seed)
    run = simulate(policy(), arrivals)
    assert run.p95 <= OBJECTIVE
    assert run.refused / len(arrivals) == pytest.approx(1 - 2.5 / 4, abs=0.03)
    assert set(run.degrees[20:-20]) == {8}


def test_a_service_of_one_degree_does_not_hold_it():
    """Or the tests above would say nothing: at twice its capacity the dense model refuses half."""
    arrivals = poisson(2 * DENSE, 0, 60)
    run = simulate(DegreePolicy({0: SECONDS[0]}, BATCH, OBJECTIVE), arrivals)
    assert run.refused / len(arrivals) == pytest.approx(0.5, abs=0.05)


def test_no_more_is_merged_than_the_load_needs():
    """Half of the dense capacity never leaves degree 0; the same load in a higher degree would be answered sooner."""
    run = simulate(policy(), poisson(0.5 * DENSE, 0, 60))
    assert set(run.degrees) == {0}


@pytest.mark.parametrize("load", [0.5, 0.9, 1.1, 1.5, 2, 2.4, 4])
def test_a_steady_load_does_not_make_it_flap(load):
    """Arrivals at even distances: after the first seconds, switches are rare."""
    count = int(60 * load * DENSE)
    run = simulate(policy(), [index / (load * DENSE) for index in range(count)])
    late = [degree for begin, degree in run.batches if begin > 10]
    assert sum(one != other for one, other in itertools.pairwise(late)) <= len(late) / 20


@pytest.mark.parametrize("load", [0.5, 1, 2, 4])
def test_a_random_load_does_not_make_it_flap(load):
    """Arrivals at random: a degree is kept for ten batches on average, and never left within `patience` batches for a
    lower one."""
    run = simulate(policy(), poisson(load * DENSE, 0, 60))
    assert run.switches <= len(run.batches) / 10
    since = 0
    for before, after in itertools.pairwise(run.degrees):
        since += 1
        if after < before:
            assert since >= 8
        if after != before:
            since = 0


@pytest.mark.parametrize("burst", [2, 4])
def test_it_returns_to_the_smallest_degree_after_a_burst(burst):
    arrivals = poisson(0.5 * DENSE, 0, 10) + poisson(burst * DENSE, 10, 15) + poisson(0.5 * DENSE, 15, 60)
    run = simulate(policy(), arrivals)
    assert max(degree for begin, degree in run.batches if 10 < begin < 15) == 8
    back = max(begin for begin, degree in run.batches if degree)
    assert back < 15 + 5
    assert {degree for begin, degree in run.batches if begin > back} == {0}


def test_it_answers_a_burst_at_once():
    """Sixty images at one moment: the first batch already runs at a degree that drains them in half the objective."""
    run = simulate(policy(), [1.0] * 60)
    assert run.degrees[0] == 2
    assert max(run.latencies) <= OBJECTIVE / 2


@pytest.mark.parametrize("load", [0.4, 0.8, 1.2])
def test_the_objective_holds_on_a_service_that_is_slower_than_calibrated(load):
    """At half the calibrated speed degree 8 carries 1.25 times the load that the calibration promises of degree 0."""
    run = simulate(policy(), poisson(load * DENSE, 0, 120), slower=2.0)
    late = run.latencies[len(run.latencies) // 4 :]
    assert statistics.quantiles(late, n=20)[-1] <= OBJECTIVE


def test_the_same_arrivals_give_the_same_degrees():
    arrivals = poisson(1.5 * DENSE, 0, 20)
    assert simulate(policy(), arrivals) == simulate(policy(), arrivals)


def test_the_policy_costs_neither_torch_nor_a_web_framework():
    """A client or a simulation may import it anywhere; what serves is imported by its own name."""
    program = "import sys; from tocom_hf.serving import DegreePolicy; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "fastapi", "PIL", "numpy", "ray"} & {*done.stdout.split()}
