# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Merging recipes: what tokens are matched by, size penalties, schedules; and who must agree on them."""

import json
import math

import pytest
import torch
from helpers import reference
from helpers.families import FAMILIES
from helpers.models import make_model, make_plugins, schedule_of

from tocom_hf import ArgumentError, DegreeError, MergeRecipe, PluginFileError, PluginSet, TocomModel, apply_tome
from tocom_hf.merging.recipes import MATCH_BY, log_class_attention


KINDS = [family for family in FAMILIES if str(family) in ("ViTForImageClassification", "DINOv3ViTModel")]
# other projections, other names of the scaling, two tokens that never merge, registers
MORE_KINDS = (
    "DeiTForImageClassification", "BlipVisionModel", "CLIPForImageClassification",
    "Dinov2WithRegistersForImageClassification",
)  # fmt: skip


RECIPES = [
    *(MergeRecipe(match_by, penalty) for match_by in MATCH_BY for penalty in (0.0, 0.3, -0.2)),
    MergeRecipe("input", 0.02, attention_penalty=0.1),
    MergeRecipe("key_mean", attention_penalty=-0.3),
    MergeRecipe(["key_mean", "input", "keys", "values"], [0.0, 0.3, 0.0, 0.1], attention_penalty=[0.0, 0.0, 0.2, 0.1]),
]


def name_of(recipe):
    return f"{recipe.match_by}, {recipe.size_penalty}, {recipe.attention_penalty}"


CASES = [(family, recipe) for family in KINDS for recipe in RECIPES]
CASES += [(family, RECIPES[-1]) for family in FAMILIES if str(family) in MORE_KINDS]


@pytest.mark.parametrize(
    ("family", "recipe"), CASES, ids=lambda value: name_of(value) if isinstance(value, MergeRecipe) else str(value)
)
def test_layers_equal_the_slow_reference(family, recipe):
    model = family.make().double()
    inputs = {name: value.double() for name, value in family.inputs(batch=2).items()}
    layers = model.get_submodule(family.layers)
    captured = []
    handle = layers[0].register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    with torch.no_grad():
        model(**inputs)
        handle.remove()
        expected, groups = reference.hidden_states(
            layers, captured[0], [6] * 4, family.protected, family.names, angles_of=family.angles_of,
            match_by=recipe.match_by, penalty=recipe.size_penalty, attention_penalty=recipe.attention_penalty,
        )  # fmt: skip
        apply_tome(model, 6, recipe=recipe)
        found = model(**inputs, output_hidden_states=True).hidden_states[-1]
    if found.shape != expected.shape:
        expected = reference.restore(expected, groups)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_recipe_stays_until_another_is_given(model, pixel_values):
    recipe = MergeRecipe(match_by="input", size_penalty=0.02, schedules={4: [8, 4, 2, 1]})
    apply_tome(model, 4, recipe=recipe)
    assert schedule_of(model) == (8, 4, 2, 1)
    apply_tome(model, 3)
    assert schedule_of(model) == (3, 3, 3, 3)
    with torch.no_grad():
        by_input = model(pixel_values).logits
        by_keys = apply_tome(model, 3, recipe=MergeRecipe())(pixel_values).logits
        expected = apply_tome(make_model(), 3)(pixel_values).logits
    assert torch.equal(by_keys, expected)
    assert not torch.equal(by_input, expected)


def test_compiles_and_exports(pixel_values):
    # one layer without sizes and one with them
    recipe = MergeRecipe(["keys_values", "input"], size_penalty=0.1, attention_penalty=0.1)
    model = apply_tome(make_model(num_hidden_layers=2), 4, recipe=recipe)
    with torch.no_grad():
        expected = model(pixel_values).logits
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")(pixel_values).logits
        shapes = {"pixel_values": {0: torch.export.Dim("batch", min=2, max=64)}}
        program = torch.export.export(model, (), {"pixel_values": pixel_values}, dynamic_shapes=shapes, strict=False)
        exported = program.module()(pixel_values=pixel_values).logits
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(exported, expected, rtol=1e-5, atol=1e-5)


