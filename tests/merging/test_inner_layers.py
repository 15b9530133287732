# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Models that read layers in the middle see the token of every patch there, as they do without merging."""

import copy

import pytest
import torch
import transformers as hf
from helpers import reference
from helpers.duplicates import duplicates, without_positions
from helpers.families import COMMON, FAMILIES, SIMILAR, clip, dino
from helpers.models import describe, make_model

from tocom_hf import UnsupportedInputError, apply_tome, remove_tome
from tocom_hf.merging.backbones import find_backbone


SCHEDULE = [5, 0, 7, 3]
RESTORED = [
    family
    # the other one rotates, and returns its attention weights beside
    for family in [*FAMILIES, *(family for family in SIMILAR if family.model_class is hf.VJEPA2ForVideoClassification)]
    if find_backbone(apply_tome(family.make(), 1)).layers[0].tome_architecture.restore
]


def embedded(model, inputs):
    """What enters the first layer, float64 `(batch, tokens, hidden)`."""
    entering = []
    backbone = find_backbone(model)
    handle = backbone.layers[0].register_forward_pre_hook(lambda layer, args: entering.append(args[0]))
    with torch.no_grad():
        backbone.module(**inputs)
    handle.remove()
    return entering[0]


@pytest.mark.parametrize("family", RESTORED, ids=str)
def test_every_hidden_state_is_that_of_the_slow_reference_at_all_positions(family):
    model = family.make().double()
    inputs = {name: value.double() for name, value in family.inputs(batch=2).items()}
    tokens = embedded(model, inputs)
    backbone = find_backbone(apply_tome(model, SCHEDULE))
    with torch.no_grad():
        found = backbone.module(**inputs, output_hidden_states=True).hidden_states
        assert len(found) == 5
        torch.testing.assert_close(found[0], tokens, rtol=0, atol=0)
        # behind the last layer some families put out what their last norm makes of it, which other tests look at
        for count in (1, 2, 3):
            layers = list(backbone.layers)[:count]
            merged, groups = reference.hidden_states(
                layers,
                tokens,
                SCHEDULE[:count],
                family.protected,
                family.names,
                angles_of=family.angles_of,
                turn=family.turn,
            )
            expected = reference.restore(merged, groups)
            torch.testing.assert_close(found[count], expected, rtol=1e-5, atol=1e-5)
    assert found[4].shape == tokens.shape


def test_families_that_read_class_tokens_restore_on_demand(pixel_values):
    model = apply_tome(make_model(), SCHEDULE, restore=True)
    for arguments in ({}, {"return_dict": False}):
        with torch.no_grad():
            outputs = model.vit(pixel_values, output_hidden_states=True, **arguments)
        recorded = outputs.hidden_states if not arguments else next(part for part in outputs if type(part) is tuple)
        assert [entry.shape for entry in recorded] == [(3, 65, 32)] * 5


def test_selected_hidden_states_are_restored_too(pixel_values):
    model = apply_tome(hf.CLIPVisionModel(clip().vision_config).eval(), SCHEDULE)
    with torch.no_grad():
        every = model(pixel_values, output_hidden_states=True).hidden_states
        chosen = model(pixel_values, output_hidden_states=[-2]).hidden_states
    assert [entry is None for entry in chosen] == [True, True, True, False, True]
    assert torch.equal(chosen[3], every[3])
    assert every[3].shape == (3, 65, 32)


# --- heads that read inner layers agree with dense ones where merging loses nothing ---


def depth_anything():
    backbone = dino(hf.Dinov2Config, out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False)
    sizes = {"reassemble_hidden_size": 32, "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
    return hf.DepthAnythingForDepthEstimation(hf.DepthAnythingConfig(backbone_config=backbone, patch_size=4, **sizes))


def of_four_stages():
    return dino(hf.Dinov2Config, out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False)


def dpt():
    sizes = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "reassemble_factors": [4, 2, 1, 0.5]}
    config = hf.DPTConfig(backbone_config=of_four_stages(), **sizes, is_hybrid=False, head_in_index=-1)
    config.hidden_size, config.patch_size = 32, 4
    return hf.DPTForDepthEstimation(config)


def zoedepth():
    sizes = {
        "neck_hidden_sizes": [8] * 4,
        "fusion_hidden_size": 8,
        "bottleneck_features": 8,
        "num_relative_features": 4,
    }
    config = hf.ZoeDepthConfig(
        backbone_config=of_four_stages(), patch_size=4, backbone_hidden_size=32, bin_embedding_dim=8,
        num_attractors=[2, 2, 1, 1], reassemble_factors=[4, 2, 1, 0.5], num_patch_transformer_layers=1,
        patch_transformer_hidden_size=8, patch_transformer_intermediate_size=16,
        patch_transformer_num_attention_heads=2,
        **sizes,
    )  # fmt: skip
    return hf.ZoeDepthForDepthEstimation(config)


def backbone_of_two_stages():
    return hf.Dinov2Backbone(dino(hf.Dinov2Config, out_features=["stage2", "stage4"]))


