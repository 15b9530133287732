# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
import copy
import io
import pickle

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from helpers import reference
from helpers.families import FAMILIES
from helpers.models import MODEL_CLASSES, describe, make_model, schedule_of
from transformers import Dinov2Config, Dinov2Model, ViTMAEModel, ViTModel

from tocom_hf import (
    ArgumentError,
    DegreeError,
    TocomError,
    UnsupportedModelError,
    apply_tome,
    remove_tome,
)


def test_without_proportional_attention(model, pixel_values):
    model, pixel_values = model.double(), pixel_values.double()
    apply_tome(model, 6, proportional_attention=False)
    with torch.no_grad():
        found = model(pixel_values, output_hidden_states=True).hidden_states[-1]
        tokens = model.vit.embeddings(pixel_values)
        expected, _ = reference.hidden_states(model.vit.layers, tokens, [6] * 4, 1, proportional=False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
@pytest.mark.parametrize("batch", [1, 3])
def test_degree_zero_is_the_untouched_model_bit_for_bit(model_class, batch, pixel_values):
    model = make_model(model_class)
    with torch.no_grad():
        expected = model(pixel_values[:batch]).logits
        apply_tome(model, 0)
        assert torch.equal(model(pixel_values[:batch]).logits, expected)


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_remove_restores_the_model(model_class, pixel_values):
    model = make_model(model_class)
    before, weights = describe(model), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = model(pixel_values).logits
        apply_tome(model, 4)
        assert not torch.equal(model(pixel_values).logits, expected)
        assert model.state_dict().keys() == weights.keys()
        remove_tome(model)
        assert torch.equal(model(pixel_values).logits, expected)
    assert describe(model) == before
    assert describe(remove_tome(model)) == before


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
@pytest.mark.parametrize("r", [0, 3, 20])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_class_tokens_only_gives_the_same_logits(model_class, r, attention, pixel_values):
    model, trimmed = make_model(model_class), make_model(model_class)
    for either in (model, trimmed):
        either.set_attn_implementation(attention)
    apply_tome(model, r)
    apply_tome(trimmed, r, class_tokens_only=True)
    with torch.no_grad():
        torch.testing.assert_close(trimmed(pixel_values).logits, model(pixel_values).logits, rtol=1e-5, atol=1e-5)
        last = trimmed.base_model(pixel_values).last_hidden_state
    assert last.shape[1] == (1 if model_class is MODEL_CLASSES[0] else 2)
    # another degree keeps it, and an explicit argument takes it back
    apply_tome(trimmed, 2)
    assert trimmed.base_model(pixel_values).last_hidden_state.shape == last.shape
    apply_tome(trimmed, 0, class_tokens_only=False)
    assert trimmed.base_model(pixel_values).last_hidden_state.shape[1] > last.shape[1]


def test_class_tokens_only_is_refused_where_patch_tokens_are_read():
    model = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28))
    with pytest.raises(ArgumentError, match="patch tokens"):
        apply_tome(model, 2, class_tokens_only=True)
    with pytest.raises(ArgumentError, match="restore"):
        apply_tome(make_model(), 2, class_tokens_only=True, restore=True)


def test_a_second_apply_changes_the_degree(model, pixel_values):
    fresh = apply_tome(make_model(), 7)
    apply_tome(apply_tome(model, 2), 7)
    with torch.no_grad():
        assert torch.equal(model(pixel_values).logits, fresh(pixel_values).logits)
    assert schedule_of(model) == (7, 7, 7, 7)


def test_a_second_apply_keeps_the_kind_of_attention(model, pixel_values):
    expected = apply_tome(model, 4, proportional_attention=False)(pixel_values).logits
    assert torch.equal(apply_tome(apply_tome(model, 3), 4)(pixel_values).logits, expected)
    again = apply_tome(model, 4, proportional_attention=True)(pixel_values).logits
    assert not torch.allclose(again, expected, atol=1e-4)


def test_the_layer_classes_keep_their_names(model):
    """FSDP wrapping policies and saved configurations go by class names."""
    names = [type(module).__name__ for module in model.modules()]
    apply_tome(model, 2)
    assert [type(module).__name__ for module in model.modules()] == names


