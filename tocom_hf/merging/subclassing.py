# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Subclasses of classes of transformers, made at run time: one for each class and process, and how they are pickled."""

from typing import Any

from torch import nn


class RuntimeSubclass:
    """Base of a mixin that is put in front of stock classes at run time.

    The classes that arise have no name to be imported by, so instances are pickled and copied by their two parts.

    Attributes:
        mixin_class: The mixin.
        stock_class: The class of transformers behind it.
    """

    mixin_class: type["RuntimeSubclass"]
    stock_class: type[nn.Module]

    def __reduce_ex__(self, protocol):
        _, _, *state = tuple(super().__reduce_ex__(protocol))
        return _new_instance, (self.mixin_class, self.stock_class), *state


# by mixin and stock class
_SUBCLASSES: dict[tuple[type, type], Any] = {}
# what is read off the class itself: pipelines, FSDP wrapping policies and saved configurations go by these
_COPIED = ("__module__", "__qualname__", "__doc__", "config_class")


def runtime_subclass(mixin: type[RuntimeSubclass], stock_class: type[nn.Module]) -> Any:
    """The class of `mixin` and `stock_class`, made once per process. It keeps the name of the stock class."""
    key = (mixin, stock_class)
    if key not in _SUBCLASSES:
        members = {name: getattr(stock_class, name) for name in _COPIED if hasattr(stock_class, name)}
        members["mixin_class"] = mixin
        members["stock_class"] = stock_class
        # another thread may have been faster, and instances of both would not be of one class
        _SUBCLASSES.setdefault(key, type(stock_class.__name__, (mixin, stock_class), members))
    return _SUBCLASSES[key]


def _new_instance(mixin: type[RuntimeSubclass], stock_class: type[nn.Module]) -> nn.Module:
    subclass = runtime_subclass(mixin, stock_class)
    return subclass.__new__(subclass)
