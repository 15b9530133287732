# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Scales are fitted by gradients that finite differences agree with, to the chain that is used, and to nothing else."""

import copy

import pytest
import torch
from helpers.evaluation import divergence_from_source
from helpers.models import make_model, make_plugins
from helpers.paths import ROOT
from peft import PeftModel
from transformers import AutoImageProcessor, Dinov2Config, Dinov2Model

from tocom_hf import (
    ArgumentError,
    DatasetError,
    DegreeError,
    DistillationError,
    PluginSet,
    TocomModel,
    fit_scales,
    load_images,
    with_pixel_values,
)
from tocom_hf.plugins.composition import Factors
from tocom_hf.scales import fitting


@pytest.fixture
def tocom(model, plugins):
    return TocomModel.from_pretrained(model, plugins=plugins, source_r=2, target_r=1)


@pytest.fixture
def images(pixel_values):
    return [{"pixel_values": image} for image in pixel_values]


def factor(fitted, plugins, index, path):
    """What a plugin of one layer was multiplied by."""
    before, after = plugins.adapter(index)[path], fitted.adapter(index)[path]
    assert torch.equal(before.lora_A, after.lora_A)
    value = (after.lora_B / before.lora_B).median()
    torch.testing.assert_close(after.lora_B, before.lora_B * value)
    return value.item()


def with_factor(plugins, index, path, value):
    """The set with one plugin of one layer multiplied."""
    config = plugins.config
    adapters = {i: dict(plugins.adapter(i)) for i in range(config.min_r, config.max_r)}
    lora_A, lora_B = adapters[index][path]
    adapters[index][path] = Factors(lora_A, lora_B * value)
    return PluginSet(config, adapters)


@pytest.mark.parametrize("modules", [None, ["o_proj", "fc2"]])
@pytest.mark.parametrize("target_r", [0, 4])
def test_the_first_step_goes_down_the_slope_that_finite_differences_find(target_r, modules, images):
    model, images = make_model().double(), [{"pixel_values": image["pixel_values"].double()} for image in images]
    plugins = make_plugins(model, target_modules=modules)
    tocom = TocomModel.from_pretrained(copy.deepcopy(model), plugins=plugins, source_r=2, scale=0.2)
    fitted = fit_scales(tocom, images, target_r=target_r, max_steps=1, learning_rate=0.25)
    for index in range(6):
        for path in plugins.adapter(0):
            found = factor(fitted, plugins, index, path)
            if index not in range(min(2, target_r), max(2, target_r)):
                assert found == 1  # no chain has it
                continue
            ends = []
            for value in (1 - 1e-4, 1 + 1e-4):
                changed = with_factor(plugins, index, path, value)
                other = TocomModel.from_pretrained(copy.deepcopy(model), plugins=changed, source_r=2)
                ends.append(divergence_from_source(other, target_r, 0.2, images))
            slope = (ends[1] - ends[0]) / 2e-4
            assert abs(slope) > 1e-6
            # Adam's first step is as long as the learning rate
            assert found == pytest.approx(0.75 if slope > 0 else 1.25, rel=0.01), (index, path)


@pytest.mark.parametrize("target_r", [0, 6])
def test_fitted_scales_bring_the_model_closer_to_itself_at_its_source_degree(tocom, images, target_r):
    before = divergence_from_source(tocom, target_r, 0.1, images)
    fitted = fit_scales(tocom, images, max_steps=40)
    assert divergence_from_source(TocomModel.from_pretrained(tocom, plugins=fitted), target_r, 0.1, images) < before / 2


def test_models_without_a_classifier_are_fitted_by_their_features(images, pixel_values):
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=4, initializer_range=0.3
    )
    torch.manual_seed(0)
    model = Dinov2Model(config).eval()
    tocom = TocomModel.from_pretrained(model, plugins=make_plugins(model), source_r=0)

    def distance(model):
        with torch.no_grad():
            with model.at(0):
                teacher = model(pixel_values=pixel_values).last_hidden_state.mean(1)
            with model.at(6):
                student = model(pixel_values=pixel_values).last_hidden_state.mean(1)
        return 1 - torch.nn.functional.cosine_similarity(teacher, student).mean()

    before = distance(tocom)
    fitted = fit_scales(tocom, images, target_r=[6], max_steps=40)
    assert distance(TocomModel.from_pretrained(tocom, plugins=fitted)) < before


