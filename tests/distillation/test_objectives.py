# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What is compared is what heads of each family read."""

import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from helpers.families import FAMILIES
from helpers.models import describe, make_model

from tocom_hf import ArgumentError, DatasetError, UnsupportedModelError, apply_tome, trace_tokens
from tocom_hf.distillation.objectives import OBJECTIVES, find_objective
from tocom_hf.merging.backbones import find_backbone
from tocom_hf.merging.inputs import model_inputs


def by_class(model_class):
    return next(family for family in FAMILIES if family.model_class is model_class)


def test_logits_are_compared_by_kl_divergence():
    teacher, student = torch.randn(6, 5).log_softmax(-1), torch.randn(6, 5).log_softmax(-1)
    expected = sum((t.exp() * (t - s)).sum() for t, s in zip(teacher.double(), student.double(), strict=True)) / 6
    torch.testing.assert_close(OBJECTIVES["logits"].loss(teacher, student).double(), expected)
    same = (teacher.argmax(-1) == student.argmax(-1)).float()
    assert torch.equal(OBJECTIVES["logits"].agreement(teacher, student), same)


def test_features_are_compared_by_their_angle():
    teacher, student = F.normalize(torch.randn(6, 2, 8), dim=-1), F.normalize(torch.randn(6, 2, 8), dim=-1)
    cosine = F.cosine_similarity(teacher, student, dim=-1)
    torch.testing.assert_close(OBJECTIVES["features"].loss(teacher, student), (2 - 2 * cosine).mean())
    torch.testing.assert_close(OBJECTIVES["features"].agreement(teacher, student), cosine.mean(-1))


@pytest.mark.parametrize(("count", "share"), [(3, 0.75), (9, 0.25), (12, 0.1), (2000, 0.1)])
def test_whitened_features_are_compared_by_their_mahalanobis_distance(count, share):
    """With correlations that are the more shrunken the fewer images there are, image by image in float64."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 3
    teacher = torch.randn(20, 6, generator=generator)
    student = teacher + 0.1 * torch.randn(20, 6, generator=generator)
    rows = features.double().numpy()
    rows -= rows.mean(axis=0)
    inverse = np.linalg.inv((1 - share) * np.corrcoef(rows.T) + share * np.eye(6))

    def distances(differences):
        return [row @ inverse @ row for row in differences / rows.std(axis=0)]

    expected = np.array(distances((teacher - student).double().numpy())) / np.mean(distances(rows))
    objective = OBJECTIVES["whitened_features"].fitted(features)
    np.testing.assert_allclose(objective.distances(teacher, student).numpy(), expected, rtol=1e-4)
    assert objective.loss(teacher, student).item() == pytest.approx(expected.mean(), rel=1e-4)


def test_images_that_are_not_finite_have_no_part_in_the_spread():
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    poisoned = torch.cat([features, torch.full((1, 6), torch.nan), torch.full((1, 6), torch.inf)])
    objective = OBJECTIVES["whitened_features"]
    assert torch.equal(objective.fitted(poisoned).metric, objective.fitted(features).metric)


@pytest.mark.parametrize("features", [torch.ones(5, 4), torch.full((5, 4), torch.nan), torch.rand(1, 4)])
def test_features_without_a_spread_are_refused(features):
    with pytest.raises(DatasetError, match=r"features of \d images have no spread"):
        OBJECTIVES["whitened_features"].fitted(features)


def test_whitened_features_are_compared_in_float32_under_autocast():
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    objective = OBJECTIVES["whitened_features"].fitted(features)
    expected = objective.distances(features[:5], features[5:10])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(objective.distances(features[:5], features[5:10]), expected)


def test_whitened_features_need_their_spread():
    with pytest.raises(ArgumentError, match=r"use what fitted\(features\) returns"):
        OBJECTIVES["whitened_features"].loss(torch.zeros(2, 8), torch.zeros(2, 8))


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_whitened_features_of_every_family_are_those_of_features(family):
    model, inputs = family.make(), family.inputs()
    images = next(value for name, value in inputs.items() if name in ("pixel_values", "input_values"))
    backbone = find_backbone(apply_tome(model, 2))
    with torch.no_grad():
        whitened = OBJECTIVES["whitened_features"].outputs(backbone, images)
        features = OBJECTIVES["features"].outputs(backbone, images)  # (batch, features, hidden)
    torch.testing.assert_close(F.normalize(whitened.view_as(features), dim=-1), features)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_features_of_every_family_have_length_one(family):
    model, inputs = family.make(), family.inputs()
    images = next(value for name, value in inputs.items() if name in ("pixel_values", "input_values"))
    features = OBJECTIVES["features"].outputs(find_backbone(model), images)
    assert features.shape[0] == 3
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(features.shape[:2]))


def test_features_are_what_the_head_of_dinov2_reads():
    family = by_class(hf.Dinov2ForImageClassification)
    model, inputs = family.make(), family.inputs()
    read = []
    model.classifier.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    model(**inputs)
    class_token, mean = read[0].chunk(2, dim=-1)
    features = OBJECTIVES["features"].outputs(find_backbone(model), inputs["pixel_values"])
    torch.testing.assert_close(features[:, 0], F.normalize(class_token, dim=-1))
    torch.testing.assert_close(features[:, 1], F.normalize(mean, dim=-1))


def test_features_of_mae_do_not_depend_on_its_random_shuffling():
    family = by_class(hf.ViTMAEModel)
    model, images = family.make(), family.inputs()["pixel_values"]
    features = [OBJECTIVES["features"].outputs(find_backbone(model), images) for _ in range(2)]
    assert torch.equal(*features)


def test_images_of_another_size_are_taken_where_the_model_can():
    features = OBJECTIVES["features"].outputs(find_backbone(make_model()), torch.randn(2, 3, 48, 48))
    assert features.shape == (2, 1, 32)


def states_of(model, images, r):
    """The features of a model at degree r, and what its layers but the first read with each input token's position."""
    read = []
    norms = [layer.layernorm_before for layer in model.layers]
    handles = [norm.register_forward_hook(lambda *call: read.append(call[2])) for norm in norms]
    with trace_tokens(apply_tome(model, r)) as trace:
        features = F.normalize(model(images).last_hidden_state[:, :1], dim=-1)
    for handle in handles:
        handle.remove()
    return features, list(zip(read[1:], trace.positions[:-1], strict=True))


