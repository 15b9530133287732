# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What the arguments of a job must be: types that say it, `Annotated[int, Check(...)]`, and one function that looks."""

import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

from tocom_hf.errors import ArgumentError


class Check(NamedTuple):
    """What a value must be.

    Attributes:
        expected: In words, for the message.
        holds: Whether a value is that.
    """

    expected: str
    holds: Callable[[Any], bool]


def require_checks(arguments: Any) -> None:
    """Hold every field of a dataclass against the checks in its annotation, `Annotated[int, Check(...)]`.

    `None` passes where the annotation allows it.

    Raises:
        ArgumentError: if a value is not what it must be.
    """
    for name, annotation in get_type_hints(type(arguments), include_extras=True).items():
        value = getattr(arguments, name)
        if value is None and type(None) in get_args(annotation):
            continue
        for check in _checks_in(annotation):
            if not check.holds(value):
                raise ArgumentError(f"{name} must be {check.expected}, got {value!r}.")


def _checks_in(annotation: Any) -> list[Check]:
    """The checks in an annotation, which may be `Annotated[...]` or `Annotated[...] | None`."""
    metadata = getattr(annotation, "__metadata__", ())
    found = [item for item in metadata if isinstance(item, Check)]
    for part in get_args(annotation):
        found += _checks_in(part)
    return found


def is_integer(value: Any) -> bool:
    """Whether a value is an integer, which `True` is not meant to be."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is an integer or a float."""
    return is_integer(value) or isinstance(value, float)


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


Count = Annotated[int, Check("a positive integer", lambda value: is_integer(value) and value > 0)]
Natural = Annotated[int, Check("an integer of at least 0", lambda value: is_integer(value) and value >= 0)]
Seed = Annotated[int, Check("an integer in [0, 2**32)", lambda value: is_integer(value) and 0 <= value < 2**32)]
Positive = Annotated[float, Check("a positive number", lambda value: is_number(value) and 0 < value < math.inf)]
Amount = Annotated[float, Check("a number of at least 0", lambda value: is_number(value) and 0 <= value < math.inf)]
Share = Annotated[float, Check("a number in [0, 1]", lambda value: is_number(value) and 0 <= value <= 1)]
PositiveShare = Annotated[float, Check("a number in (0, 1]", lambda value: is_number(value) and 0 < value <= 1)]
ShareBelowOne = Annotated[float, Check("a number in [0, 1)", lambda value: is_number(value) and 0 <= value < 1)]
InnerShare = Annotated[float, Check("a number in (0, 1)", lambda value: is_number(value) and 0 < value < 1)]
Magnitude = Annotated[float, Check("a number in [0, 10]", lambda value: is_number(value) and 0 <= value <= 10)]
LayerNames = Annotated[list[str], Check("a list of names of linear layers", _is_list_of_names)]
