# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Every family, every way to run it. Adding a family is one row in `families.py`."""

import copy
import functools
import pickle

import pytest
import torch
from helpers import reference
from helpers.concurrency import replicate, run_in_threads
from helpers.families import FAMILIES, SIMILAR, NaflexFamily
from helpers.models import schedule_of
from transformers import AttentionInterface, AttentionMaskInterface

from tocom_hf import apply_tome, remove_tome
from tocom_hf.merging.backbones import find_backbone


every_family = pytest.mark.parametrize("family", [*FAMILIES, *SIMILAR], ids=str)
# of each way to find positions, to project, to hand the state of a call to layers, and to restore
DIFFERENT = (
    "ViTForImageClassification", "DINOv3ViTModel", "BlipVisionModel", "VideoMAEForVideoClassification",
)  # fmt: skip
tracing_is_slow = pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family in FAMILIES and str(family) in DIFFERENT else pytest.mark.slow)
        for family in [*FAMILIES, *SIMILAR]
    ],
    ids=str,
)
each_kind = pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(family, marks=pytest.mark.slow) for family in SIMILAR)], ids=str
)
SCHEDULES = [5, 40, [0, 7, 0, 3], (6, -1.0)]


def entering_tokens(layers, model, inputs):
    """The tokens that enter the first layer."""
    captured = []
    handle = layers[0].register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    model(**inputs)
    handle.remove()
    return captured[0]


def leaving_tokens(layers, model, inputs):
    """The tokens that leave the last layer, in front of the norm behind it."""
    captured = []
    handle = layers[-1].register_forward_hook(lambda module, args, output: captured.append(output))
    model(**inputs)
    handle.remove()
    return captured[0][0] if isinstance(captured[0], tuple) else captured[0]


@pytest.mark.parametrize(
    ("family", "r"),
    [
        # the reference is slow: one schedule for what is like another family
        pytest.param(family, r, id=f"{r}-{family}", marks=() if family in FAMILIES or r == 5 else pytest.mark.slow)
        for family in [*FAMILIES, *SIMILAR]
        for r in SCHEDULES
    ],
)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_layers_equal_the_slow_reference(family, r, implementation):
    model = family.make().double()
    if implementation == "sdpa" and not model._supports_sdpa:
        pytest.skip("transformers does not offer it")
    model.set_attn_implementation(implementation)
    inputs = family.inputs_as(torch.float64, batch=2)
    layers = model.get_submodule(family.layers)
    with torch.no_grad():
        tokens = entering_tokens(layers, model, inputs)
        apply_tome(model, r)
        found = leaving_tokens(layers, model, inputs)
        schedule = schedule_of(model)
        remove_tome(model)
        expected, groups = reference.hidden_states(
            layers,
            tokens,
            schedule,
            family.protected,
            family.names,
            angles_of=family.angles_of,
            turn=family.turn,
        )
    if found.shape != expected.shape:
        expected = reference.restore(expected, groups)
    # the softmax of eager attention is in float32, whatever the dtype of the model
    tolerance = 5e-5 if implementation == "eager" and family in SIMILAR else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@each_kind
def test_flash_attention_gets_no_mask_and_the_same_result(family):
    """Flash kernels take no bias. A stand-in that insists on it shows what they would be given."""

    def kernel(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        assert attention_mask is None
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling)
        return output.transpose(1, 2), None

    model, inputs = apply_tome(family.make(), 6), family.inputs()
    expected = family.result(model, inputs)
    AttentionInterface.register("flash_stand_in", kernel)
    AttentionMaskInterface.register("flash_stand_in", lambda *args, **kwargs: None)
    # set_attn_implementation would look for a kernel of that name on the Hub
    find_backbone(model).module.config._attn_implementation_internal = "flash_stand_in"
    torch.testing.assert_close(family.result(model, inputs), expected, rtol=1e-4, atol=1e-5)


@each_kind
def test_flex_attention_gives_the_same_result(family, monkeypatch):
    """The first layer has no sizes yet and is transformers' own; a stand-in spares the test its compilation."""

    def kernel(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        assert attention_mask is None
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling)
        return output.transpose(1, 2), None

    kernel.__module__ = "transformers.integrations.flex_attention"
    model, inputs = apply_tome(family.make(), 6), family.inputs()
    expected = family.result(model, inputs)
    monkeypatch.setitem(AttentionInterface._global_mapping, "flex_attention", kernel)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "flex_attention", lambda *args, **kwargs: None)
    find_backbone(model).module.config._attn_implementation_internal = "flex_attention"
    torch.testing.assert_close(family.result(model, inputs), expected, rtol=1e-4, atol=1e-5)


@every_family
def test_degree_zero_is_the_untouched_model_bit_for_bit(family):
    model, inputs = family.make(), family.inputs()
    expected = family.result(model, inputs)
    assert torch.equal(family.result(apply_tome(model, 0), inputs), expected)
    assert not torch.equal(family.result(apply_tome(model, 9), inputs), expected)
    assert torch.equal(family.result(remove_tome(model), inputs), expected)


