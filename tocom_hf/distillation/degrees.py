# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Which degrees a distillation step compares.

A sampler is a function of the seed and the step alone, so every process draws the same pairs without talking to the
others, none waits for one that runs at a smaller degree, and a run that resumes goes on with the next pair.
"""

from collections.abc import Callable, Collection

import torch

from tocom_hf.errors import ArgumentError


DegreePair = tuple[int, int]
"""Teacher's degree m and student's degree n, `m != n`."""

DegreeSampler = Callable[[int, int, int], list[DegreePair]]
"""`(seed, step, max_r)` to the pairs of one step."""


def uniform(seed: int, step: int, max_r: int) -> list[DegreePair]:
    """One of all ordered pairs of different degrees in `0..max_r`, each equally likely (ToCom, algorithm 1)."""
    generator = _generator(seed, step)
    first = _integer(generator, max_r + 1)
    second = _integer(generator, max_r)
    return [(first, second + (second >= first))]


def from_source(source_r: int) -> DegreeSampler:
    """A sampler whose teacher always runs at one degree, and whose student at each other one equally often.

    Of a checkpoint that was fine-tuned at `source_r`, no other pair is ever asked for.
    """

    def sampler(seed: int, step: int, max_r: int) -> list[DegreePair]:
        target_r = _integer(_generator(seed, step), max_r)
        return [(source_r, target_r + (target_r >= source_r))]

    return sampler


def adjacent(seed: int, step: int, max_r: int) -> list[DegreePair]:
    """One ordered pair that is the likelier the closer its degrees are: the distance d has a weight of `1 / d`.

    Short chains give every plugin a gradient that the others do not hide.
    """
    generator = _generator(seed, step)
    distances = torch.arange(1, max_r + 1)
    distance = int(torch.multinomial(1 / distances, 1, generator=generator)) + 1
    low = _integer(generator, max_r + 1 - distance)
    pair = (low, low + distance)
    return [pair if _integer(generator, 2) else pair[::-1]]


def antithetic(seed: int, step: int, max_r: int) -> list[DegreePair]:
    """A uniform pair in both directions, m to n and n to m: twice the work, and a gradient that varies less."""
    [(first, second)] = uniform(seed, step, max_r)
    return [(first, second), (second, first)]


SAMPLERS: dict[str, DegreeSampler] = {"uniform": uniform, "adjacent": adjacent, "antithetic": antithetic}


def find_sampler(name: str, source_r: int | None = None, degrees: Collection[int] | None = None) -> DegreeSampler:
    """The sampler of a name, or the one for teachers that all run at `source_r`.

    Args:
        name: One of `SAMPLERS`.
        source_r: The degree of every teacher.
        degrees: The degrees that are drawn, beside `source_r`; by default all from 0 to `max_r`. Samplers go by the
            places in this list: to `adjacent` two neighbours in it are the closest.

    Raises:
        ArgumentError: if there is none of that name, or `source_r` is given to one that draws both degrees.
    """
    if name not in SAMPLERS:
        raise ArgumentError(f"degree_sampler must be one of {', '.join(SAMPLERS)}, got {name!r}.")
    if source_r is not None and name != "uniform":
        raise ArgumentError(f"With source_r the other degree is drawn uniformly: leave out degree_sampler={name!r}.")
    if degrees is None:
        return SAMPLERS[name] if source_r is None else from_source(source_r)
    drawn = sorted({*degrees} if source_r is None else {*degrees, source_r})
    sampler = SAMPLERS[name] if source_r is None else from_source(drawn.index(source_r))

    def among(seed: int, step: int, max_r: int) -> list[DegreePair]:
        return [(drawn[first], drawn[second]) for first, second in sampler(seed, step, len(drawn) - 1)]

    return among


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def _integer(generator: torch.Generator, below: int) -> int:
    return int(torch.randint(0, below, (), generator=generator))
