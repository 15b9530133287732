# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The scale is picked by agreement with the model at its source degree, and labels play no part in it."""

import copy

import pytest
import torch
from helpers.evaluation import divergence_from_source
from helpers.models import make_model, make_plugins

from tocom_hf import ArgumentError, DatasetError, DegreeError, TocomModel, pick_scale


SCALES = (0.0, 0.05, 0.1, 0.2, 0.3)


@pytest.fixture
def tocom(model, plugins):
    return TocomModel.from_pretrained(model, plugins=plugins, source_r=2, target_r=1)


@pytest.fixture
def images(pixel_values):
    return [{"pixel_values": image} for image in pixel_values]


@pytest.mark.parametrize("target_r", [0, 5])
def test_the_scale_of_the_smallest_divergence_is_picked(tocom, images, target_r):
    divergences = {scale: divergence_from_source(tocom, target_r, scale, images) for scale in SCALES}
    best = min(divergences, key=divergences.__getitem__)
    assert pick_scale(tocom, images, target_r, scales=SCALES, batch_size=2) == best
    assert pick_scale(tocom, images, target_r, scales=SCALES[::-1]) == best


def test_zero_wins_over_plugins_that_do_harm(tocom, images):
    assert divergence_from_source(tocom, 5, -5.0, images) > divergence_from_source(tocom, 5, 0.0, images)
    assert pick_scale(tocom, images, 5, scales=[-5, 0]) == 0


def test_models_without_a_classifier_are_compared_by_their_features(images, pixel_values):
    base = make_model().base_model
    tocom = TocomModel.from_pretrained(base, plugins=make_plugins(make_model()), source_r=0)
    with torch.no_grad():
        teacher = tocom(pixel_values=pixel_values).last_hidden_state[:, 0]
        cosines = {}
        for scale in SCALES:
            with tocom.at(4, scale):
                student = tocom(pixel_values=pixel_values).last_hidden_state[:, 0]
            cosines[scale] = torch.nn.functional.cosine_similarity(teacher, student).mean().item()
    assert pick_scale(tocom, images, 4, scales=SCALES) == max(cosines, key=cosines.__getitem__)


def test_the_model_is_left_as_it_was(tocom, images):
    weights = copy.deepcopy(tocom.train().state_dict())
    pick_scale(tocom, images, 5, scales=SCALES)
    assert (tocom.target_r, tocom.training) == (1, True)
    for name, weight in tocom.state_dict().items():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target_r": 9}, DegreeError, "target_r=9 is outside the plugin set"),
        ({"target_r": 2}, ArgumentError, "no scale to choose"),
        ({"scales": []}, ArgumentError, "no scales to choose from"),
        ({"scales": [float("nan")]}, DegreeError, "finite number"),
        ({"images": []}, DatasetError, "no images"),
    ],
)
def test_wrong_arguments_are_found_before_the_first_forward_pass(tocom, images, arguments, error, message):
    tocom.forward = None
    with pytest.raises(error, match=message):
        pick_scale(tocom, **{"images": images, "target_r": 5, **arguments})


def test_a_model_without_plugins_has_no_scale(images):
    with pytest.raises(ArgumentError, match="has no plugins"):
        pick_scale(TocomModel.from_pretrained(make_model(), source_r=0), images, 4)


def test_a_model_of_transformers_has_no_scale_either(images):
    with pytest.raises(ArgumentError, match="has no plugins"):
        pick_scale(make_model(), images, 4)


def test_scales_that_overflow_are_never_picked(tocom, images):
    assert pick_scale(tocom, images, 5, scales=[1e38, 0.1]) == 0.1
    with pytest.raises(ArgumentError, match=r"At none of the scales \[1e\+38\]"):
        pick_scale(tocom, images, 5, scales=[1e38])