def test_a_file_comes_back_as_it_was_written(tmp_path):
    recipe = MergeRecipe(match_by="values", size_penalty=0.05, schedules={8: [1, 2, 3]})
    recipe.save(tmp_path / "recipe.json")
    assert MergeRecipe.load(tmp_path / "recipe.json") == recipe
    assert json.loads((tmp_path / "recipe.json").read_text())["schedules"] == {"8": [1, 2, 3]}
    recipe = MergeRecipe(["values", "keys"], [0.05, 0], {8: [1, 2]}, [0, 0.1])
    recipe.save(tmp_path / "recipe.json")
    assert MergeRecipe.load(tmp_path / "recipe.json") == recipe
    assert hash(MergeRecipe.load(tmp_path / "recipe.json")) == hash(recipe)


def test_recipes_that_do_the_same_are_equal():
    """Where set and checkpoint have other recipes, loading is an error."""
    lists = MergeRecipe(["input"] * 4, [0.1] * 4, attention_penalty=[0.0] * 4)
    assert lists == MergeRecipe("input", 0.1)
    assert MergeRecipe.from_dict(lists.to_dict()) == lists
    assert MergeRecipe.from_dict({"match_by": "input", "size_penalty": 0.1}) == lists


def test_a_recipe_with_attention_needs_a_class_token():
    model = next(family for family in FAMILIES if str(family) == "SiglipVisionModel").make()
    with pytest.raises(ArgumentError, match=r"attention of the class token, and Siglip\w+ has none"):
        apply_tome(model, 4, recipe=MergeRecipe(attention_penalty=0.1))
    apply_tome(model, 4, recipe=MergeRecipe(attention_penalty=[0, 0, 0, 0]))


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_attention_of_the_class_token_is_that_of_the_model(dtype, proportional):
    """Against the whole attention matrix, in float64."""
    generator = torch.Generator().manual_seed(2)
    query, key = (torch.randn(3, 9, 4, 8, generator=generator).to(dtype) for _ in range(2))
    sizes = torch.randint(1, 5, (3, 9), generator=generator).float() if proportional else None
    logits = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) * 8**-0.5
    if sizes is not None:
        logits += sizes.double().log()[:, None, None]
    expected = logits.softmax(-1)[:, :, 0].mean(1).log()
    with torch.autocast("cpu", torch.bfloat16):
        found = log_class_attention(query, key, sizes, 8**-0.5)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "is a JSON object with match_by, size_penalty, attention_penalty, schedules"),
        ({"match_by": ["key_mean", "tokens"]}, r"match_by\[1\] must be one of key_mean, keys"),
        ({"match_by": []}, "one entry for each layer, got an empty list"),
        ({"match_by": {}}, "match_by must be one of key_mean, keys"),
        ({"attention_penalty": [0, True]}, r"attention_penalty\[1\] must be a number"),
        ({"attention_penalty": [0, 0.1], "schedules": {"4": [1, 2, 3]}}, "one entry for each layer of the same model"),
        ({"match_by": "tokens"}, "match_by must be one of key_mean, keys"),
        ({"size_penalty": math.nan}, "size_penalty must be a number"),
        ({"size_penalty": "0.1"}, "size_penalty must be a number"),
        ({"schedules": [1]}, "schedules must map a degree"),
        ({"schedules": {"a": [1]}}, "degrees of schedules must be integers"),
        ({"schedules": {"4": 4}}, "must be a list of one number"),
        ({"schedules": {"4": [1, 2], "5": [1]}}, "one entry for each layer of the same model"),
        ({"schedules": {"0": [1, 2]}}, "degree 0 means that none merge"),
        ({"later": 1}, "newer version"),
    ],
)
def test_what_is_no_recipe_is_refused(content, message, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(content))
    with pytest.raises(ArgumentError, match=message):
        MergeRecipe.load(tmp_path / "recipe.json")


