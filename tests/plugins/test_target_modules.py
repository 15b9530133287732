# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Plugins on other linear layers than query and value: the same formula, on disk and in memory, for every family."""

import json

import pytest
import torch
from helpers.distillation import ARGUMENTS, Noise, divergence, expected_loss
from helpers.families import FAMILIES
from helpers.models import make_model, make_plugins
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from tocom_hf import (
    ArgumentError,
    BackboneMismatchError,
    DistillationArguments,
    PluginFileError,
    PluginSet,
    TocomModel,
    apply_tome,
    distill,
)
from tocom_hf.distillation.branches import PluginChain
from tocom_hf.distillation.objectives import OBJECTIVES
from tocom_hf.distillation.student import SelfDistiller
from tocom_hf.merging.backbones import find_backbone
from tocom_hf.plugins.cards import plugin_set_card


ALL = ["all-linear"]


def all_linear(model):
    """The linear layers of the transformer layers, found independently of the package."""
    return [
        name
        for name, module in find_backbone(model).module.named_modules()
        if isinstance(module, torch.nn.Linear) and any(part.isdigit() for part in name.split("."))
    ]


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize(("source_r", "target_r"), [(0, 6), (5, 2)])
def test_composed_equals_stock_peft_with_signed_scales(family, source_r, target_r, tmp_path):
    model, inputs = family.make(), family.inputs()
    plugins = make_plugins(model, target_modules=ALL, size=0.2)
    assert sorted(plugins.adapter(0)) == sorted(all_linear(model))
    plugins.save_pretrained(tmp_path)
    unfolded = apply_tome(family.make(), target_r)
    low, high = sorted((source_r, target_r))
    names = [f"P_{i}_{i + 1}" for i in range(low, high)]
    backbone = find_backbone(unfolded).module
    peft = PeftModel.from_pretrained(backbone, tmp_path, subfolder=names[0], adapter_name=names[0])
    for name in names[1:]:
        peft.load_adapter(tmp_path, subfolder=name, adapter_name=name)
    peft.base_model.set_adapter(names)
    adapted = [module for module in peft.modules() if isinstance(module, LoraLayer)]
    assert len(adapted) == len(all_linear(model))  # none in a head
    for module in adapted:
        sign = 1 if target_r > source_r else -1
        module.scaling = {name: sign * scaling for name, scaling in module.scaling.items()}
    composed = TocomModel.from_pretrained(model, plugins=plugins, source_r=source_r, target_r=target_r)
    torch.testing.assert_close(family.result(composed, inputs), family.result(unfolded, inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("names", [["fc1"], ["mlp.fc2", "k_proj"], ["q_proj", "v_proj", "o_proj"], ALL])
def test_a_model_walks_casts_and_saves_with_them(model, names, tmp_path, pixel_values):
    plugins = make_plugins(model, target_modules=names)
    source = {name: weight.clone() for name, weight in model.state_dict().items()}
    tocom = TocomModel.from_pretrained(model, plugins=plugins, source_r=2, target_r=6)
    changed = {
        name.removesuffix(".weight") for name, weight in tocom.state_dict().items() if (weight != source[name]).any()
    }
    assert changed == {f"vit.{path}" for path in plugins.adapter(0)}
    before = tocom(pixel_values).logits
    tocom.save_pretrained(tmp_path)
    assert torch.equal(TocomModel.from_pretrained(tmp_path)(pixel_values).logits, before)
    tocom.double().set_target_r(0)
    sum_of = {
        path: source[f"vit.{path}.weight"].double()
        - 0.1 * sum(plugins.adapter(i)[path].lora_B.double() @ plugins.adapter(i)[path].lora_A.double() for i in (0, 1))
        for path in plugins.adapter(0)
    }
    for path, expected in sum_of.items():
        torch.testing.assert_close(tocom.vit.get_submodule(path).weight.detach(), expected, rtol=0, atol=1e-12)
    tocom.float().set_target_r(2)
    assert all(torch.equal(weight, source[name]) for name, weight in tocom.state_dict().items())


def test_save_and_load_is_the_identity(model, tmp_path):
    plugins = make_plugins(model, target_modules=["fc2", "o_proj", "v_proj"])
    plugins.save_pretrained(tmp_path)
    loaded = PluginSet.from_pretrained(tmp_path)
    assert loaded.config == plugins.config
    assert loaded.config.target_modules == {
        "attention.v_proj": (32, 32),
        "attention.o_proj": (32, 32),
        "mlp.fc2": (32, 64),
    }
    for path, factors in plugins.adapter(3).items():
        assert all(torch.equal(one, other) for one, other in zip(factors, loaded.adapter(3)[path], strict=True))


def test_query_and_value_are_the_default_and_leave_no_trace(model, tmp_path):
    assert find_backbone(model).find_target_modules(["v_proj", "attention.q_proj"]) is None
    make_plugins(model, target_modules=["q_proj", "v_proj"]).save_pretrained(tmp_path)
    assert "target_modules" not in json.loads((tmp_path / "tocom_config.json").read_text())
    adapter = json.loads((tmp_path / "P_0_1" / "adapter_config.json").read_text())
    assert adapter["target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize("names", [["k_proj", "v_proj", "fc1"], ALL])
@pytest.mark.parametrize(("source_r", "target_r"), [(0, 4), (3, 1)])
def test_the_loss_is_that_of_the_plain_teacher_and_the_composed_student(names, source_r, target_r, pixel_values):
    model = make_model()
    backbone = find_backbone(model)
    torch.manual_seed(0)
    chain = PluginChain(backbone, 4, 2, 0.1, 0.0, backbone.find_target_modules(names))
    for parameter in chain.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    distiller = SelfDistiller(find_backbone(model.requires_grad_(False)), chain, OBJECTIVES["logits"])
    loss = distiller.loss(pixel_values, source_r, target_r)
    expected = expected_loss(chain, pixel_values, source_r, target_r)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in chain.parameters())


@pytest.mark.parametrize("order", ["qkv", "vkq", "kvq"])
def test_projections_may_be_called_in_any_order(model, order):
    backbone = find_backbone(model)
    plain = {name: getattr(model.vit.layers[0].attention, f"{name}_proj") for name in "qkv"}
    chain = PluginChain(backbone, 4, 2, 0.1, 0.0, backbone.find_target_modules(ALL))
    for parameter in chain.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    chain.activate(0, 4)
    inputs, other = torch.randn(2, 3, 7, 32)
    for x in (inputs, other):
        for name in order:
            weight = plain[name].weight.double()
            for adapter in chain.adapters().values():
                lora_A, lora_B = adapter[f"layers.0.attention.{name}_proj"]
                weight = weight + 0.1 * lora_B.double() @ lora_A.double()
            expected = x.double() @ weight.T + plain[name].bias.double()
            result = getattr(model.vit.layers[0].attention, f"{name}_proj")(x)
            torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5)


def test_every_branch_drops_differently(model):
    backbone = find_backbone(model)
    chain = PluginChain(backbone, 4, 2, 0.1, 0.5, backbone.find_target_modules(ALL))
    assert len({branch.index for branch in chain.layers}) == len(chain.layers) == 4 * 4  # qkv, o, fc1, fc2


def test_distilled_plugins_reduce_the_divergence_and_serve_as_a_start():
    model, data = make_model(), Noise(64)
    settings = {
        "max_r": 8, "num_train_epochs": 10, "per_device_train_batch_size": 16, "learning_rate": 0.3,
        "lora_dropout": 0.0,
    }  # fmt: skip
    arguments = DistillationArguments(**settings, target_modules=ALL)
    plugins = distill(model, data, arguments)
    before = make_model().state_dict()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert sorted(plugins.adapter(0)) == sorted(all_linear(model))
    for source_r, target_r in ((0, 8), (8, 0)):
        with_plugins, plain = (divergence(model, plugins, data.images, source_r, target_r, s) for s in (0.1, 0.0))
        assert with_plugins < plain
    again = DistillationArguments(**{**settings, "num_train_epochs": 1, "learning_rate": 1e-9}, target_modules=ALL)
    near = distill(model, data, again, init_plugins=plugins)
    for path, factors in plugins.adapter(2).items():
        for one, other in zip(factors, near.adapter(2)[path], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    with pytest.raises(ArgumentError, match=r"with target_modules=query and value: it applies to attention\.q_proj, "):
        distill(model, data, DistillationArguments(**settings), init_plugins=plugins)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["fc3"], "has 'fc3', but the linear layers of a transformer layer of this model are attention.q_proj"),
        (["proj"], "has 'proj'"),
        ([""], "has ''"),
        ([], "target_modules is empty"),
        ("fc1", "must be a list of names"),
        ([1], "must be a list of names"),
    ],
)
def test_names_that_stand_for_nothing_are_refused(names, message):
    with pytest.raises(ArgumentError, match=message):
        distill(make_model(), Noise(), DistillationArguments(**ARGUMENTS, target_modules=names))