def distance_slowly(teacher, student, protected):
    """Of the tokens of one image at one layer, by a loop over the groups of the side that merged more."""
    (target, into), (own, into_own) = teacher, student
    groups = into_own if len(own) <= len(target) else into
    means = [[], []]
    for group in groups.unique():
        members = (groups == group).nonzero().flatten().tolist()
        for side, (tokens, positions) in zip(means, ((target, into), (own, into_own)), strict=True):
            side.append(sum(tokens[positions[i]] for i in members) / len(members))
    target, own = torch.stack(means[0]), torch.stack(means[1])
    weights = torch.bincount(groups).double()
    weights[:protected] = weights[protected:].sum() / protected  # half of the distance is theirs
    squares = (target - own).square().sum(-1)
    return (squares * weights).sum() / weights.sum() / target.square().sum(-1).mean()


@pytest.mark.parametrize(("source_r", "target_r"), [(0, 4), (4, 0), (1, 3), (5, 2)])
@pytest.mark.parametrize("protected", [1, 2])
def test_hidden_states_are_compared_over_the_groups_of_the_coarser_side(source_r, target_r, protected):
    model_class = hf.ViTModel if protected == 1 else hf.DeiTModel
    config = make_model(hf.ViTForImageClassification if protected == 1 else hf.DeiTForImageClassification).config
    torch.manual_seed(1)
    model = model_class(config).eval().double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    sides = [
        OBJECTIVES["hidden_states"].outputs(find_backbone(apply_tome(model, r)), images) for r in (source_r, target_r)
    ]
    features, layers = zip(*(states_of(model, images, r) for r in (source_r, target_r)), strict=True)
    if protected == 2:
        features = [side.features for side in sides]  # those of DeiT are tested above
    terms = [(features[0] - features[1]).square().sum(-1).mean()]
    for teacher, student in zip(*layers, strict=True):
        images_of = zip(zip(*teacher, strict=True), zip(*student, strict=True), strict=True)
        terms.append(sum(distance_slowly(*image, protected) for image in images_of) / 3)
    loss = OBJECTIVES["hidden_states"].loss(*sides)
    torch.testing.assert_close(loss.double(), sum(terms) / len(terms), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_hidden_states_of_every_family_differ_between_degrees_only(family):
    model, inputs = family.make(), family.inputs()
    images = next(value for name, value in inputs.items() if name in ("pixel_values", "input_values"))
    objective = OBJECTIVES["hidden_states"]
    before = describe(apply_tome(model, 2))
    teacher, same, student = (objective.outputs(find_backbone(apply_tome(model, r)), images) for r in (0, 0, 2))
    assert len(teacher.layers) == len(find_backbone(model).layers) - 1
    assert objective.loss(teacher, same) == 0
    assert objective.loss(teacher, student) > 0
    assert describe(model) == before


def test_hidden_states_are_a_mean_over_images():
    model, images = apply_tome(make_model(), 3), torch.randn(4, 3, 32, 32)
    objective = OBJECTIVES["hidden_states"]

    def loss(part):
        teacher, student = (objective.outputs(find_backbone(apply_tome(model, r)), images[part]) for r in (0, 3))
        return objective.loss(teacher, student)

    torch.testing.assert_close(loss(slice(0, 4)), (loss(slice(0, 1)) + 3 * loss(slice(1, 4))) / 4)


def test_auto_goes_by_the_classifier():
    model = make_model()
    assert find_objective("auto", model).name == "logits"
    assert find_objective("auto", model.vit).name == "features"
    assert find_objective("features", model).name == "features"


def test_wrong_objectives_are_refused():
    with pytest.raises(ArgumentError, match="auto, logits, features, whitened_features, hidden_states"):
        find_objective("labels", make_model())
    with pytest.raises(UnsupportedModelError, match="no classifier"):
        find_objective("logits", make_model().vit)


@pytest.mark.parametrize("family", [f for f in FAMILIES if not f.audio], ids=str)
def test_models_that_can_are_asked_to_interpolate_positions(family):
    """Also where the configuration has its image size in a part of it, as SigLIP's."""
    model = family.make()
    takes_any_size = "interpolate_pos_encoding" in inspect.signature(type(model).forward).parameters
    assert (
        "interpolate_pos_encoding" in model_inputs(model, find_backbone(model), torch.zeros(1, 3, 48, 48))
    ) == takes_any_size
    assert "interpolate_pos_encoding" not in model_inputs(model, find_backbone(model), torch.zeros(1, 3, 32, 32))
