# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What is distilled is the formula's, brings a model closer to itself at another degree, and leaves it as it was."""

import copy

import pytest
import torch
from helpers.distillation import ARGUMENTS, Noise, divergence, expected_loss
from helpers.models import describe, make_model
from peft import PeftModel
from transformers import ViTModel

from tocom_hf import (
    ArgumentError,
    BackboneMismatchError,
    DatasetError,
    DegreeError,
    MergeRecipe,
    PluginSet,
    TocomError,
    TocomModel,
    UnsupportedModelError,
    apply_tome,
)
from tocom_hf.distillation.branches import PluginChain
from tocom_hf.distillation.distill import DistillationArguments, distill
from tocom_hf.distillation.objectives import OBJECTIVES
from tocom_hf.distillation.student import SelfDistiller
from tocom_hf.merging.backbones import find_backbone


def trained_chain(model, max_r=4):
    """A chain with weights that are not zero."""
    torch.manual_seed(0)
    plugin_chain = PluginChain(find_backbone(model), max_r=max_r, rank=2, scale=0.1, dropout=0.0)
    for parameter in plugin_chain.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return plugin_chain


@pytest.mark.parametrize(
    ("source_r", "target_r", "proportional"), [(0, 4, True), (4, 0, True), (1, 3, True), (3, 2, True), (2, 4, False)]
)
def test_the_loss_is_kl_of_the_plain_teacher_and_the_composed_student(source_r, target_r, proportional, pixel_values):
    model = make_model()
    chain = trained_chain(model)
    objective = OBJECTIVES["logits"]
    backbone = find_backbone(model.requires_grad_(False))
    distiller = SelfDistiller(backbone, chain, objective, proportional_attention=proportional)
    loss = distiller.loss(pixel_values, source_r, target_r)
    expected = expected_loss(chain, pixel_values, source_r, target_r, proportional)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


def test_only_plugins_between_the_degrees_get_gradients(pixel_values):
    model = make_model()
    chain = trained_chain(model)
    distiller = SelfDistiller(find_backbone(model.requires_grad_(False)), chain, OBJECTIVES["logits"])
    distiller.loss(pixel_values, 3, 1).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    for layer in chain.layers:
        for factor in (*layer.lora_A.grad, *layer.lora_B.grad):
            used = factor.abs().sum(1) > 0
            assert used.tolist() == [False] * 2 + [True] * 4 + [False] * 2


def test_a_set_remembers_whether_attention_was_proportional(pixel_values):
    arguments = DistillationArguments(**ARGUMENTS, proportional_attention=False)
    plugins = distill(make_model(), Noise(), arguments)
    tocom = TocomModel.from_pretrained(make_model(), plugins=plugins, source_r=0, target_r=4, scale=0.0)
    expected = apply_tome(make_model(), 4, proportional_attention=False)(pixel_values).logits
    torch.testing.assert_close(tocom(pixel_values).logits, expected)
    assert not torch.allclose(apply_tome(make_model(), 4)(pixel_values).logits, expected, atol=1e-4)


def test_a_set_remembers_the_recipe_that_it_was_distilled_with(pixel_values, tmp_path):
    recipe = MergeRecipe(match_by="values", schedules={4: [6, 5, 3, 2]})
    recipe.save(tmp_path / "recipe.json")
    arguments = DistillationArguments(**ARGUMENTS, merge_recipe=str(tmp_path / "recipe.json"))
    plugins = distill(make_model(), Noise(), arguments)
    assert plugins.config.recipe == recipe
    assert plugins.config.training["merge_recipe"] == recipe.to_dict()
    tocom = TocomModel.from_pretrained(make_model(), plugins=plugins, source_r=0, target_r=4, scale=0.0)
    expected = apply_tome(make_model(), 4, recipe=recipe)(pixel_values).logits
    torch.testing.assert_close(tocom(pixel_values).logits, expected)
    with pytest.raises(ArgumentError, match="another merging recipe than the set's"):
        distill(make_model(), Noise(), DistillationArguments(**ARGUMENTS), init_plugins=plugins)


def test_a_step_merges_by_the_recipe(pixel_values):
    """The teacher at its degree and the student at its own, both by the recipe."""
    recipe = MergeRecipe(match_by="input", size_penalty=0.1)
    chain = trained_chain(make_model())
    distiller = SelfDistiller(find_backbone(make_model()), chain, OBJECTIVES["logits"], recipe=recipe)
    found = distiller.run(pixel_values, 2, 2)
    expected = apply_tome(make_model(), 2, recipe=recipe)(pixel_values).logits
    torch.testing.assert_close(found.softmax(-1), expected.softmax(-1))


