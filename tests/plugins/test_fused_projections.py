# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Plugins of query and value where these come, with the key, from one layer: two adapters that are stored as one."""

import json

import pytest
import torch
import transformers as hf
from helpers.families import FAMILIES, SIMILAR
from helpers.models import make_plugins
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tocom_hf import BackboneMismatchError, PluginFileError, PluginSet, TocomModel
from tocom_hf.distillation.branches import PluginChain
from tocom_hf.merging.backbones import find_backbone


BLIP = next(family for family in FAMILIES if family.model_class is hf.BlipVisionModel)
MGP_STR = next(family for family in SIMILAR if family.model_class is hf.MgpstrModel)
PATH = "encoder.layers.1.self_attn.qkv"
KEY_B = f"base_model.model.{PATH}.lora_B.weight"

both_kinds = pytest.mark.parametrize("family", [BLIP, MGP_STR], ids=str)


def test_weights_are_those_of_two_adapters_of_query_and_value():
    model = BLIP.make()
    weight = model.get_submodule(PATH).weight.clone()
    plugins = make_plugins(model)
    tocom = TocomModel.from_pretrained(model, plugins=plugins, source_r=1, target_r=4, scale=0.5)
    query, key, value = weight.double().split(32)
    for i in range(1, 4):
        lora_A, lora_B = (factor.double() for factor in plugins.adapter(i)[PATH])
        query = query + 0.5 * lora_B[:32, :2] @ lora_A[:2]
        value = value + 0.5 * lora_B[64:, 2:] @ lora_A[2:]
    found = tocom.get_submodule(PATH).weight.split(32)
    torch.testing.assert_close(found[0], query.float())
    assert torch.equal(found[1], key.float())
    torch.testing.assert_close(found[2], value.float())
    tocom.set_target_r(1)
    assert torch.equal(tocom.get_submodule(PATH).weight, weight)


@both_kinds
def test_a_set_survives_its_files(family, tmp_path):
    model, inputs = family.make(), family.inputs()
    plugins = make_plugins(model)
    expected = family.result(TocomModel.from_pretrained(family.make(), plugins=plugins, source_r=0, target_r=4), inputs)
    plugins.save_pretrained(tmp_path / "plugins")
    read = PluginSet.from_pretrained(tmp_path / "plugins")
    tocom = TocomModel.from_pretrained(model, plugins=read, source_r=0, target_r=4)
    assert torch.equal(family.result(tocom, inputs), expected)
    tocom.save_pretrained(tmp_path / "model")
    again = TocomModel.from_pretrained(tmp_path / "model")
    assert torch.equal(family.result(again, inputs), expected)


def test_stock_peft_loads_the_adapter_and_leaves_the_keys_alone(tmp_path):
    model = BLIP.make()
    plugins = make_plugins(model)
    plugins.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "P_0_1" / "adapter_config.json").read_text())["r"] == 4
    before = model.get_submodule(PATH).weight.clone()
    expected = plugins.compose(0, 1).apply(PATH, before)
    merged = PeftModel.from_pretrained(model, tmp_path, subfolder="P_0_1").merge_and_unload()
    found = merged.get_submodule(PATH).weight
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[32:64], before[32:64])


@pytest.mark.parametrize("place", [(40, 0), (0, 3), (70, 1)])
def test_an_adapter_that_changes_more_is_refused(place, tmp_path):
    make_plugins(BLIP.make()).save_pretrained(tmp_path)
    file = tmp_path / "P_0_1" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[KEY_B][place] = 0.1
    save_file(tensors, file)
    with pytest.raises(PluginFileError, match="changes more than query and value"):
        PluginSet.from_pretrained(tmp_path).adapter(0)


def test_a_layer_that_is_named_is_meant_with_its_keys():
    backbone = find_backbone(BLIP.make())
    assert backbone.find_target_modules(["qkv"]) == {"self_attn.qkv": (96, 32)}
    lora_A, lora_B = make_plugins(BLIP.make(), target_modules=["qkv"]).adapter(0)[PATH]
    assert lora_A.shape == (2, 32)
    assert (lora_B != 0).all()


def test_the_fingerprint_is_of_the_keys():
    """What plugins leave alone tells models apart, not what they change."""
    model, other = BLIP.make(), BLIP.make(seed=1)
    plugins = make_plugins(model)
    with torch.no_grad():
        for layer, source in zip(other.encoder.layers, model.encoder.layers, strict=True):
            layer.self_attn.qkv.weight[32:64] = source.self_attn.qkv.weight[32:64]
    plugins.check_backbone(find_backbone(other))
    with pytest.raises(BackboneMismatchError, match="was not fine-tuned from it"):
        plugins.check_backbone(find_backbone(BLIP.make(seed=1)))


@both_kinds
def test_training_changes_query_and_value_alone(family):
    model, inputs = family.make(), family.inputs()
    backbone = find_backbone(model)
    chain = PluginChain(backbone, max_r=4, rank=2, scale=0.1, dropout=0.0)
    chain.start_from({i: make_plugins(family.make()).adapter(i) for i in range(4)})
    optimizer = torch.optim.AdamW(chain.parameters(), lr=0.1, weight_decay=0.1)
    chain.activate(1, 4)
    getattr(model(**inputs), family.output).square().mean().backward()
    optimizer.step()
    trained = family.result(model, inputs)
    adapters = chain.adapters()
    for adapter in adapters.values():
        for lora_A, lora_B in adapter.values():
            kept = torch.zeros(96, 4, dtype=torch.bool)
            kept[:32, :2] = True
            kept[64:, 2:] = True
            assert lora_A.shape == (4, 32)
            assert ((lora_B != 0) == kept).all()
    chain.remove(backbone)
    with torch.no_grad():
        for i in range(1, 4):
            for path, (lora_A, lora_B) in adapters[i].items():
                model.get_submodule(path).weight += 0.1 * lora_B @ lora_A
    torch.testing.assert_close(family.result(model, inputs), trained, rtol=1e-4, atol=1e-4)


def test_a_chain_takes_over_and_hands_back_the_same_plugins():
    plugins = make_plugins(BLIP.make())
    chain = PluginChain(find_backbone(BLIP.make()), max_r=4, rank=2, scale=0.1, dropout=0.0)
    chain.start_from({i: plugins.adapter(i) for i in range(4)})
    for i, adapter in chain.adapters().items():
        for path, (lora_A, lora_B) in adapter.items():
            assert torch.equal(lora_A, plugins.adapter(i)[path].lora_A)
            assert torch.equal(lora_B, plugins.adapter(i)[path].lora_B)
