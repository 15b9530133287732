# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
import json
import os

import pytest
import torch
from helpers.families import COMMON
from helpers.models import make_model, make_plugins
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    DeiTForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEModel,
)

from tocom_hf import (
    ArgumentError,
    BackboneMismatchError,
    HubError,
    PluginFileError,
    PluginSet,
    TocomModel,
    UnsupportedModelError,
    apply_tome,
    save_composite,
)
from tocom_hf.merging.backbones import find_backbone
from tocom_hf.plugins.adapters import write_adapter
from tocom_hf.plugins.composition import Factors
from tocom_hf.storage.transaction import write_folder


@pytest.fixture
def folder(plugins, tmp_path):
    plugins.save_pretrained(tmp_path / "set")
    return tmp_path / "set"


@pytest.fixture
def backbone_folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_save_and_load_is_the_identity(plugins, folder):
    loaded = PluginSet.from_pretrained(folder)
    assert loaded.config == plugins.config
    for i in range(6):
        for path, factors in plugins.adapter(i).items():
            for one, other in zip(factors, loaded.adapter(i)[path], strict=True):
                assert torch.equal(one, other)
    assert sorted(os.listdir(folder)) == [*(f"P_{i}_{i + 1}" for i in range(6)), "tocom_config.json"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_set_is_stored_in_half_the_size_and_stays_so(plugins, folder, tmp_path, dtype):
    def size(path):
        return sum(file.stat().st_size for file in path.rglob("*.safetensors"))

    plugins.save_pretrained(tmp_path / "half", dtype=dtype)
    assert plugins.config.dtype == "float32"  # the set in memory is what it was
    assert size(tmp_path / "half") < 0.75 * size(folder)  # headers do not shrink
    loaded = PluginSet.from_pretrained(tmp_path / "half")
    loaded.save_pretrained(tmp_path / "again")
    assert size(tmp_path / "again") == size(tmp_path / "half")
    for path, factors in plugins.adapter(3).items():
        for one, other in zip(factors, loaded.adapter(3)[path], strict=True):
            assert other.dtype == torch.float32
            assert torch.equal(one.to(getattr(torch, dtype)).float(), other)


def test_stock_peft_reads_a_set_in_half_precision(plugins, backbone_folder, tmp_path, pixel_values):
    plugins.save_pretrained(tmp_path / "half", dtype="float16")
    backbone = AutoModel.from_pretrained(backbone_folder, add_pooling_layer=False)
    stock = PeftModel.from_pretrained(backbone, tmp_path / "half", subfolder="P_2_3")
    composite = PluginSet.from_pretrained(tmp_path / "half").compose(2, 3)
    ours = AutoModel.from_pretrained(backbone_folder, add_pooling_layer=False)
    with torch.no_grad():
        for path, layer in find_backbone(ours).projections().items():
            layer.weight.copy_(composite.apply(path, layer.weight))
        found, expected = stock(pixel_values).last_hidden_state, ours(pixel_values).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_factors_that_half_precision_cannot_hold_are_refused(plugins, tmp_path):
    next(iter(plugins.adapter(4).values())).lora_A[0, 0] = 1e5
    with pytest.raises(ArgumentError, match=r"not finite in float16. Store the set in float32"):
        plugins.save_pretrained(tmp_path / "half", dtype="float16")
    with pytest.raises(ArgumentError, match=r"dtype must be one of float32, float16, bfloat16, got 'int8'"):
        plugins.save_pretrained(tmp_path / "half", dtype="int8")
    assert not (tmp_path / "half").exists()


def test_modules_are_written_in_the_same_order_by_every_process(tmp_path):
    # string hashes, and with them the order of a set, differ from one process to the next; so many names are not in
    # order by chance
    names = [f"layers.0.{letter}_proj" for letter in "abcdefghijkl"]
    adapter = {name: Factors(torch.zeros(2, 4), torch.zeros(4, 2)) for name in reversed(names)}
    write_adapter(tmp_path, adapter, 0.1, None)
    assert json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["target_modules"] == names


@pytest.mark.parametrize("index", [0, 3, 5])
def test_each_plugin_loads_with_stock_peft_and_acts_as_ours(plugins, folder, backbone_folder, index, pixel_values):
    with torch.no_grad():
        stock = PeftModel.from_pretrained(
            AutoModel.from_pretrained(backbone_folder, add_pooling_layer=False),
            folder,
            subfolder=f"P_{index}_{index + 1}",
        )
        expected = stock(pixel_values=pixel_values).last_hidden_state
        backbone = AutoModel.from_pretrained(backbone_folder, add_pooling_layer=False)
        plain = backbone(pixel_values).last_hidden_state
        composite = plugins.compose(index, index + 1)
        for path, layer in find_backbone(backbone).projections().items():
            layer.weight.copy_(composite.apply(path, layer.weight))
        torch.testing.assert_close(backbone(pixel_values).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(plain, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("source_r", "target_r"), [(4, 16), (16, 4)])
def test_a_composite_is_one_ordinary_peft_adapter(model, tmp_path, source_r, target_r, pixel_values):
    plugins = make_plugins(model, max_r=16)
    save_composite(plugins.compose(source_r, target_r), tmp_path / "composite", base_model="some/model")
    ours = TocomModel.from_pretrained(make_model(), plugins=plugins, source_r=source_r, target_r=target_r)
    apply_tome(model, target_r)
    PeftModel.from_pretrained(model.vit, tmp_path / "composite")
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values).logits, ours(pixel_values).logits, rtol=1e-5, atol=1e-5)


