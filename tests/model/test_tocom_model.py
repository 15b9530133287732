# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
import copy
import json
import pickle

import pytest
import torch
from helpers.families import FAMILIES
from helpers.models import make_plugins
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import (
    AutoModelForImageClassification,
    PreTrainedModel,
    SwinConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    pipeline,
)

from tocom_hf import (
    ArgumentError,
    ComposedWeightsError,
    DegreeError,
    PluginFileError,
    TocomError,
    TocomModel,
    UnsupportedModelError,
    apply_tome,
    remove_tome,
)
from tocom_hf.merging.backbones import find_backbone
from tocom_hf.merging.patching import merging_at


@pytest.fixture
def checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def logits(model, pixel_values):
    with torch.no_grad():
        return model(pixel_values=pixel_values).logits


def assert_same_weights(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    for (name, left), right in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize(("source_r", "target_r"), [(0, 6), (6, 0), (1, 4), (5, 2)])
def test_composed_equals_stock_peft_with_signed_scales(family, source_r, target_r, tmp_path):
    model, inputs = family.make(), family.inputs()
    plugins = make_plugins(model)
    plugins.save_pretrained(tmp_path)
    unfolded = apply_tome(family.make(), target_r)
    backbone = find_backbone(unfolded).module
    low, high = sorted((source_r, target_r))
    names = [f"P_{i}_{i + 1}" for i in range(low, high)]
    peft = PeftModel.from_pretrained(backbone, tmp_path, subfolder=names[0], adapter_name=names[0])
    for name in names[1:]:
        peft.load_adapter(tmp_path, subfolder=name, adapter_name=name)
    peft.base_model.set_adapter(names)
    if target_r < source_r:
        for module in peft.modules():
            if isinstance(module, LoraLayer):
                module.scaling = {name: -scaling for name, scaling in module.scaling.items()}
    composed = TocomModel.from_pretrained(model, plugins=plugins, source_r=source_r, target_r=target_r)
    torch.testing.assert_close(family.result(composed, inputs), family.result(unfolded, inputs), rtol=1e-5, atol=1e-5)


def test_it_is_a_transformers_model(checkpoint, plugins):
    model = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=1, target_r=4)
    assert isinstance(model, PreTrainedModel)
    assert isinstance(model, ViTForImageClassification)
    assert isinstance(model, TocomModel)
    assert type(model).__name__ == "ViTForImageClassification"
    assert type(model).config_class is ViTForImageClassification.config_class
    assert (model.source_r, model.target_r, model.plugins) == (1, 4, plugins)
    assert not model.training


def test_any_walk_ends_with_the_weights_of_a_fresh_load(checkpoint, plugins):
    model = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=2, target_r=4)
    for degree in (0, 6, 6, 2, 5, 1, 2, 0, 3):
        model.set_target_r(degree)
        fresh = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=2, target_r=degree)
        assert_same_weights(model, fresh)
        assert model.config.tocom == fresh.config.tocom
    model.set_target_r(2)
    assert_same_weights(model, AutoModelForImageClassification.from_pretrained(checkpoint))


def test_at_restores_degree_and_scale(checkpoint, plugins, pixel_values):
    model = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0, target_r=4, scale=0.2)
    before = logits(model, pixel_values)
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt), model.at(target_r=6, scale=0.05) as same:
        assert same is model
        fresh = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0, target_r=6, scale=0.05)
        assert_same_weights(model, fresh)
        raise KeyboardInterrupt
    assert torch.equal(logits(model, pixel_values), before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.config.tocom["scale"] == 0.2


def test_scale_none_is_what_the_set_recommends(model, checkpoint, pixel_values):
    plugins = make_plugins(model, recommended_scale=0.15)
    one = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0, target_r=4)
    other = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0, target_r=4, scale=0.15)
    assert_same_weights(one, other)


def test_a_saved_model_comes_back_alone(checkpoint, plugins, tmp_path, pixel_values):
    model = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=1, target_r=5, scale=0.2)
    model.save_pretrained(tmp_path / "saved")
    again = TocomModel.from_pretrained(tmp_path / "saved")
    assert (again.source_r, again.target_r) == (1, 5)
    assert torch.equal(logits(again, pixel_values), logits(model, pixel_values))
    again.set_target_r(0)
    assert_same_weights(
        again, TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=1, target_r=0, scale=0.2)
    )


