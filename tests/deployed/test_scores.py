# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Scores are those of torch, of the kind that the configuration asks for."""

import numpy as np
import pytest
import torch

from tocom_hf.deployed.scores import best_classes, kind_of_scores, scores_of


def test_scores_are_those_of_torch():
    logits = torch.tensor([[3.0, -80.0, 700.0], [0.5, 0.25, -1.0]], dtype=torch.float64)
    for kind, expected in (("softmax", logits.softmax(-1)), ("sigmoid", logits.sigmoid()), (None, logits)):
        np.testing.assert_allclose(scores_of(logits.numpy(), kind), expected)


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "kind"),
    [
        (None, 10, "softmax"),
        ("single_label_classification", 10, "softmax"),
        ("multi_label_classification", 10, "sigmoid"),
        ("multi_label_classification", 1, "sigmoid"),
        ("regression", 3, None),
        (None, 1, None),
    ],
)
def test_the_kind_is_that_of_the_configuration(problem_type, num_labels, kind):
    assert kind_of_scores(problem_type, num_labels) == kind


def test_the_best_classes_are_those_of_topk_and_the_first_of_equal_ones():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [-1.0, -3.0, 4.0, 0.0]])
    for kind, scores in (("softmax", logits.softmax(-1)), ("sigmoid", logits.sigmoid()), (None, logits)):
        found = best_classes(logits.numpy(), kind, 3)
        assert [[label for label, _ in row] for row in found] == [[1, 2, 3], [2, 3, 0]]
        np.testing.assert_allclose([[score for _, score in row] for row in found], scores.topk(3).values, rtol=1e-6)