def test_the_set_is_for_its_source_degree_and_survives_a_round_trip(tocom, images, tmp_path, pixel_values):
    fitted = fit_scales(tocom, images, target_r=(0, 4), max_steps=3, batch_size=2)
    assert (fitted.config.source_r, fitted.config.recommended_scale, fitted.config.max_r) == (2, 0.1, 6)
    assert fitted.config.training["target_r"] == [0, 4]
    fitted.save_pretrained(tmp_path / "set")
    loaded = PluginSet.from_pretrained(tmp_path / "set")
    tocom = TocomModel.from_pretrained(tocom, plugins=loaded, target_r=3)
    with pytest.raises(DegreeError, match="distilled for weights trained at r = 2"):
        TocomModel.from_pretrained(make_model(), plugins=loaded, source_r=1, target_r=3)
    stock = PeftModel.from_pretrained(make_model().base_model, tmp_path / "set", subfolder="P_2_3").merge_and_unload()
    for path in loaded.adapter(2):
        ours, theirs = (module.get_submodule(path).weight for module in (tocom.base_model, stock))
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_the_model_is_left_as_it_was(tocom, images):
    before, plugins, state = copy.deepcopy(tocom.train().state_dict()), tocom.plugins, torch.get_rng_state()
    with torch.no_grad():
        fit_scales(tocom, images, max_steps=2)
    with pytest.raises(DistillationError, match="divergence of step 0 is nan"):
        fit_scales(tocom, [{"pixel_values": torch.full((3, 32, 32), torch.nan)}])
    assert (tocom.target_r, tocom.training, tocom.plugins) == (1, True, plugins)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in tocom.parameters())
    for name, weight in tocom.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_the_teacher_sees_every_image_once(tocom, images, monkeypatch):
    seen = []
    forward = fitting._Student.forward

    def count(self, pixel_values):
        if not torch.is_grad_enabled():
            seen.append(len(pixel_values))
        return forward(self, pixel_values)

    monkeypatch.setattr(fitting._Student, "forward", count)
    fit_scales(tocom, images, max_steps=7, batch_size=2)
    assert sum(seen) == len(images)


def test_labels_play_no_part_and_the_seed_decides(tocom, images):
    def factors(seed, **more):
        samples = [{**image, **more} for image in images]
        fitted = fit_scales(tocom, samples, max_steps=4, batch_size=2, seed=seed)
        return torch.stack([fitted.adapter(i)[path].lora_B for i in range(6) for path in fitted.adapter(i)])

    assert torch.equal(factors(0), factors(0, labels=3))
    assert not torch.equal(factors(0), factors(1))


def test_a_set_that_does_not_begin_at_zero(model, images):
    plugins = make_plugins(model, min_r=1)
    fitted = fit_scales(TocomModel.from_pretrained(model, plugins=plugins, source_r=3), images, target_r=1, max_steps=2)
    path = next(iter(plugins.adapter(1)))
    assert [factor(fitted, plugins, index, path) == 1 for index in range(1, 6)] == [False, False, True, True, True]


def test_half_precision_models_are_fitted_in_float32_factors(plugins, images):
    tocom = TocomModel.from_pretrained(make_model().bfloat16(), plugins=plugins, source_r=2)
    halves = [{"pixel_values": image["pixel_values"].bfloat16()} for image in images]
    fitted = fit_scales(tocom, halves, target_r=0, max_steps=2)
    path = next(iter(plugins.adapter(0)))
    assert fitted.adapter(0)[path].lora_B.dtype == torch.float32
    assert factor(fitted, plugins, 0, path) != 1


def test_the_scale_in_use_is_recommended(plugins, images):
    tocom = TocomModel.from_pretrained(make_model(), plugins=plugins, source_r=2, target_r=4, scale=0.2)
    fitted = fit_scales(tocom, images, max_steps=1, learning_rate=1e-6)
    assert (fitted.config.trained_scale, fitted.config.recommended_scale) == (0.1, 0.2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target_r": 9}, DegreeError, "target_r=9 is outside the plugin set"),
        ({"target_r": 2}, ArgumentError, "trained at target_r=2, so there are no scales"),
        ({"target_r": []}, ArgumentError, "no degree to fit scales for"),
        ({"target_r": "4"}, DegreeError, "target_r"),
        ({"images": []}, DatasetError, "no images"),
        ({"max_steps": 0}, ArgumentError, "max_steps must be a positive integer, got 0"),
        ({"batch_size": 1.5}, ArgumentError, "batch_size must be a positive integer, got 1.5"),
        ({"learning_rate": -1}, ArgumentError, "learning_rate must be a positive number, got -1"),
    ],
)
def test_wrong_arguments_are_found_before_the_first_forward_pass(tocom, images, arguments, error, message):
    tocom.forward = None
    with pytest.raises(error, match=message):
        fit_scales(tocom, **{"images": images, **arguments})


def test_without_plugins_or_effect_there_is_nothing_to_fit(plugins, images):
    for model in (make_model(), TocomModel.from_pretrained(make_model(), source_r=0)):
        with pytest.raises(ArgumentError, match="has no plugins"):
            fit_scales(model, images)
    with pytest.raises(ArgumentError, match="At scale 0"):
        fit_scales(TocomModel.from_pretrained(make_model(), plugins=plugins, source_r=0, scale=0), images)


def test_scales_of_the_embedded_checkpoint_serve_images_that_they_were_not_fitted_on():
    checkpoint = ROOT / "examples" / "digits" / "checkpoint"
    found = load_images(str(ROOT / "examples" / "digits" / "test.parquet"), split="test[:300]")
    found = with_pixel_values(found, AutoImageProcessor.from_pretrained(checkpoint))
    images = [found[i] for i in range(300)]
    tocom = TocomModel.from_pretrained(checkpoint, plugins=ROOT / "hub_cards" / "tocom-vit-mix")
    before = divergence_from_source(tocom, 8, 0.1, images[100:])
    fitted = fit_scales(tocom, images[:100], target_r=8, max_steps=20, batch_size=50)
    tocom = TocomModel.from_pretrained(tocom, plugins=fitted)
    assert divergence_from_source(tocom, 8, 0.1, images[100:]) < 0.8 * before