def backbone_with_registers():
    settings = {"num_register_tokens": 3, "out_features": ["stage1", "stage3"]}
    return hf.Dinov2WithRegistersBackbone(dino(hf.Dinov2WithRegistersConfig, **settings))


def llava(layer=-2):
    text = hf.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=100
    )
    config = hf.LlavaConfig(
        vision_config=clip().vision_config, text_config=text, image_token_index=99, vision_feature_layer=layer
    )
    return hf.LlavaForConditionalGeneration(config)


def text_inputs(batch=2):
    return {"input_ids": torch.tensor([[99] * 64 + [1, 2, 3]] * batch)}


READERS = {
    "Dinov2Backbone": (backbone_of_two_stages, lambda out: out.feature_maps, {}),
    "Dinov2WithRegistersBackbone": (backbone_with_registers, lambda out: out.feature_maps, {}),
    "DepthAnything": (depth_anything, lambda out: [out.predicted_depth], {}),
    "DPT": (dpt, lambda out: [out.predicted_depth], {}),
    "ZoeDepth": (zoedepth, lambda out: [out.predicted_depth], {}),
    "LLaVA at layer -2": (llava, lambda out: [out.logits], text_inputs()),
    "LLaVA at two layers": (lambda: llava([1, -1]), lambda out: [out.logits], text_inputs()),
    "LLaVA, asked for layer 2 in the call": (
        lambda: llava(-1),
        lambda out: [out.logits],
        {**text_inputs(), "vision_feature_layer": 2},
    ),
}


@pytest.mark.parametrize("name", READERS)
@torch.no_grad()
def test_readers_of_inner_layers_agree_with_dense_ones_on_exact_duplicates(name):
    make, read, inputs = READERS[name]
    torch.manual_seed(0)
    model = without_positions(make()).double()
    expected = read(model(pixel_values=duplicates().double(), **inputs))
    apply_tome(model, 6)
    found = read(model(pixel_values=duplicates().double(), **inputs))
    for one, other in zip(found, expected, strict=True):
        assert other.std() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_backbone_whose_stages_change_after_patching_reads_these(pixel_values):
    model = apply_tome(hf.Dinov2Backbone(dino(hf.Dinov2Config, out_features=["stage4"])).eval(), SCHEDULE)
    model.out_features = ["stage1", "stage3", "stage4"]
    fresh = copy.deepcopy(remove_tome(copy.deepcopy(model)))
    found, dense = (either(pixel_values).feature_maps for either in (model, fresh))
    assert [one.shape for one in found] == [other.shape for other in dense] == [(3, 32, 8, 8)] * 3
    hidden_states = model(pixel_values, output_hidden_states=True).hidden_states
    grid = model.layernorm(hidden_states[3])[:, 1:].reshape(3, 8, 8, 32).permute(0, 3, 1, 2)
    torch.testing.assert_close(found[1], grid)


@pytest.mark.parametrize("make", [depth_anything, llava, lambda: hf.Dinov2Model(dino(hf.Dinov2Config))])
def test_remove_takes_the_hooks_away(make):
    model = make()
    before = describe(model)
    assert describe(apply_tome(model, 4)) != before
    assert describe(remove_tome(model)) == before


# --- hooks of others, which cannot be served ---


def test_hooks_on_inner_layers_are_refused_where_tokens_shall_be_restored(pixel_values):
    model = apply_tome(hf.Dinov2Model(dino(hf.Dinov2Config)).eval(), 4)
    read = []
    last = model.encoder.layer[3].register_forward_hook(lambda layer, args, output: read.append(output))
    with torch.no_grad():
        model(pixel_values)
        assert read[0].shape == (3, 65, 32)
        last.remove()
        hook = model.encoder.layer[1].register_forward_hook(lambda layer, args, output: read.append(output))
        with pytest.raises(UnsupportedInputError, match=r"Layer 1 has a forward hook.*output_hidden_states=True"):
            model(pixel_values)
        apply_tome(model, 0)
        model(pixel_values)
        apply_tome(model, 4, restore=False)
        model(pixel_values)
        assert read[-1].shape == (3, 57, 32)
        hook.remove()
        apply_tome(model, 4, restore=True)
        model(pixel_values)
    assert len(read) == 3


@pytest.mark.filterwarnings("ignore")
def test_compiled_they_are_restored_too(pixel_values):
    config = dino(hf.Dinov2Config, out_features=["stage1", "stage2"])
    config.num_hidden_layers = 2
    model = apply_tome(hf.Dinov2Backbone(config).eval(), SCHEDULE[:1] + SCHEDULE[2:3])
    with torch.no_grad():
        expected = model(pixel_values).feature_maps
        compiled = torch.compile(model, fullgraph=True, backend="eager")(pixel_values).feature_maps
        for one, other in zip(compiled, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_configuration_may_ask_for_hidden_states(pixel_values):
    model = apply_tome(hf.Dinov2ForImageClassification(hf.Dinov2Config(**{**COMMON, "mlp_ratio": 2})).eval(), SCHEDULE)
    model.config.output_hidden_states = True
    with torch.no_grad():
        assert {entry.shape for entry in model(pixel_values).hidden_states} == {(3, 65, 32)}
