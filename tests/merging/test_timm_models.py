# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Plain vision transformers of timm in the wrappers of transformers. Everything else of timm is refused."""

import copy
import functools
import pickle

import pytest
import torch
from helpers import reference
from helpers.concurrency import replicate, run_in_threads
from helpers.models import describe, schedule_of
from helpers.timm_models import NAMES, is_timm_installed, make_timm, split_layers

from tocom_hf import (
    ArgumentError,
    MergeRecipe,
    UnsupportedInputError,
    UnsupportedModelError,
    apply_tome,
    remove_tome,
)
from tocom_hf.cost.flops import Example
from tocom_hf.merging.backbones import find_backbone


if not is_timm_installed():
    pytest.skip("timm, an extra, is not installed", allow_module_level=True)

KINDS = {
    "token": {},
    "registers": {"reg_tokens": 3, "init_values": 0.5, "no_embed_class": True},
    "average": {"global_pool": "avg", "qk_norm": True, "scale_attn_norm": True, "qkv_bias": False},
    "map": {"global_pool": "map", "class_token": False, "pre_norm": True},
    "distilled": {"architecture": "deit_base_distilled_patch16_224"},
}
PROTECTED = {"token": 1, "registers": 4, "average": 1, "map": 0, "distilled": 2}
RESTORED = {"average", "map"}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind, **settings):
    return make_timm(**{**KINDS[kind], **settings})


def images(batch=3, seed=7):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def logits(model, pixel_values):
    with torch.no_grad():
        return model(pixel_values=pixel_values).logits


def entering_tokens(model, pixel_values):
    captured = []
    handle = model.timm_model.blocks[0].register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    model(pixel_values)
    handle.remove()
    return captured[0]


def leaving_tokens(model, pixel_values):
    captured = []
    handle = model.timm_model.blocks[-1].register_forward_hook(lambda module, args, output: captured.append(output))
    model(pixel_values)
    handle.remove()
    return captured[0]


@every_kind
@pytest.mark.parametrize("r", [5, 40, [0, 7, 0, 3]], ids=str)
@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_layers_equal_the_slow_reference(kind, r, fused):
    model, pixel_values = make(kind).double(), images(batch=2).double()
    for layer in model.timm_model.blocks:
        layer.attn.fused_attn = fused
    tokens = entering_tokens(model, pixel_values)
    apply_tome(model, r)
    found = leaving_tokens(model, pixel_values)
    schedule = schedule_of(model)
    remove_tome(model)
    expected, groups = reference.hidden_states(split_layers(model), tokens, schedule, PROTECTED[kind], NAMES)
    if kind in RESTORED:
        expected = reference.restore(expected, groups)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@every_kind
def test_degree_zero_is_the_untouched_model_bit_for_bit_and_nothing_is_left_behind(kind):
    model, pixel_values = make(kind), images()
    before, expected = describe(model), logits(model, pixel_values)
    assert torch.equal(logits(apply_tome(model, 0), pixel_values), expected)
    assert not torch.equal(logits(apply_tome(model, 9), pixel_values), expected)
    assert torch.equal(logits(remove_tome(model), pixel_values), expected)
    assert describe(model) == before


@every_kind
def test_duplicates_merge_without_a_trace(kind):
    """Groups of four identical tokens: merging them is exact, so every head must give what the dense model gives."""
    model, pixel_values = make(kind), images()
    protected = PROTECTED[kind]

    def duplicate(module, args):
        tokens = args[0].clone()
        first = torch.arange(protected, tokens.shape[1] - 3, 4)
        for offset in range(1, 4):
            tokens[:, first + offset] = tokens[:, first]
        return (tokens,)

    model.timm_model.blocks[0].register_forward_pre_hook(duplicate)
    dense = logits(model, pixel_values)
    merged = logits(apply_tome(model, [32, 16, 0, 0]), pixel_values)
    torch.testing.assert_close(merged, dense, rtol=1e-4, atol=1e-4)


def test_registers_are_no_class_token():
    recipe = MergeRecipe(attention_penalty=0.1)
    with pytest.raises(ArgumentError, match="attention of the class token"):
        apply_tome(make_timm(class_token=False, reg_tokens=3, global_pool="avg"), 4, recipe=recipe)
    apply_tome(make("registers"), 4, recipe=recipe)