def test_a_fresh_chain_changes_nothing(pixel_values):
    """B starts at zero: the student is then plain merging at the target degree."""
    model = make_model()
    chain = PluginChain(find_backbone(model), max_r=4, rank=2, scale=0.1, dropout=0.1)
    chain.activate(0, 4)
    assert torch.equal(apply_tome(model, 4)(pixel_values).logits, apply_tome(make_model(), 4)(pixel_values).logits)


def test_distillation_returns_a_set_and_restores_the_model(tmp_path):
    model = make_model().train()
    model.vit.embeddings.requires_grad_(False)
    before, weights = describe(model), copy.deepcopy(model.state_dict())
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    plugins = distill(model, Noise(), DistillationArguments(**ARGUMENTS), base_model="some/model")
    assert describe(model) == before
    assert model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    config = plugins.config
    assert (config.max_r, config.rank, config.base_model, config.training["steps"]) == (4, 2, "some/model", 8)
    plugins.save_pretrained(tmp_path)
    composed = TocomModel.from_pretrained(model, plugins=PluginSet.from_pretrained(tmp_path), source_r=0, target_r=4)
    assert composed.target_r == 4


def test_distilled_plugins_reduce_the_divergence_and_flipped_ones_raise_it():
    model, data = make_model(), Noise(64)
    arguments = DistillationArguments(
        max_r=8, num_train_epochs=10, per_device_train_batch_size=16, learning_rate=0.3, lora_dropout=0.0
    )
    plugins = distill(model, data, arguments)
    for source_r, target_r in ((0, 8), (8, 0)):
        with_plugin, plain, flipped = (
            divergence(model, plugins, data.images, source_r, target_r, scale) for scale in (0.1, 0.0, -0.1)
        )
        assert with_plugin < 0.7 * plain
        assert flipped > 1.5 * plain


def test_the_same_seed_gives_the_same_set():
    one, other = (distill(make_model(), Noise(), DistillationArguments(**ARGUMENTS)) for _ in range(2))
    different = distill(make_model(), Noise(), DistillationArguments(**ARGUMENTS, seed=1))
    for path, factors in one.adapter(2).items():
        assert torch.equal(factors.lora_B, other.adapter(2)[path].lora_B)
        assert not torch.equal(factors.lora_B, different.adapter(2)[path].lora_B)


def test_distilled_plugins_load_with_stock_peft(tmp_path, pixel_values):
    model = make_model()
    distill(model, Noise(), DistillationArguments(**ARGUMENTS)).save_pretrained(tmp_path)
    with torch.no_grad():
        plain = model(pixel_values).logits
        PeftModel.from_pretrained(model.vit, tmp_path, subfolder="P_1_2")
        assert not torch.equal(model(pixel_values).logits, plain)


def relative(plugins, other):
    """How far what two sets add to the weights is apart, in units of what the second adds."""

    def added(source):
        composite = source.compose(0, 3, source.config.trained_scale)
        weights = composite.factors.values()
        return composite.scale * torch.stack([lora_B @ lora_A for lora_A, lora_B in weights])

    return ((added(plugins) - added(other)).norm() / added(other).norm()).item()


@pytest.fixture(scope="module")
def base_plugins():
    return distill(make_model(), Noise(), DistillationArguments(**ARGUMENTS), base_model="base")


def finetuned():
    """A descendant of the backbone: all its weights have moved a little."""
    model = make_model()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator)
    return model


def test_training_starts_from_a_set(base_plugins):
    """What it adds to the weights, s * B A, is kept where the new training has another scale and fewer degrees."""
    still = DistillationArguments(**{**ARGUMENTS, "learning_rate": 1e-9, "seed": 5, "scale": 0.4, "max_r": 3})
    plugins = distill(finetuned(), Noise(), still, init_plugins=base_plugins)
    assert relative(plugins, base_plugins) < 1e-3
    assert plugins.config.training["init_plugins"] == {"base_model": "base", "steps": 8, "global_batch_size": 8}
    assert relative(distill(finetuned(), Noise(), still), base_plugins) > 0.9


@pytest.mark.parametrize("source_r", [0, *(pytest.param(r, marks=pytest.mark.slow) for r in (2, 4))])
def test_a_set_fitted_to_a_checkpoint_serves_it_better(base_plugins, source_r):
    arguments = DistillationArguments(**{**ARGUMENTS, "num_train_epochs": 15}, source_r=source_r)
    plugins = distill(finetuned(), Noise(), arguments, init_plugins=base_plugins)
    assert plugins.config.source_r == source_r
    images = Noise().images
    for target_r in {0, 4} - {source_r}:
        before, after = (
            divergence(finetuned(), tried, images, source_r, target_r, 0.1) for tried in (base_plugins, plugins)
        )
        assert after < 0.8 * before