@every_family
def test_duplicates_merge_without_a_trace(family):
    """Groups of four identical tokens: merging them is exact, so every head must give what the dense model gives."""
    if family.angles_of is not None or family.turn is not None:
        pytest.skip("where they turn by their positions, tokens are not identical")
    model, inputs = family.make(), family.inputs()
    layers = model.get_submodule(family.layers)
    protected = family.protected

    def duplicate(module, args):
        tokens = args[0].clone()
        first = torch.arange(protected, tokens.shape[1] - 3, 4)
        for offset in range(1, 4):
            tokens[:, first + offset] = tokens[:, first]
        return (tokens, *args[1:])

    layers[0].register_forward_pre_hook(duplicate)
    dense = family.result(model, inputs)
    merged = family.result(apply_tome(model, [32, 16, 0, 0]), inputs)
    torch.testing.assert_close(merged, dense, rtol=1e-4, atol=1e-4)


@every_family
def test_restored_outputs_keep_their_shape(family):
    model, inputs = family.make(), family.inputs()
    dense = model(**inputs, output_hidden_states=True).hidden_states[-1]
    apply_tome(model, 7, restore=True)
    assert model(**inputs, output_hidden_states=True).hidden_states[-1].shape == dense.shape


@every_family
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(family, use_reentrant):
    if not family.model_class.supports_gradient_checkpointing:
        pytest.skip("the model has no gradient checkpointing")
    if use_reentrant and str(family) == "MLCDVisionModel":
        pytest.skip("its learned positions reach layers in a list, which reentrant checkpointing does not look into")

    def gradients(checkpointing):
        model = apply_tome(family.make(), 6).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        getattr(model(**family.inputs()), family.output).square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients(False), gradients(True)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


@each_kind
@pytest.mark.parametrize("copies", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_give_the_same(family, copies):
    if copies is not copy.deepcopy and not family.pickles:
        pytest.skip("cannot be pickled without merging either")
    model, inputs = apply_tome(family.make(), 6), family.inputs()
    assert torch.equal(family.result(copies(model), inputs), family.result(model, inputs))


@each_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs(family, dtype):
    model = apply_tome(family.make(), 6).to(dtype)
    result = family.result(model, family.inputs_as(dtype))
    assert result.dtype == dtype
    assert result.isfinite().all()


@each_kind
def test_autocast_runs(family):
    model = apply_tome(family.make(), 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert family.result(model, family.inputs()).isfinite().all()


@each_kind
def test_an_input_does_not_depend_on_its_batch(family):
    model = apply_tome(family.make().double(), 6)
    inputs = family.inputs_as(torch.float64)
    together = family.result(model, inputs)
    alone = [family.result(model, {name: value[i : i + 1] for name, value in inputs.items()}) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-9, atol=1e-9)


@tracing_is_slow
def test_compiles_as_one_graph_and_once(family):
    torch.compiler.reset()
    # a layer without sizes, one that merges nothing, and one with sizes that does
    model, inputs = apply_tome(family.make(layers=3), [6, 0, 5]), family.inputs()
    # the eager backend shows graph breaks and recompilations as any other, without waiting for a compiler
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(family.result(compiled, inputs), family.result(model, inputs), rtol=1e-5, atol=1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        other = family.inputs(seed=8)
        torch.testing.assert_close(family.result(compiled, other), family.result(model, other), rtol=1e-5, atol=1e-5)


@tracing_is_slow
def test_exports_with_a_dynamic_batch(family):
    if isinstance(family, NaflexFamily):
        pytest.skip("transformers resizes the positions of one image after another, for a fixed number of images")
    # one layer without sizes and one with them
    model, inputs = apply_tome(family.make(layers=2), 6), family.inputs()
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {name: {0: batch} for name in inputs}
    with torch.no_grad():
        exported = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False).module()
    other = family.inputs(batch=5)
    torch.testing.assert_close(family.result(exported, other), family.result(model, other), rtol=1e-5, atol=1e-5)


@each_kind
def test_threads_do_not_disturb_each_other(family):
    model = apply_tome(family.make(), 6)
    batches = [family.inputs(batch=2, seed=seed) for seed in range(6)]
    found = run_in_threads([functools.partial(family.result, model, batch) for batch in batches])
    for result, batch in zip(found, batches, strict=True):
        torch.testing.assert_close(result, family.result(model, batch), rtol=1e-5, atol=1e-6)


@each_kind
def test_replicas_of_data_parallel(family):
    model = apply_tome(family.make(), 6)
    batches = [family.inputs(batch=2, seed=seed) for seed in range(2)]
    replicas = [replicate(model) for _ in batches]
    calls = [functools.partial(family.result, *pair) for pair in zip(replicas, batches, strict=True)]
    for result, batch in zip(run_in_threads(calls), batches, strict=True):
        torch.testing.assert_close(result, family.result(model, batch), rtol=1e-5, atol=1e-6)
