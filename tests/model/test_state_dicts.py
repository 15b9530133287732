# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Composed weights never pass for a checkpoint, whatever road a state dict takes."""

import copy
import io

import pytest
import torch
from helpers.families import FAMILIES
from helpers.models import make_model, make_plugins
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments, ViTForImageClassification

from tocom_hf import ComposedWeightsError, TocomModel


NOT_A_CHECKPOINT = r"composed for target_r=4, so its weights are no checkpoint of source_r=0\. Call set_target_r\(0\)"


def tocom(plugins, target_r=0, seed=0):
    return TocomModel.from_pretrained(make_model(seed=seed), plugins=plugins, source_r=0, target_r=target_r)


def through_torch_save(state_dict, weights_only=True):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


def prefixed(model):
    return torch.nn.ModuleDict({"module": model})


@pytest.mark.parametrize(
    "road",
    [lambda state_dict: state_dict, copy.copy, copy.deepcopy, through_torch_save],
    ids=["as it is", "copied", "deep-copied", "torch.save"],
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_composed_state_dict_is_refused_at_another_degree(plugins, road, strict):
    composed, model = tocom(plugins, 4), tocom(plugins)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ComposedWeightsError, match=NOT_A_CHECKPOINT):
        model.load_state_dict(road(composed.state_dict()), strict=strict)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    model.set_target_r(2)
    with pytest.raises(ComposedWeightsError, match=NOT_A_CHECKPOINT):
        model.load_state_dict(road(composed.state_dict()), strict=strict)


@pytest.mark.parametrize("wrap", [prefixed, AveragedModel], ids=["a wrapper", "an average"])
def test_wrappers_change_nothing(plugins, wrap):
    composed, model = wrap(tocom(plugins, 4)), wrap(tocom(plugins))
    with pytest.raises(ComposedWeightsError, match=NOT_A_CHECKPOINT):
        model.load_state_dict(composed.state_dict())


def test_an_average_saves_like_the_model(plugins, tmp_path):
    average = AveragedModel(tocom(plugins, 4))
    average.update_parameters(tocom(plugins, 4))
    average.module.save_pretrained(tmp_path)
    saved = ViTForImageClassification.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(weight, saved[name]) for name, weight in make_model().state_dict().items())


def test_saving_a_composed_state_dict_as_the_source_is_refused(plugins, tmp_path):
    model = tocom(plugins)
    with pytest.raises(ComposedWeightsError, match=NOT_A_CHECKPOINT):
        model.save_pretrained(tmp_path / "saved", state_dict=tocom(plugins, 4).state_dict())
    assert not (tmp_path / "saved").exists()


def test_the_same_degree_takes_it_back(plugins, tmp_path):
    composed, other = tocom(plugins, 4), tocom(plugins, 4)
    other.load_state_dict(composed.state_dict())
    save_file(composed.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    other.set_target_r(0)
    assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in make_model().state_dict().items())


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_checkpoint_is_refused_where_it_would_replace_composed_weights(family, tmp_path):
    """It would run at the target degree uncompensated, and the next switch would take it for composed."""
    plugins = make_plugins(model := family.make())
    trained = family.make(seed=3)
    composed = TocomModel.from_pretrained(model, plugins=plugins, source_r=0, target_r=4)
    before = copy.deepcopy(composed.state_dict())
    trained.save_pretrained(tmp_path)
    for weights in (trained.state_dict(), load_file(tmp_path / "model.safetensors")):
        with pytest.raises(ComposedWeightsError, match=r"call model.set_target_r\(0\), load them"):
            composed.load_state_dict(weights)
    assert all(torch.equal(weight, before[name]) for name, weight in composed.state_dict().items())
    composed.set_target_r(0)
    composed.load_state_dict(trained.state_dict())
    composed.set_target_r(4)
    expected = TocomModel.from_pretrained(trained, source_r=0)
    composed.set_target_r(0)
    assert all(torch.equal(weight, expected.state_dict()[name]) for name, weight in composed.state_dict().items())


def test_weights_of_the_head_alone_load_into_a_composed_model(plugins):
    composed = tocom(plugins, 4)
    head = {name: weight for name, weight in make_model(seed=3).state_dict().items() if "classifier" in name}
    composed.load_state_dict(head, strict=False)
    composed.set_target_r(0)
    assert torch.equal(composed.classifier.weight, head["classifier.weight"])


def test_stock_classes_and_rebased_models_take_it(plugins):
    composed = tocom(plugins, 4)
    stock = make_model(seed=3)
    stock.load_state_dict(composed.state_dict())
    assert all(torch.equal(weight, stock.state_dict()[name]) for name, weight in composed.state_dict().items())
    composed.rebase()
    model = TocomModel.from_pretrained(make_model(), plugins=plugins, source_r=4)
    model.load_state_dict(composed.state_dict())
    model.set_target_r(0)


@pytest.mark.parametrize("mark", [None, 3, {}, {"target_r": 4}, "composed"])
def test_a_mark_of_another_form_is_no_mark(plugins, mark):
    model, state_dict = tocom(plugins), make_model(seed=3).state_dict()
    state_dict._metadata[""]["tocom"] = mark
    model.load_state_dict(state_dict)


def test_safetensors_drop_the_mark(plugins, tmp_path):
    """The documented limit: what makes a plain dictionary of a state dict forgets what it was."""
    save_file(tocom(plugins, 4).state_dict(), tmp_path / "model.safetensors")
    tocom(plugins).load_state_dict(load_file(tmp_path / "model.safetensors"))


def test_the_trainer_saves_a_composed_model_as_its_source(plugins, pixel_values, tmp_path):
    composed = tocom(plugins, 4)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    Trainer(model=composed, args=arguments, data_collator=default_collate).save_model()
    saved = ViTForImageClassification.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(weight, saved[name]) for name, weight in make_model().state_dict().items())


def test_accelerate_saves_and_loads_the_state_of_one_degree(plugins, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(tocom(plugins, 4))
    accelerator.save_state(tmp_path, safe_serialization=False)
    accelerator.load_state(tmp_path)
    model.set_target_r(0)
    with pytest.raises(ComposedWeightsError, match=NOT_A_CHECKPOINT):
        accelerator.load_state(tmp_path)