def test_a_saved_model_is_the_source_checkpoint_for_plain_transformers(checkpoint, plugins, tmp_path):
    TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=1, target_r=5).save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architectures"] == ["ViTForImageClassification"]
    assert config["tocom"]["source_r"] == 1
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    assert_same_weights(plain, AutoModelForImageClassification.from_pretrained(checkpoint))


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(checkpoint, plugins, copies, pixel_values):
    model = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0, target_r=5)
    clone = copies(model)
    expected = logits(model, pixel_values)
    model.set_target_r(0)
    assert torch.equal(logits(clone, pixel_values), expected)
    clone.set_target_r(0)
    assert_same_weights(clone, model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_casting_a_composed_model_equals_loading_it_in_that_dtype(checkpoint, plugins, dtype):
    model = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0, target_r=5).to(dtype)
    fresh = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0, target_r=5, dtype=dtype)
    assert_same_weights(model, fresh)
    model.set_target_r(1)
    fresh.set_target_r(1)
    assert_same_weights(model, fresh)


def test_a_loaded_model_is_used_in_place(model, plugins):
    assert TocomModel.from_pretrained(model, plugins=plugins, source_r=0, target_r=3) is model


def test_loading_again_starts_from_the_source_weights(model, checkpoint, plugins):
    TocomModel.from_pretrained(model, plugins=plugins, source_r=0, target_r=3)
    TocomModel.from_pretrained(model, plugins=plugins, target_r=5)
    assert_same_weights(model, TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0, target_r=5))
    TocomModel.from_pretrained(model, target_r=2)
    assert_same_weights(model, TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0, target_r=2))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_matmul_precision_of_torch_does_not_matter(checkpoint, plugins, precision):
    model = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0, target_r=5)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        fresh = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0, target_r=5)
        model.set_target_r(2)
        model.set_target_r(5)
    finally:
        torch.set_float32_matmul_precision(before)
    assert_same_weights(model, fresh)


def test_restored_tokens_stay_restored(checkpoint, plugins, pixel_values):
    model = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0, target_r=5)
    apply_tome(model, 5, restore=True)
    model.set_target_r(3)
    with torch.no_grad():
        assert model.vit(pixel_values).last_hidden_state.shape[1] == 65


def test_degree_and_weights_of_a_model_go_together(checkpoint, plugins, pixel_values):
    model = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0, target_r=5)
    before = logits(model, pixel_values)
    for part in (model, model.vit):
        with pytest.raises(DegreeError, match="set_target_r"):
            apply_tome(part, 2)
        with pytest.raises(UnsupportedModelError, match="set_target_r"):
            remove_tome(part)
    assert torch.equal(logits(model, pixel_values), before)
    with merging_at(find_backbone(model), 2):  # merging alone, on purpose, with the weights as they are
        assert not torch.equal(logits(model, pixel_values), before)
    with pytest.raises(DegreeError, match="set_target_r"):
        apply_tome(copy.deepcopy(model), 2)


def test_a_model_without_plugins_runs_at_its_source_degree_only(checkpoint, pixel_values):
    model = TocomModel.from_pretrained(checkpoint, source_r=4)
    assert model.target_r == 4
    expected = apply_tome(AutoModelForImageClassification.from_pretrained(checkpoint), 4)
    assert torch.equal(logits(model, pixel_values), logits(expected.eval(), pixel_values))
    with pytest.raises(DegreeError, match="no plugins"):
        model.set_target_r(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_r": 4}, "does not record the degree"),
        ({"source_r": 0, "target_r": 7}, "outside the plugin set"),
        ({"source_r": 9, "target_r": 2}, "outside the plugin set"),
        ({"source_r": 0.5, "target_r": 2}, "non-negative integer"),
        ({"source_r": 0, "target_r": "2"}, "non-negative integer"),
        ({"source_r": 0, "target_r": True}, "non-negative integer"),
        ({"source_r": 0, "target_r": 2, "scale": "big"}, "scale"),
        ({"source_r": 0, "target_r": 2, "plugins": None}, "needs plugins"),
    ],
)
def test_wrong_degrees_fail_before_the_model_changes(model, plugins, arguments, message):
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(DegreeError, match=message):
        TocomModel.from_pretrained(model, **{"plugins": plugins, **arguments})
    assert not isinstance(model, TocomModel)
    assert not hasattr(model.config, "tocom")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_source_degree_that_contradicts_the_configuration_is_refused(checkpoint, plugins, tmp_path):
    TocomModel.from_pretrained(checkpoint, source_r=4).save_pretrained(tmp_path / "saved")
    with pytest.raises(DegreeError, match="contradicts"):
        TocomModel.from_pretrained(tmp_path / "saved", plugins=plugins, source_r=0, target_r=2)
    assert TocomModel.from_pretrained(tmp_path / "saved", plugins=plugins, source_r=4, target_r=2).source_r == 4