@pytest.mark.parametrize("pool", ["avgmax", "max", "prr", ""])
def test_every_pooling_reads_restored_tokens(pool):
    model = make_timm(global_pool=pool)
    apply_tome(model, 6)
    tokens = leaving_tokens(model, images())
    assert tokens.shape[1] == 65
    assert len(tokens[0].unique(dim=0)) == 65 - 4 * 6  # those that merged are copies of each other


@every_kind
@torch.no_grad()
def test_maps_of_inner_layers_are_those_of_restored_tokens(kind):
    model, pixel_values = make(kind), images(batch=2)
    dense = model(pixel_values, output_hidden_states=True).hidden_states
    apply_tome(model, [5, 0, 7, 3], restore=True)
    found = model(pixel_values, output_hidden_states=True).hidden_states
    assert [map_.shape for map_ in found] == [map_.shape for map_ in dense]
    # the last layer has restored its own tokens, which the map of it shows row by row
    patches = leaving_tokens(model, pixel_values)[:, PROTECTED[kind] :]
    torch.testing.assert_close(found[-1], patches.transpose(1, 2).view(2, 32, 8, 8))


@torch.no_grad()
def test_maps_of_chosen_layers_and_in_other_formats():
    model, pixel_values = apply_tome(make("registers"), 6), images(batch=2)
    every = model(pixel_values, output_hidden_states=True).hidden_states
    chosen = model(pixel_values, output_hidden_states=[1, 3]).hidden_states
    assert torch.equal(chosen[0], every[1])
    assert torch.equal(chosen[1], every[3])
    rows = model(pixel_values, output_hidden_states=True, output_fmt="NLC").hidden_states
    assert torch.equal(rows[1], every[1].flatten(2).transpose(1, 2))
    pairs = model(pixel_values, output_hidden_states=True, return_prefix_tokens=True).hidden_states
    assert torch.equal(pairs[1][0], every[1])
    assert pairs[1][1].shape == (2, 4, 32)


def test_duplicated_maps_equal_those_of_the_dense_model():
    model, pixel_values = make("token"), images()

    def duplicate(module, args):
        tokens = args[0].clone()
        first = torch.arange(1, tokens.shape[1] - 3, 4)
        for offset in range(1, 4):
            tokens[:, first + offset] = tokens[:, first]
        return (tokens,)

    model.timm_model.blocks[0].register_forward_pre_hook(duplicate)
    with torch.no_grad():
        dense = model(pixel_values, output_hidden_states=True).hidden_states
        found = apply_tome(model, [32, 16, 0, 0])(pixel_values, output_hidden_states=True).hidden_states
    for merged, expected in zip(found, dense, strict=True):
        torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


@every_kind
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("intermediates", [False, True])
def test_gradient_checkpointing_changes_nothing(kind, intermediates, use_reentrant, monkeypatch):
    monkeypatch.setattr("timm.models._manipulate.use_reentrant_ckpt", lambda: use_reentrant)

    def gradients(checkpointing):
        model = apply_tome(make(kind), 6).train()
        if checkpointing:
            model.activation_checkpointing_enable()  # timm does it its own way
            assert model.timm_model.grad_checkpointing
        model(images(), output_hidden_states=intermediates).logits.square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients(False), gradients(True)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


@every_kind
def test_compiles_as_one_graph_and_once(kind):
    torch.compiler.reset()
    model = apply_tome(make(kind, depth=3), [6, 0, 5])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled, images()), logits(model, images()), rtol=1e-5, atol=1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        other = images(seed=8)
        torch.testing.assert_close(logits(compiled, other), logits(model, other), rtol=1e-5, atol=1e-5)


@every_kind
def test_exports_with_a_dynamic_batch(kind):
    model = apply_tome(make(kind, depth=2), 6)
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=2, max=64)}}
    with torch.no_grad():
        program = torch.export.export(
            model, (), {"pixel_values": images()}, dynamic_shapes=shapes, strict=False
        ).module()
    other = images(batch=5)
    torch.testing.assert_close(logits(program, other), logits(model, other), rtol=1e-5, atol=1e-5)


