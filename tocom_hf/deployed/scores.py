# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What a classifier's logits say: scores, and the classes that have the highest."""

import numpy as np


def kind_of_scores(problem_type: str | None, num_labels: int) -> str | None:
    """How logits become scores.

    Args:
        problem_type: Of a configuration of transformers.
        num_labels: How many logits there are for an image.

    Returns:
        `softmax`; `sigmoid` where each class is decided by itself; `None` where the logits are values of a regression,
        as a single one is that has no others to be compared with.
    """
    if problem_type == "multi_label_classification":
        return "sigmoid"
    if problem_type == "regression" or (problem_type is None and num_labels == 1):
        return None
    return "softmax"


def scores_of(logits: np.ndarray, kind: str | None) -> np.ndarray:
    """Scores of logits `(batch, classes)`, float64.

    Args:
        logits: Of a classifier.
        kind: As `kind_of_scores` names it.
    """
    values = logits.astype(np.float64)
    if kind == "sigmoid":
        return np.exp(-np.logaddexp(0, -values))  # 1 / (1 + exp(-values)), for any size of them
    if kind == "softmax":
        powers = np.exp(values - values.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)
    return values


def best_classes(logits: np.ndarray, kind: str | None, top_k: int) -> list[list[tuple[int, float]]]:
    """The classes with the highest scores, best first, and the scores: a list for each row of `(batch, classes)`."""
    scores = scores_of(logits, kind)  # (batch, classes)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]  # (batch, top_k)
    return [[(int(label), float(row[label])) for label in best] for row, best in zip(scores, order, strict=True)]