def test_a_failed_switch_leaves_the_model_as_it_was(checkpoint, plugins, pixel_values):
    model = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0, target_r=3)
    before = logits(model, pixel_values)
    for wrong in (7, -1, 2.5, None):
        with pytest.raises(TocomError):
            model.set_target_r(wrong)
    assert model.target_r == 3
    assert torch.equal(logits(model, pixel_values), before)


def test_training_composed_weights_is_noticed(checkpoint, plugins, tmp_path):
    model = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0, target_r=3)
    with torch.no_grad():
        model.vit.layers[1].attention.v_proj.weight.mul_(1.01)
    for action in (lambda: model.set_target_r(0), lambda: model.save_pretrained(tmp_path / "x")):
        with pytest.raises(ComposedWeightsError, match=r"rebase\(\)"):
            action()
    trained = copy.deepcopy(model.state_dict())
    model.rebase()
    assert (model.source_r, model.target_r) == (3, 3)
    model.set_target_r(5)
    model.set_target_r(3)
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())


def test_training_mode_of_composed_weights_warns(checkpoint, plugins, caplog):
    model = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0, target_r=3)
    model.set_target_r(0)
    model.train()
    assert not caplog.records
    model.set_target_r(3)
    model.train()
    assert "model.set_target_r(0)" in caplog.text
    assert "model.rebase()" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_change_of_one_bit_is_noticed_however_it_was_made(checkpoint, plugins, dtype):
    """Through `data` autograd sees no change, and in float64 composing anew may itself be off by a bit."""
    model = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0, target_r=3, dtype=dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        model.set_target_r(2)
    finally:
        torch.set_num_threads(threads)
    entry = model.vit.layers[1].attention.v_proj.weight.data[3, 5]
    entry.copy_(torch.nextafter(entry, torch.tensor(100.0, dtype=dtype)))
    with pytest.raises(ComposedWeightsError, match=r"layers.1.attention.v_proj.weight was changed"):
        model.set_target_r(0)


def test_two_weights_that_change_places_are_noticed(checkpoint, plugins):
    model = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0, target_r=3)
    weight = model.vit.layers[1].attention.v_proj.weight.data
    weight[[0, 1]] = weight[[1, 0]]
    with pytest.raises(ComposedWeightsError):
        model.set_target_r(0)


def test_training_at_the_source_degree_needs_nothing(checkpoint, plugins):
    model = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=3)
    with torch.no_grad():
        model.vit.layers[1].attention.v_proj.weight.mul_(1.01)
    trained = copy.deepcopy(model.state_dict())
    model.set_target_r(5)
    model.set_target_r(3)
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())


def test_overrides_of_the_configuration_pass_through(checkpoint, plugins):
    model = TocomModel.from_pretrained(
        checkpoint, plugins=plugins, source_r=0, target_r=3, num_labels=7, ignore_mismatched_sizes=True,
        attn_implementation="eager", dtype=torch.float64,
    )  # fmt: skip
    assert model.classifier.weight.shape == (7, 32)
    assert model.config._attn_implementation == "eager"
    assert model.dtype == torch.float64
    same = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0, target_r=3, config=str(checkpoint))
    assert same.target_r == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_auto_is_that_of_the_checkpoint(model, plugins, dtype, tmp_path):
    model.to(dtype).save_pretrained(tmp_path)
    automatic = TocomModel.from_pretrained(tmp_path, plugins=plugins, source_r=0, target_r=3, dtype="auto")
    named = TocomModel.from_pretrained(tmp_path, plugins=plugins, source_r=0, target_r=3, dtype=dtype)
    assert automatic.dtype == dtype
    assert all(torch.equal(value, named.state_dict()[name]) for name, value in automatic.state_dict().items())


