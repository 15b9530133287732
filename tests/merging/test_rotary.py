# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Models that turn queries and keys by the position of each token: what is special about them."""

import math

import pytest
import torch
import transformers as hf
from helpers import reference
from helpers.families import DINO, FAMILIES, dinov3

from tocom_hf import UnsupportedModelError, apply_tome, trace_tokens
from tocom_hf.merging.backbones import find_backbone
from tocom_hf.merging.state import MergeSettings, TokenState, running_call


DINOV3 = next(family for family in FAMILIES if family.model_class is hf.DINOv3ViTModel)
PREFIX = 3  # class and register tokens


def make(model_class=hf.DINOv3ViTModel, **settings):
    torch.manual_seed(0)
    model = model_class(dinov3(**settings))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def positions_of_layers(model, pixel_values):
    """Cosine and sine as every layer gets them in one call."""
    seen = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, args, kwargs: seen.append(kwargs["position_embeddings"]), with_kwargs=True
        )
        for layer in find_backbone(model).layers
    ]
    with torch.no_grad():
        model(pixel_values)
    for hook in hooks:
        hook.remove()
    return seen


def angles_on(rows, columns, head_dim=8):
    """Angles by input position, on a grid of patch centres from -1 to 1."""
    frequencies = [100 ** (-4 * index / head_dim) for index in range(head_dim // 4)]

    def angles_of(position):
        if position < PREFIX:
            return None
        row, column = divmod(position - PREFIX, columns)
        centres = [(2 * row + 1) / rows - 1, (2 * column + 1) / columns - 1]
        return torch.tensor([2 * math.pi * c * f for c in centres for f in frequencies], dtype=torch.float64)

    return angles_of


def test_training_jitters_positions_once_a_call_as_without_merging(pixel_values):
    model = make(pos_embed_shift=0.5, pos_embed_jitter=1.5, pos_embed_rescale=2.0).train()
    torch.manual_seed(3)
    stock = positions_of_layers(model, pixel_values)
    apply_tome(model, 6)
    torch.manual_seed(3)
    found = positions_of_layers(model, pixel_values)
    other = positions_of_layers(model, pixel_values)
    for cos, sin in found:
        assert torch.equal(cos, stock[0][0])
        assert torch.equal(sin, stock[0][1])
    assert not torch.equal(other[0][0], stock[0][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_token_has_the_mean_of_its_members_cosines_and_sines(pixel_values, dtype):
    """In half precision means are still of float32, whatever order the tokens merged in."""
    model = apply_tome(make().to(dtype), [5, 0, 7, 3], restore=False)
    pixel_values = pixel_values.to(dtype)
    (cos, sin), *_ = positions_of_layers(model, pixel_values)
    assert cos.dtype == dtype
    states = []
    model.register_forward_hook(lambda *args: states.append(running_call()), prepend=True)
    with torch.no_grad(), trace_tokens(model) as trace:
        model(pixel_values)
    found = states[0].coordinates[3]  # (batch, tokens, head_dim)
    assert found.dtype == torch.float32
    for image, positions in enumerate(trace.positions[3]):
        for token in range(PREFIX, found.shape[1]):
            members = (positions == token).nonzero()[:, 0] - PREFIX
            expected = torch.cat([cos[members, :4], sin[members, :4]], dim=1).double().mean(0)
            torch.testing.assert_close(found[image, token].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(16, 48), (48, 16), (24, 24)])
@pytest.mark.parametrize("heads", [4, 8])
@torch.no_grad()
def test_other_shapes_and_narrow_heads_equal_the_slow_reference(height, width, heads):
    model = make(num_attention_heads=heads).double()
    pixel_values = torch.randn(2, 3, height, width, dtype=torch.float64)
    tokens = model.embeddings(pixel_values)
    angles_of = angles_on(height // 4, width // 4, head_dim=32 // heads)
    expected, groups = reference.hidden_states(
        model.model.layer, tokens, [5, 0, 7, 3], PREFIX, DINO, angles_of=angles_of
    )
    apply_tome(model, [5, 0, 7, 3])
    found = model(pixel_values, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(found, reference.restore(expected, groups), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_stages_of_the_backbone_equal_the_slow_reference(pixel_values):
    model = make(hf.DINOv3ViTBackbone, out_features=["stage1", "stage3", "stage4"]).double()
    pixel_values = pixel_values.double()
    tokens, schedule = model.embeddings(pixel_values), [5, 0, 7, 3]
    expected = []
    for count in (1, 3, 4):
        layers = model.model.layer[:count]
        merged = reference.hidden_states(layers, tokens, schedule[:count], PREFIX, DINO, angles_of=angles_on(8, 8))
        restored = model.norm(reference.restore(*merged))[:, PREFIX:]
        expected.append(restored.reshape(3, 8, 8, 32).permute(0, 3, 1, 2))
    found = apply_tome(model, schedule)(pixel_values).feature_maps
    assert len(found) == 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_class_tokens_only_gives_the_same_class_feature(pixel_values):
    model = apply_tome(make(), 6, restore=False)
    expected = model(pixel_values).pooler_output
    apply_tome(model, 6, restore=False, class_tokens_only=True)
    found = model(pixel_values)
    assert found.last_hidden_state.shape == (3, PREFIX, 32)
    torch.testing.assert_close(found.pooler_output, expected, rtol=1e-4, atol=1e-4)


def test_layers_without_positions_are_refused():
    model = apply_tome(make(), 6)
    state = TokenState(MergeSettings(schedule=(6,) * 4, protected=PREFIX))
    with pytest.raises(UnsupportedModelError, match="without its rotary positions"):
        model.model.layer[0](torch.randn(1, 67, 32), tome=state)


@torch.no_grad()
def test_an_error_in_the_middle_leaves_no_call_behind(pixel_values):
    model = apply_tome(make(), 6)
    expected = model(pixel_values).pooler_output

    def fail(*args):
        raise RuntimeError("in the middle")

    hook = model.model.layer[2].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        model(pixel_values)
    hook.remove()
    assert running_call() is None
    assert torch.equal(model(pixel_values).pooler_output, expected)


@torch.no_grad()
def test_a_backbone_that_runs_within_another_has_positions_of_its_own(pixel_values):
    outer, inner = apply_tome(make(), 6), apply_tome(make(), 4)
    small = pixel_values[..., :16]
    expected = outer(pixel_values).pooler_output, inner(small).pooler_output
    found = []
    outer.model.layer[1].mlp.register_forward_hook(lambda *args: found.append(inner(small).pooler_output))
    assert torch.equal(outer(pixel_values).pooler_output, expected[0])
    assert torch.equal(found[0], expected[1])