@every_kind
def test_threads_and_replicas_do_not_disturb_each_other(kind):
    model = apply_tome(make(kind), 6)
    batches = [images(batch=2, seed=seed) for seed in range(4)]
    models = [model, model, replicate(model), replicate(model)]
    found = run_in_threads([functools.partial(logits, *pair) for pair in zip(models, batches, strict=True)])
    for result, batch in zip(found, batches, strict=True):
        torch.testing.assert_close(result, logits(model, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_give_the_same(copies):
    model = apply_tome(make("registers"), 6)
    assert torch.equal(logits(copies(model), images()), logits(model, images()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_run(dtype):
    model = apply_tome(make("average"), 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert logits(model, images()).isfinite().all()
    result = logits(model.to(dtype), images().to(dtype))
    assert result.dtype == dtype
    assert result.isfinite().all()


def test_only_class_tokens_leave_the_last_layer():
    model, pixel_values = apply_tome(make("token"), 6), images()
    expected = logits(model, pixel_values)
    apply_tome(model, 6, class_tokens_only=True)
    torch.testing.assert_close(logits(model, pixel_values), expected, rtol=1e-5, atol=1e-5)


def test_the_headless_wrapper_and_other_sizes():
    model = apply_tome(make_timm(head=False, dynamic_img_size=True), 6)
    with torch.no_grad():
        output = model(torch.randn(2, 3, 48, 32))
    assert output.last_hidden_state.shape == (2, 1 + 12 * 8 - 24, 32)
    assert output.pooler_output.shape == (2, 32)


def test_operations_are_counted_at_the_size_of_the_model():
    model = make_timm(img_size=(48, 32), in_chans=1)
    example = Example.of(find_backbone(model), None, 1)
    assert example.batch.shape == (1, 1, 48, 32)
    assert example.count_at(8).tokens == (97, 89, 81, 73, 65)
    assert example.count_at(8).flops < example.count_at(0).flops


@pytest.mark.parametrize("mask", [{"attn_mask": torch.ones(65, 65).tril().bool()}, {"is_causal": True}])
def test_masks_of_timm_are_refused(mask):
    model = apply_tome(make("token"), 6)
    with pytest.raises(UnsupportedInputError, match=r"(attn_mask hides tokens|is_causal hides)"):
        model(images(), **mask)


@torch.no_grad()
def test_a_mask_that_hides_nothing_changes_nothing():
    model = apply_tome(make("token"), 6)
    found = model(images(), attn_mask=torch.ones(65, 65, dtype=torch.bool), is_causal=False).logits
    assert torch.equal(found, logits(model, images()))


def parallel(name):
    from timm.models import vision_transformer

    return {"block_fn": getattr(vision_transformer, name)}


def gated():
    from timm.layers import Attention

    return {"attn_layer": functools.partial(Attention, gated=True)}


def mixing():
    from timm.layers.mlp import GlobalResponseNormMlp

    return {"mlp_layer": functools.partial(GlobalResponseNormMlp, use_conv=False)}


SWIN = {"embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_timm(**parallel("ResPostBlock")), "ResPostBlock: it normalises what attention put out"),
        (
            lambda: make_timm(**parallel("ParallelScalingBlock")),
            "ParallelScalingBlock: attention and MLP read the same",
        ),
        (lambda: make_timm(**parallel("ParallelThingsBlock")), "ParallelThingsBlock: it has several attentions"),
        (lambda: make_timm(attn_layer="diff"), "DiffAttention"),
        (lambda: make_timm("eva02_tiny_patch14_224"), "Eva.*: it rotates"),
        (lambda: make_timm("vit_relpos_small_patch16_224"), "VisionTransformerRelPos.*: its attention adds a bias"),
        (lambda: make_timm("beit_base_patch16_224"), "Beit.*: its attention adds a bias"),
    ],
)
def test_other_blocks_are_refused_with_the_reason(make, message):
    model = make()
    before = describe(model)
    with pytest.raises(UnsupportedModelError, match=message):
        apply_tome(model, 4)
    assert describe(model) == before


def test_a_classifier_is_not_asked_for_features():
    from tocom_hf.distillation.objectives import find_objective

    with pytest.raises(UnsupportedModelError, match="puts out logits alone"):
        find_objective("features", make("token"))
    assert find_objective("auto", make("token")).name == "logits"
    assert find_objective("auto", make_timm(head=False)).name == "features"