def test_loading_info_is_refused_with_a_way(checkpoint, plugins):
    with pytest.raises(ArgumentError, match=r"output_loading_info is not supported.*with transformers"):
        TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0, output_loading_info=True)


def test_plugins_of_a_relative_path_outlive_a_change_of_the_working_directory(model, plugins, tmp_path, monkeypatch):
    plugins.save_pretrained(tmp_path / "set")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    tocom = TocomModel.from_pretrained(model, plugins="set", source_r=0)
    monkeypatch.chdir(tmp_path / "elsewhere")
    tocom.set_target_r(4)
    assert tocom.target_r == 4


def test_a_checkpoint_of_another_class_is_refused(checkpoint, plugins):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "architectures": ["MyViT"]}))
    with pytest.raises(UnsupportedModelError, match="MyViT"):
        TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0, target_r=3)


def test_an_unknown_architecture_is_refused_before_its_weights_are_read(tmp_path):
    SwinConfig(architectures=["SwinForImageClassification"]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="'swin': it attends within windows"):
        TocomModel.from_pretrained(tmp_path, source_r=0)


def test_adapted_projections_are_refused(model, plugins, tmp_path):
    plugins.save_pretrained(tmp_path)
    PeftModel.from_pretrained(model.vit, tmp_path, subfolder="P_0_1")
    with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
        TocomModel.from_pretrained(model, plugins=plugins, source_r=0, target_r=3)


def test_adapters_that_transformers_attached_are_refused(model, plugins):
    model.add_adapter(LoraConfig(target_modules=["fc1", "fc2"]))
    with pytest.raises(UnsupportedModelError, match=r"adapters of its own .*merge_and_unload"):
        TocomModel.from_pretrained(model, plugins=plugins, source_r=0, target_r=3)
    with pytest.raises(UnsupportedModelError, match="adapters of its own"):
        apply_tome(model, 2)


def test_the_class_itself_makes_no_model():
    with pytest.raises(TypeError, match="from_pretrained"):
        TocomModel()


def test_a_pipeline_runs_it(checkpoint, plugins):
    from PIL import Image

    model = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0, target_r=4)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    classify = pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    assert len(classify(Image.new("RGB", (40, 40), "red"), top_k=3)) == 3


def test_a_checkpoint_that_transformers_saved_anew_opens_without_its_plugins(checkpoint, plugins, tmp_path, caplog):
    TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0).save_pretrained(tmp_path / "ours")
    AutoModelForImageClassification.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    model = TocomModel.from_pretrained(tmp_path / "theirs")
    assert (model.source_r, model.target_r, model.plugins) == (0, 0, None)
    assert "plugins=..." in caplog.text
    with pytest.raises(PluginFileError, match=r"tocom_plugins, which is missing.*Pass plugins"):
        TocomModel.from_pretrained(tmp_path / "theirs", target_r=3)
    assert TocomModel.from_pretrained(tmp_path / "theirs", plugins=plugins, target_r=3).target_r == 3
    with pytest.raises(DegreeError, match=r'correct or delete "tocom"'):
        TocomModel.from_pretrained(tmp_path / "theirs", source_r=4)


def test_a_recorded_scale_is_that_of_the_recorded_plugins(checkpoint, plugins, tmp_path, pixel_values):
    model = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0, target_r=5, scale=0.3)
    model.save_pretrained(tmp_path / "saved")
    assert_same_weights(TocomModel.from_pretrained(tmp_path / "saved"), model)
    recommended = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0, target_r=5)
    assert_same_weights(TocomModel.from_pretrained(tmp_path / "saved", plugins=plugins), recommended)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(32, 32, dtype=torch.uint8),  # as bitsandbytes packs weights, which have no cosine to be known by
        torch.empty(32, 32, device="meta"),  # offloaded
    ],
    ids=["packed", "offloaded"],
)
def test_weights_that_are_not_there_are_refused_with_a_way(model, plugins, weight):
    for layer in model.vit.layers:
        for projection in (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj):
            projection.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="Compose before quantising"):
        TocomModel.from_pretrained(model, plugins=plugins, source_r=0, target_r=3)