def test_only_the_plugins_in_between_are_read(folder):
    for i in (0, 1, 4, 5):
        (folder / f"P_{i}_{i + 1}" / "adapter_model.safetensors").unlink()
    plugins = PluginSet.from_pretrained(folder)
    assert plugins.compose(2, 4).rank == 4
    with pytest.raises(PluginFileError, match="P_4_5"):
        plugins.compose(2, 5)


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def shorten_sketch(path):
    backbone = json.loads(path.read_text())["backbone"]
    edit_json(path, backbone={**backbone, "sketch": backbone["sketch"][:5]})


def test_unknown_keys_survive_a_round_trip(folder, tmp_path):
    edit_json(folder / "tocom_config.json", colour="blue")
    PluginSet.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "tocom_config.json").read_text())["colour"] == "blue"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "tocom_config.json").unlink(), "tocom_config.json is missing"),
        (lambda f: (f / "tocom_config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "tocom_config.json").write_text("[]"), "JSON object"),
        (lambda f: edit_json(f / "tocom_config.json", format_version=99), "pip install -U"),
        (lambda f: edit_json(f / "tocom_config.json", rank="2"), "'rank' has the wrong type"),
        (lambda f: edit_json(f / "tocom_config.json", max_r=0), "max_r must be from 1"),
        (lambda f: edit_json(f / "tocom_config.json", min_r=6), "min_r < max_r"),
        (lambda f: edit_json(f / "tocom_config.json", source_r=7), "source_r must be from min_r to max_r"),
        (lambda f: edit_json(f / "tocom_config.json", source_r="0"), "'source_r' has the wrong type"),
        (lambda f: edit_json(f / "tocom_config.json", max_r=10**9), "max_r must be from"),
        (lambda f: edit_json(f / "tocom_config.json", merging={"proportional_attention": 1}), "true or false"),
        (lambda f: edit_json(f / "tocom_config.json", evaluation=["x"]), "'evaluation'"),
        (lambda f: (f / "tocom_config.json").write_text("[" * 100_000), "not valid JSON"),
        (lambda f: (f / "tocom_config.json").write_text('{"a": ' + "9" * 5000 + "}"), "not valid JSON"),
        (lambda f: (f / "tocom_config.json").write_bytes(b" " * (2**24 + 1)), "at most"),
        (
            lambda f: edit_json(f / "tocom_config.json", recommended_scale=float("nan")),
            "recommended_scale must be from",
        ),
        (lambda f: shorten_sketch(f / "tocom_config.json"), "'sketch'"),
        (lambda f: edit_json(f / "tocom_config.json", backbone=None), "expected a JSON object"),
    ],
)
def test_a_damaged_configuration_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(PluginFileError, match=message):
        PluginSet.from_pretrained(folder)


def test_a_set_of_an_unknown_architecture_is_refused(folder):
    content = json.loads((folder / "tocom_config.json").read_text())
    edit_json(folder / "tocom_config.json", backbone={**content["backbone"], "model_type": "swin"})
    with pytest.raises(UnsupportedModelError, match="swin"):
        PluginSet.from_pretrained(folder)


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