def test_a_set_for_one_degree_of_weights_refuses_others(tmp_path, pixel_values):
    arguments = DistillationArguments(**ARGUMENTS, source_r=2)
    distill(make_model(), Noise(), arguments, eval_dataset=Noise(8)).save_pretrained(tmp_path)
    plugins = PluginSet.from_pretrained(tmp_path)
    assert repr(plugins) == "PluginSet(base_model=None, source_r=2, r=0..4, rank=2, scale=0.1)"
    grid = plugins.config.training["agreement"]
    assert (grid["sources"], grid["degrees"]) == ([2], [0, 1, 2, 3, 4])
    model = TocomModel.from_pretrained(make_model(), plugins=plugins, source_r=2, target_r=4)
    model(pixel_values)
    with pytest.raises(DegreeError, match="distilled for weights trained at r = 2"):
        TocomModel.from_pretrained(make_model(), plugins=plugins, source_r=0, target_r=4)
    TocomModel.from_pretrained(make_model(), plugins=plugins, source_r=0, target_r=0)  # nothing to compensate


def test_sets_that_cannot_be_started_from_are_refused(base_plugins):
    model = make_model()
    before = describe(model)
    for settings, message in [({"rank": 3}, "rank=3"), ({"max_r": 5}, "max_r=5")]:
        with pytest.raises(ArgumentError, match=message):
            distill(model, Noise(), DistillationArguments(**{**ARGUMENTS, **settings}), init_plugins=base_plugins)
    with pytest.raises(BackboneMismatchError, match="not fine-tuned from it"):
        distill(make_model(seed=1), Noise(), DistillationArguments(**ARGUMENTS), init_plugins=base_plugins)
    special = distill(make_model(), Noise(), DistillationArguments(**ARGUMENTS, source_r=2))
    with pytest.raises(ArgumentError, match="with source_r=None: it was distilled for r = 2 only"):
        distill(model, Noise(), DistillationArguments(**ARGUMENTS), init_plugins=special)
    unproportional = DistillationArguments(**ARGUMENTS, proportional_attention=False)
    with pytest.raises(ArgumentError, match="proportional_attention=False: it was distilled with True"):
        distill(model, Noise(), unproportional, init_plugins=base_plugins)
    assert describe(model) == before


def test_the_degree_that_a_checkpoint_records_is_the_teachers(caplog):
    model = make_model()
    model.config.tocom = {"source_r": 3}
    with pytest.raises(DegreeError, match=r"source_r=2 contradicts the checkpoint.* records source_r=3"):
        distill(model, Noise(), DistillationArguments(**ARGUMENTS, source_r=2))
    with caplog.at_level("WARNING"):
        distill(model, Noise(), DistillationArguments(**ARGUMENTS))
    assert "trained at r = 3, and is about to be a teacher at every degree" in caplog.text
    distill(model, Noise(), DistillationArguments(**ARGUMENTS, source_r=3))


def test_too_few_images_are_refused_before_the_model_changes():
    model = make_model()
    before = describe(model)
    for count in (0, 7):
        with pytest.raises(DatasetError, match=f"has {count} images, but one step takes 8"):
            distill(model, Noise(count), DistillationArguments(**ARGUMENTS))
    assert describe(model) == before


def test_logits_of_a_model_without_classifier_are_refused():
    with pytest.raises(UnsupportedModelError, match="classifier"):
        distill(ViTModel(make_model().config), Noise(), DistillationArguments(**ARGUMENTS, objective="logits"))


def test_a_merging_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="remove_tome"):
        distill(apply_tome(make_model(), 2), Noise(), DistillationArguments(**ARGUMENTS))


def test_weights_in_float16_are_refused():
    """transformers loads a checkpoint in the precision that it was saved in."""
    with pytest.raises(ArgumentError, match=r"Load it with dtype=torch\.float32"):
        distill(make_model().half(), Noise(), DistillationArguments(**ARGUMENTS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_dtypes_can_be_distilled(dtype):
    class Images(Noise):
        def __getitem__(self, index):
            return {"pixel_values": self.images[index].to(dtype)}

    plugins = distill(make_model().to(dtype), Images(), DistillationArguments(**ARGUMENTS))
    assert all(factor.dtype == torch.float32 for factors in plugins.adapter(1).values() for factor in factors)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_train_epochs": 0},
        {"num_train_epochs": 1.5},
        {"save_steps": True},
        {"learning_rate": 0.0},
        {"per_device_train_batch_size": -1},
        {"lora_dropout": 1.0},
        {"scale": float("nan")},
    ],
)
def test_arguments_out_of_range_are_refused(wrong):
    with pytest.raises(TocomError, match=next(iter(wrong))):
        DistillationArguments(**wrong)


@pytest.mark.parametrize(
    "wrong", [{"max_r": 0}, {"max_r": 2.5}, {"rank": 0}, {"rank": -1}, {"source_r": 17}, {"source_r": -1}]
)
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(DegreeError):
        DistillationArguments(**wrong)
