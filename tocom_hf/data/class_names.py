# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Which class of a checkpoint a class of a data set is, by their names, which are often spelt otherwise."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class NameMatch:
    """What `match_names` has found.

    Attributes:
        order: For each class of the data set the index of the same class of the checkpoint, or `None`.
        rivals: For the classes whose names fit several names of the checkpoint equally well, by their position in the
            data set, those names.
        unused: Names of the checkpoint that no class of the data set has.
    """

    order: list[int | None]
    rivals: dict[int, list[str]]
    unused: list[str]


def match_names(names: Sequence[str], known: Sequence[str]) -> NameMatch:
    """Match the class names of a data set with those of a checkpoint, the exact ones first.

    After these come, in this order, names that are equal but for case, spaces, underscores, hyphens and the form of
    Unicode characters; numbers (`007` is `7`, and so is `LABEL_7`); and names with synonyms behind commas, as those of
    ImageNet (`tench` is `tench, Tinca tinca`): by the first synonym, and then by any.

    Args:
        names: Of the data set.
        known: Of the checkpoint, in the order of its outputs.
    """
    order: list[int | None] = [None] * len(names)
    rivals: dict[int, list[str]] = {}
    for keys_of in _STEPS:
        by_key = defaultdict(set)
        for index, name in enumerate(known):
            for key in keys_of(name):
                by_key[key].add(index)
        taken = {index for index in order if index is not None}
        claims: dict[int, int] = {}
        for position, name in enumerate(names):
            if order[position] is not None or position in rivals:
                continue
            candidates = set().union(*(by_key[key] for key in keys_of(name) if key in by_key))
            if len(candidates) == 1 and not candidates & taken:
                claims[position] = candidates.pop()
            elif len(candidates) > 1:
                rivals[position] = [known[index] for index in sorted(candidates)]
        claimed = Counter(claims.values())
        for position, index in claims.items():
            if claimed[index] == 1:
                order[position] = index
            else:
                rivals[position] = [known[index]]
    _keep_doubles_in_place(names, known, order, rivals)
    used = set(order)
    return NameMatch(order, rivals, [name for index, name in enumerate(known) if index not in used])


def are_numbered(known: Sequence[str]) -> bool:
    """Whether names say no more than the index: `LABEL_0`, `LABEL_1`, ..., or `0`, `1`, ..."""
    return all(number_in(name) == str(index) for index, name in enumerate(known))


def are_wordnet_ids(names: Sequence[str]) -> bool:
    """Whether names are those of the folders of ImageNet, such as `n01440764`."""
    return all(re.fullmatch(r"n\d{8}", name) for name in names)


def number_in(name: str) -> str | None:
    """The number that a name is, without leading zeros (`7` for `007` and for `LABEL_7`), or `None`."""
    found = re.fullmatch(r"(?:label)?0*([0-9]+)", _joined(name))
    return found.group(1) if found else None


def _keep_doubles_in_place(
    names: Sequence[str], known: Sequence[str], order: list[int | None], rivals: dict[int, list[str]]
) -> None:
    """Match the classes of a name that a checkpoint has twice, where all others are in the same place.

    ImageNet has two classes named `crane`. A data set cannot, and calls one of them otherwise.
    """
    if len(names) != len(known):
        return
    count = Counter(known)
    open_positions = [position for position, index in enumerate(order) if index is None]
    others_in_place = all(index in (None, position) for position, index in enumerate(order))
    if others_in_place and all(count[known[position]] > 1 for position in open_positions):
        for position in open_positions:
            order[position] = position
            rivals.pop(position, None)


def _spaced(name: str) -> str:
    """A name in lower case with single spaces for whatever parts its words."""
    plain = unicodedata.normalize("NFKC", name).casefold()
    return " ".join(re.split(r"[\s_\-\u2010-\u2015]+", unicodedata.normalize("NFKC", plain))).strip()


def _joined(name: str) -> str:
    """A name in lower case with nothing between its words."""
    return _spaced(name).replace(" ", "")


def _number_key(name: str) -> list[str]:
    number = number_in(name)
    return [] if number is None else [number]


def _synonyms(name: str) -> list[str]:
    return [synonym for part in name.split(",") if (synonym := _spaced(part))]


_STEPS: tuple[Callable[[str], list[str]], ...] = (
    lambda name: [name],
    lambda name: [name.partition(",")[0].strip()],  # ImageNet has a `cardigan`, and a `Cardigan, Cardigan Welsh corgi`
    lambda name: [_spaced(name)],
    lambda name: [_joined(name)],
    _number_key,
    lambda name: _synonyms(name)[:1],
    _synonyms,
)