def test_negative_merges_and_other_numbers_of_layers_are_refused(model):
    with pytest.raises(DegreeError, match=r"schedules\[4\]\[1\] must be a non-negative"):
        MergeRecipe(schedules={4: [1, -2]})
    with pytest.raises(ArgumentError, match="models of 2 layers, and this model has 4"):
        apply_tome(model, 4, recipe=MergeRecipe(schedules={4: [1, 2]}))
    with pytest.raises(ArgumentError, match="models of 2 layers, and this model has 4"):
        apply_tome(model, 0, recipe=MergeRecipe(["keys", "input"]))


RECIPE = MergeRecipe(match_by="input", size_penalty=0.02, schedules={4: [5, 5, 3, 3]})


@pytest.fixture
def recipe_plugins(model):
    return make_plugins(model, merging={"proportional_attention": True, "recipe": RECIPE.to_dict()})


def test_a_model_obeys_the_recipe_of_its_set(model, recipe_plugins, pixel_values, tmp_path):
    """Composed weights, run with the recipe by hand, give the same; so does the saved and loaded model."""
    recipe_plugins.save_pretrained(tmp_path / "set")
    plugins = PluginSet.from_pretrained(tmp_path / "set")
    assert plugins.config.recipe == RECIPE
    composed = TocomModel.from_pretrained(model, plugins=plugins, source_r=0, target_r=4)
    assert schedule_of(composed) == (5, 5, 3, 3)
    with torch.no_grad():
        expected = composed(pixel_values).logits
        by_hand = make_model()
        by_hand.load_state_dict(composed.state_dict(), strict=False)
        assert torch.equal(apply_tome(by_hand, 4, recipe=RECIPE)(pixel_values).logits, expected)
        composed.save_pretrained(tmp_path / "tuned")
        again = TocomModel.from_pretrained(tmp_path / "tuned")
        torch.testing.assert_close(again(pixel_values).logits, expected)
    with pytest.raises(DegreeError, match="set_target_r"):
        apply_tome(composed, 4, recipe=MergeRecipe())


def test_a_checkpoint_tuned_with_a_recipe_records_it(model, plugins, recipe_plugins, tmp_path):
    TocomModel.from_pretrained(model, source_r=4, recipe=RECIPE).save_pretrained(tmp_path)
    again = TocomModel.from_pretrained(tmp_path)
    assert schedule_of(again) == (5, 5, 3, 3)
    assert TocomModel.from_pretrained(tmp_path, plugins=recipe_plugins, target_r=2).target_r == 2
    with pytest.raises(ArgumentError, match="the plugin set merge by different recipes"):
        TocomModel.from_pretrained(tmp_path, plugins=plugins, target_r=2)
    with pytest.raises(ArgumentError, match="merge by different recipes"):
        TocomModel.from_pretrained(tmp_path, recipe=MergeRecipe())


def test_a_checkpoint_tuned_by_tomes_rule_does_not_take_a_set_of_another(model, recipe_plugins, tmp_path):
    TocomModel.from_pretrained(model, source_r=4).save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match="fine-tuned while it merged, and the plugin set"):
        TocomModel.from_pretrained(tmp_path, plugins=recipe_plugins, target_r=0)


def test_weights_trained_without_merging_take_any_recipe(model, recipe_plugins, tmp_path):
    TocomModel.from_pretrained(model, source_r=0).save_pretrained(tmp_path)
    assert schedule_of(TocomModel.from_pretrained(tmp_path, plugins=recipe_plugins, target_r=4)) == (5, 5, 3, 3)


def test_a_model_that_merges_by_a_recipe_keeps_it(model):
    apply_tome(model, 4, recipe=RECIPE)
    assert schedule_of(TocomModel.from_pretrained(model, source_r=4)) == (5, 5, 3, 3)


@pytest.mark.parametrize("recipe", [{"match_by": "colour"}, {"schedules": {"4": [1, 2]}}, 3])
def test_a_set_with_a_recipe_that_cannot_be_used_is_refused(plugins, recipe, tmp_path):
    plugins.save_pretrained(tmp_path)
    path = tmp_path / "tocom_config.json"
    content = json.loads(path.read_text())
    content["merging"]["recipe"] = recipe
    path.write_text(json.dumps(content))
    with pytest.raises(PluginFileError, match=r"merging\.recipe cannot be used"):
        PluginSet.from_pretrained(tmp_path)
