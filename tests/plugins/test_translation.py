# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Plugin sets of a transformers model on timm's model of the same weights, and the reverse."""

import pytest
import torch
import transformers as hf
from helpers.models import make_plugins
from helpers.timm_models import is_timm_installed, make_timm

from tocom_hf import BackboneMismatchError, DistillationArguments, PluginSet, TocomModel, apply_tome, distill
from tocom_hf.cli.official_weights import convert_weights


if not is_timm_installed():
    pytest.skip("timm, an extra, is not installed", allow_module_level=True)


def images(batch=3, seed=7):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def logits(model):
    with torch.no_grad():
        return model(pixel_values=images()).logits


def twins(seed=0):
    """A ViT of timm and one of transformers with the same weights."""
    ours = make_timm(seed=seed)
    weights = {name.removeprefix("timm_model."): tensor for name, tensor in ours.state_dict().items()}
    return ours, convert_weights(weights, head_dim=8).eval()


def test_they_are_twins():
    """Or the rest would show nothing."""
    wrapped, split = twins()
    torch.testing.assert_close(logits(wrapped), logits(split), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(apply_tome(wrapped, 5)), logits(apply_tome(split, 5)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("source_r", "target_r"), [(1, 4), (4, 0)])
@pytest.mark.parametrize("made_for", ["transformers", "timm"])
def test_a_set_of_the_one_fits_the_other(made_for, source_r, target_r):
    wrapped, split = twins()
    plugins = make_plugins(split if made_for == "transformers" else wrapped)
    before = logits(apply_tome(twins()[0], target_r))
    degrees = {"plugins": plugins, "source_r": source_r, "target_r": target_r, "scale": 0.5}
    found = [logits(TocomModel.from_pretrained(model, **degrees)) for model in (wrapped, split)]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found[0], before, atol=0.1)


def test_weights_are_those_of_the_formula():
    wrapped, split = twins()
    plugins = make_plugins(split)
    model = TocomModel.from_pretrained(wrapped, plugins=plugins, source_r=0, target_r=2, scale=0.5)
    found = model.timm_model.blocks[1].attn.qkv.weight.chunk(3)
    attention = split.vit.layers[1].attention
    for rows, name in zip(found, ("q_proj", "k_proj", "v_proj"), strict=True):
        expected = getattr(attention, name).weight.double()
        for index in range(2):
            factors = plugins.adapter(index).get(f"layers.1.attention.{name}")
            if factors is not None:
                expected = expected + 0.5 * factors.lora_B.double() @ factors.lora_A.double()
        torch.testing.assert_close(rows, expected.float())


def test_a_saved_model_keeps_the_set_in_its_own_names(tmp_path):
    wrapped, split = twins()
    model = TocomModel.from_pretrained(wrapped, plugins=make_plugins(split), source_r=0, target_r=4)
    model.save_pretrained(tmp_path)
    again = TocomModel.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert PluginSet.from_pretrained(tmp_path / "tocom_plugins").config.backbone.model_type == "timm_wrapper"
    assert again.config.architectures == ["TimmWrapperForImageClassification"]


def test_other_weights_of_the_same_shape_are_refused():
    wrapped, _ = twins()
    _, other = twins(seed=1)
    with pytest.raises(BackboneMismatchError, match="was not fine-tuned from it"):
        TocomModel.from_pretrained(wrapped, plugins=make_plugins(other), source_r=0, target_r=4)


def test_sets_on_layers_of_their_own_choice_are_refused():
    wrapped, split = twins()
    plugins = make_plugins(split, target_modules=["fc1"])
    with pytest.raises(BackboneMismatchError, match=r"applies to mlp\.fc1, layers that have other names"):
        TocomModel.from_pretrained(wrapped, plugins=plugins, source_r=0, target_r=4)


def test_a_set_on_chosen_layers_of_timm_serves_that_model():
    wrapped, _ = twins()
    plugins = make_plugins(wrapped, target_modules=["fc1"])
    model = TocomModel.from_pretrained(wrapped, plugins=plugins, source_r=0, target_r=4)
    assert model.target_r == 4


def test_distillation_starts_from_a_set_of_the_other(tmp_path):
    wrapped, split = twins()
    start = make_plugins(split, max_r=2, rank=2, size=0.05)
    data = [{"pixel_values": image} for image in images(batch=8)]
    arguments = DistillationArguments(max_r=2, rank=2, max_steps=1, per_device_train_batch_size=4, learning_rate=1e-9)
    found = distill(wrapped, data, arguments, init_plugins=start)
    assert found.config.backbone.model_type == "timm_wrapper"
    back = TocomModel.from_pretrained(split, plugins=found, source_r=0, target_r=2, scale=1.0)
    expected = TocomModel.from_pretrained(twins()[1], plugins=start, source_r=0, target_r=2, scale=1.0)
    torch.testing.assert_close(logits(back), logits(expected), rtol=1e-3, atol=1e-3)


def test_it_is_a_family_of_transformers_alone_where_timm_is_not_meant():
    model = hf.DeiTModel(
        hf.DeiTConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64)
    )
    with pytest.raises(BackboneMismatchError, match="model_type is 'deit', the set's is 'vit'"):
        TocomModel.from_pretrained(model, plugins=make_plugins(twins()[1]), source_r=0, target_r=4)