def test_a_backbone_without_head_can_be_patched(pixel_values):
    model = ViTModel(make_model().config).eval()
    with torch.no_grad():
        assert apply_tome(model, 5)(pixel_values).last_hidden_state.shape == (3, 65 - 20, 32)


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_merge_on_their_own(model, pixel_values, copies):
    apply_tome(model, 5)
    clone = copies(model)
    with torch.no_grad():
        expected = model(pixel_values).logits
        apply_tome(model, 0)
        assert torch.equal(clone(pixel_values).logits, expected)
        assert type(remove_tome(clone).vit.layers[0]) is type(make_model().vit.layers[0])


def test_torch_save_of_a_whole_model(model, pixel_values):
    buffer = io.BytesIO()
    torch.save(apply_tome(model, 5), buffer)
    buffer.seek(0)
    with torch.no_grad():
        assert torch.equal(torch.load(buffer, weights_only=False)(pixel_values).logits, model(pixel_values).logits)


def test_recorded_outputs(model, pixel_values):
    model.set_attn_implementation("eager")
    outputs = apply_tome(model, [5, 0, 7, 1])(pixel_values, output_hidden_states=True, output_attentions=True)
    assert [h.shape[1] for h in outputs.hidden_states] == [65, 60, 60, 53, 52]
    assert [a.shape[-1] for a in outputs.attentions] == [65, 60, 60, 53]
    for attention in outputs.attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))


def test_gradients_equal_those_of_the_slow_reference(model, pixel_values):
    model, pixel_values = model.double(), pixel_values.double()
    weight = model.vit.layers[0].attention.v_proj.weight
    slow, _ = reference.hidden_states(model.vit.layers, model.vit.embeddings(pixel_values), [6] * 4, 1)
    expected = torch.autograd.grad(slow.square().sum(), weight)
    found = apply_tome(model, 6)(pixel_values, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), weight), expected, rtol=1e-4, atol=1e-5)


def test_other_image_sizes(model):
    """More patches than the model was made for, with interpolated positions."""
    pixel_values = torch.randn(2, 3, 48, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = apply_tome(model.double(), 9)
    with torch.no_grad():
        found = model(pixel_values, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[-1]
        tokens = model.vit.embeddings(pixel_values, interpolate_pos_encoding=True)
        expected, _ = reference.hidden_states(model.vit.layers, tokens, [9] * 4, 1)
    assert tokens.shape[1] == 121
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("r", [-1, 2.0, True, "8", [1, 2], torch.tensor(2.5)])
def test_wrong_degrees_leave_the_model_alone(model, r):
    before = describe(model)
    with pytest.raises(DegreeError):
        apply_tome(model, r)
    assert describe(model) == before


def test_wrapped_forwards_are_refused(model):
    """Accelerate's hooks call the stock forward, so merging would silently not happen."""
    hook = ModelHook()
    add_hook_to_module(model.vit.layers[1], hook)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(UnsupportedModelError, match=r"layer module '1' is wrapped.*dispatch it afterwards"):
        apply_tome(model, 4)
    assert [type(module) for module in model.modules()] == classes


def test_dispatched_after_patching_it_merges(model, pixel_values):
    with torch.no_grad():
        expected = apply_tome(model, 4)(pixel_values).logits
        for layer in model.vit.layers:
            add_hook_to_module(layer, ModelHook())
        assert torch.equal(model(pixel_values).logits, expected)
        with pytest.raises(UnsupportedModelError, match="remove the hooks first"):
            remove_tome(model)


def test_layers_of_the_users_own_are_refused(model):
    stock = type(model.vit.layers[2])
    model.vit.layers[2].__class__ = type("MyLayer", (stock,), {"__module__": "my_code"})
    before = describe(model)
    with pytest.raises(TocomError, match="my_code"):
        apply_tome(model, 4)
    assert describe(model) == before


def test_mae_does_not_shuffle_what_merges():
    """transformers shuffles its patches in every call, and which of them are in the same half decides what merges."""
    family = next(family for family in FAMILIES if family.model_class is ViTMAEModel)
    model, inputs = apply_tome(family.make(), 6), family.inputs()
    in_order = family.result(model, inputs)
    for call in (lambda: model(inputs["pixel_values"]), lambda: model(pixel_values=inputs["pixel_values"])):
        with torch.no_grad():
            torch.testing.assert_close(call().last_hidden_state[:, 0], in_order)