KEY = "base_model.model.layers.1.attention.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "adapter_model.safetensors").unlink(), "is missing"),
        (lambda p: (p / "adapter_config.json").unlink(), "is missing"),
        (lambda p: os.truncate(p / "adapter_model.safetensors", 5000), "truncated"),
        (lambda p: os.truncate(p / "adapter_model.safetensors", 4), "truncated"),
        (lambda p: os.truncate(p / "adapter_model.safetensors", 0), "truncated"),
        (lambda p: (p / "adapter_config.json").write_text("no"), "not valid JSON"),
        (lambda p: edit_json(p / "adapter_config.json", r=3), "plain LoRA"),
        (lambda p: edit_json(p / "adapter_config.json", lora_alpha=1), "lora_alpha"),
        (lambda p: edit_json(p / "adapter_config.json", use_dora=True), "use_dora"),
        (lambda p: edit_json(p / "adapter_config.json", modules_to_save=["classifier"]), "modules_to_save"),
        (lambda p: rewrite(p / "adapter_model.safetensors", lambda t: t.pop(KEY)), "missing"),
        (lambda p: rewrite(p / "adapter_model.safetensors", lambda t: t.update(extra=torch.ones(1))), "extra"),
        (lambda p: rewrite(p / "adapter_model.safetensors", lambda t: t.update({KEY: torch.ones(3, 32)})), "shape"),
        (lambda p: rewrite(p / "adapter_model.safetensors", lambda t: t[KEY].fill_(float("nan"))), "finite"),
    ],
)
def test_a_damaged_plugin_is_refused_before_the_model_changes(model, folder, damage, message):
    damage(folder / "P_2_3")
    weights = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(PluginFileError, match=message):
        TocomModel.from_pretrained(model, plugins=folder, source_r=0, target_r=4)
    assert not isinstance(model, TocomModel)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_a_set_of_another_shape_is_refused(plugins):
    other = make_model(hidden_size=16)
    with pytest.raises(BackboneMismatchError, match="hidden_size is 16, the set's is 32"):
        TocomModel.from_pretrained(other, plugins=plugins, source_r=0, target_r=2)


def test_a_set_of_another_model_of_the_same_shape_is_refused(plugins):
    with pytest.raises(BackboneMismatchError, match="cosine similarity"):
        TocomModel.from_pretrained(make_model(seed=5), plugins=plugins, source_r=0, target_r=2)


def test_a_fine_tuned_descendant_is_accepted(model, plugins):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * parameter.std() * torch.randn_like(parameter))
    TocomModel.from_pretrained(model, plugins=plugins, source_r=0, target_r=2)


def test_saving_over_a_set_replaces_it(model, folder):
    fresh = make_plugins(model, seed=9)
    (folder / "notes.txt").write_text("mine")
    fresh.save_pretrained(folder)
    path = next(iter(fresh.adapter(0)))
    assert torch.equal(PluginSet.from_pretrained(folder).adapter(0)[path].lora_A, fresh.adapter(0)[path].lora_A)
    assert (folder / "notes.txt").read_text() == "mine"


def test_an_interrupted_save_leaves_the_folder_as_it_was(folder):
    before = sorted(str(path) for path in folder.rglob("*"))
    with pytest.raises(KeyboardInterrupt), write_folder(folder) as fresh:
        (fresh / "tocom_config.json").write_text("half")
        raise KeyboardInterrupt
    assert sorted(str(path) for path in folder.rglob("*")) == before
    PluginSet.from_pretrained(folder).compose(0, 6)


def test_a_file_in_the_way_of_a_folder_is_named(plugins, tmp_path):
    (tmp_path / "set").write_text("")
    with pytest.raises(PluginFileError, match="is a file"):
        plugins.save_pretrained(tmp_path / "set")


@pytest.mark.parametrize(
    ("name", "error"), [("no such/../folder", PluginFileError), ("nobody/nothing", HubError)], ids=["folder", "id"]
)
def test_what_is_neither_folder_nor_hub_id_is_refused(name, error):
    with pytest.raises(error):
        PluginSet.from_pretrained(name, local_files_only=True)


def test_plugins_of_a_masked_autoencoder_fit_the_vit_that_is_fine_tuned_from_it(pixel_values):
    """transformers fine-tunes ViT-MAE as ViT, with the same layers."""
    torch.manual_seed(0)
    mae = ViTMAEModel(ViTMAEConfig(**COMMON, mask_ratio=0.0)).eval()
    vit = ViTForImageClassification(ViTConfig(**COMMON)).eval()
    vit.vit.load_state_dict(mae.state_dict())
    plugins = make_plugins(mae)
    model = TocomModel.from_pretrained(vit, plugins=plugins, source_r=0, target_r=4)
    assert model.vit.config.model_type == "vit"
    change = plugins.compose(0, 4)
    path = "layers.2.attention.q_proj"
    expected = change.apply(path, mae.get_submodule(path).weight)
    assert torch.equal(model.vit.get_submodule(path).weight, expected)
    with pytest.raises(BackboneMismatchError, match="model_type is 'deit', the set's is 'vit_mae'"):
        TocomModel.from_pretrained(make_model(DeiTForImageClassification), plugins=plugins, source_r=0)
