# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The comparison of an export with PyTorch, without which none is written."""

from pathlib import Path

import numpy as np

from tocom_hf.deployed.exported import ExportedTocom
from tocom_hf.errors import ArgumentError, UnsupportedModelError
from tocom_hf.exporting.subject import Subject


# of the largest output beside 1; half precision rounds tokens that then merge with others
TOLERANCES = {"float32": 1e-4, "float16": 5e-2}
# images that two tokens of which are equally similar to a third may merge otherwise, which the next ones will not
_ATTEMPTS = 3


def verify(folder: Path, subject: Subject, degrees: list[int], dtype: str, dynamic_batch: bool) -> dict[int, float]:
    """Run every degree of an export on random images, and compare with the model itself.

    Args:
        folder: The export.
        subject: What was exported.
        degrees: Its degrees.
        dtype: Its floating-point type.
        dynamic_batch: Whether to run several images at once, too.

    Returns:
        The largest difference for each degree, as a share of the largest output beside 1.

    Raises:
        UnsupportedModelError: if one differs by more than the tolerance.
    """
    exported = ExportedTocom(folder, degrees[0])
    deviations = {}
    for degree in degrees:
        try:
            exported.set_target_r(degree)
            deviations[degree] = min(_attempts(exported, subject, degree, dtype, dynamic_batch))
        except ArgumentError as error:
            raise UnsupportedModelError(f"The exported graph of degree {degree} does not run: {error}") from error
        if not deviations[degree] <= TOLERANCES[dtype]:
            raise UnsupportedModelError(
                f"The exported graph of degree {degree} differs from PyTorch by {deviations[degree]:.2g} of the "
                f"largest output, more than {TOLERANCES[dtype]:g}. Nothing was written. Please report the model's "
                "configuration and the versions of torch and the runtime."
            )
    return deviations


def _attempts(exported: ExportedTocom, subject: Subject, degree: int, dtype: str, dynamic_batch: bool) -> list[float]:
    """Deviations on one set of images after another, until one is small enough."""
    found: list[float] = []
    with subject.at(degree):
        while len(found) < _ATTEMPTS and not (found and found[-1] <= TOLERANCES[dtype]):
            batches = [
                subject.images(count, seed=10 * len(found) + count) for count in ((1, 3) if dynamic_batch else (1,))
            ]
            found.append(
                max(_deviation(exported(batch.numpy()), subject.graph(batch).float().numpy()) for batch in batches)
            )
    return found


def _deviation(found: np.ndarray, expected: np.ndarray) -> float:
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected).max() / max(1.0, float(np.abs(expected).max())))