def test_a_backbone_with_another_mlp_is_refused_before_it_changes(model):
    plugins = make_plugins(model, target_modules=["fc1"])
    other = make_model(intermediate_size=48)
    for layer, own in zip(other.vit.layers, model.vit.layers, strict=True):
        layer.attention.k_proj.load_state_dict(own.attention.k_proj.state_dict())
    with pytest.raises(BackboneMismatchError, match=r"64 x 32 in layers.0.mlp.fc1, but there .* one of 48 x 32"):
        TocomModel.from_pretrained(other, plugins=plugins, source_r=0, target_r=2)
    assert not isinstance(other, TocomModel)
    # query and value are there
    TocomModel.from_pretrained(other, plugins=make_plugins(model), source_r=0, target_r=2)


@pytest.mark.parametrize(
    "damaged",
    [{}, {"mlp.fc1": 3}, {"mlp.fc1": [64]}, {"mlp.fc1": [64, True]}, {"mlp.fc1": [64, 10**9]}, {"../fc1": [64, 32]},
     {"mlp..fc1": [64, 32]}, {f"fc{i}": [64, 32] for i in range(17)}],
)  # fmt: skip
def test_damaged_entries_are_refused(model, damaged, tmp_path):
    make_plugins(model, target_modules=["fc1"]).save_pretrained(tmp_path)
    path = tmp_path / "tocom_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": damaged}))
    with pytest.raises(PluginFileError, match="'target_modules' must have"):
        PluginSet.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"mlp.fc2": [32, 64]}, "target_modules is"),
        ({"mlp.fc1": [32, 64]}, "has shape"),
        (None, "not .'q_proj', 'v_proj'"),
    ],
)
def test_adapters_of_other_layers_than_promised_are_refused(model, entry, message, tmp_path):
    make_plugins(model, target_modules=["fc1"]).save_pretrained(tmp_path)
    path = tmp_path / "tocom_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": entry}))
    with pytest.raises(PluginFileError, match=message):
        PluginSet.from_pretrained(tmp_path).compose(0, 3)


def test_a_module_that_the_model_lacks_is_named(model):
    plugins = make_plugins(model, target_modules=["fc1"])
    plugins.config.target_modules = {"mlp.gate": (64, 32)}
    with pytest.raises(BackboneMismatchError, match=r"layers.0.mlp.gate, but there this model has no linear layer"):
        TocomModel.from_pretrained(model, plugins=plugins, source_r=0, target_r=2)


def test_the_card_names_the_layers(model):
    text = str(plugin_set_card(make_plugins(model, target_modules=["fc1", "q_proj"]).config, "user/set"))
    assert "for the linear layers `attention.q_proj` and `mlp.fc1` of one" in text
    assert "for the query and value projections of one" in str(plugin_set_card(make_plugins(model).config, "user/set"))
