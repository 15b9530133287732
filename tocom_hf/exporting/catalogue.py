# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""One copy of every weight, whichever of the graphs use it and whatever these call it.

Exporters rename and transpose weights. So a weight is known by its content: what a graph holds is compared with the
parameters that the model had when the graph was made.
"""

import hashlib
from collections.abc import Mapping

import numpy as np


class Catalogue:
    """Collects the weights of all graphs.

    Args:
        source: The parameters and buffers at the source degree, by name.

    Attributes:
        arrays: What is to be stored, by name: a weight at the source degree, `.T` behind the name where the graphs hold
            it transposed; or a constant, named by its content.
        composed: Of the stored weights that plugins change: the path of the layer in the backbone, and whether it is
            transposed.
    """

    def __init__(self, source: Mapping[str, np.ndarray]):
        self.arrays: dict[str, np.ndarray] = {}
        self.composed: dict[str, dict[str, object]] = {}
        self._source = source
        self._known = _digests(source)

    def at_degree(self, live: Mapping[str, np.ndarray], paths: Mapping[str, str]) -> "DegreeCatalogue":
        """The names of the weights of a graph.

        Args:
            live: The weights that differ from those at the source degree, by name.
            paths: Their paths in the backbone, by name.
        """
        unchanged = {digest: found for digest, found in self._known.items() if found[0] not in live}
        return DegreeCatalogue(self, {**unchanged, **_digests(live)}, paths)

    def oriented(self, name: str, transposed: bool) -> np.ndarray:
        """A weight at the source degree as the graphs hold it."""
        array = self._source[name]
        return np.ascontiguousarray(array.T if transposed else array)


class DegreeCatalogue:
    """Names for the weights of one graph; what is asked for is stored."""

    def __init__(self, whole: Catalogue, known: Mapping[str, tuple[str, bool]], paths: Mapping[str, str]):
        self._whole = whole
        self._known = known
        self._paths = paths

    def name(self, array: np.ndarray) -> str:
        """The name that an array of the graph is stored by."""
        digest = _digest(array)
        if digest not in self._known:
            key = f"constant_{digest[:16]}"
            self._whole.arrays.setdefault(key, np.ascontiguousarray(array))
            return key
        name, transposed = self._known[digest]
        key = f"{name}.T" if transposed else name
        if key not in self._whole.arrays:
            self._whole.arrays[key] = self._whole.oriented(name, transposed)
        if name in self._paths:
            self._whole.composed[key] = {"path": self._paths[name], "transposed": transposed}
        return key

    def composes(self, array: np.ndarray) -> bool:
        """Whether plugins change a weight of this content."""
        return self._known.get(_digest(array), ("", False))[0] in self._paths

    def is_composed(self, key: str) -> bool:
        """Whether plugins change the weight of this name, at this degree."""
        return key.removesuffix(".T") in self._paths


def _digests(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[str, bool]]:
    """Names of weights by their content, and whether it is the content of the transposed one."""
    found: dict[str, tuple[str, bool]] = {}
    for name, array in arrays.items():
        found.setdefault(_digest(array), (name, False))
        if array.ndim == 2:
            found.setdefault(_digest(array.T), (name, True))
    return found


def _digest(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
