# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Every form of proportional attention against the formula in float64."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.models import make_model
from helpers.operations import Operations
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface

from tocom_hf import UnsupportedModelError
from tocom_hf.merging import attention
from tocom_hf.merging.attention import (
    attend,
    attend_with_score_mod,
    divide_weights,
    extend_heads,
    padded,
    proportional_bias,
    weigh_values,
)


SCALING = 0.25
HEAD_DIM = 16


def make_inputs(dtype=torch.float32, queries=9, tokens=9, head_dim=HEAD_DIM, largest=200):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 3, queries, head_dim, generator=generator).to(dtype)
    key, value = (torch.randn(2, 3, tokens, head_dim, generator=generator).to(dtype) for _ in range(2))
    sizes = torch.randint(1, largest, (2, tokens), generator=generator).float()
    return query, key, value, sizes


def formula(query, key, value, sizes):
    """ToMe, eq. 1, in float64: `(batch, heads, queries, head_dim)`."""
    logits = query.double() @ key.double().transpose(2, 3) * SCALING
    if sizes is not None:
        logits = logits + sizes.double().log()[:, None, None, :]
    return logits.softmax(-1) @ value.double()


def with_bias(query, key, value, sizes):
    bias = proportional_bias(sizes, key.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=SCALING)


def with_extended_heads(query, key, value, sizes):
    output = F.scaled_dot_product_attention(*extend_heads(query, key, value, sizes, SCALING), scale=SCALING)
    assert not output[..., key.shape[-1] :].any()
    return output[..., : key.shape[-1]]


def with_weighed_values(query, key, value, sizes):
    output = F.scaled_dot_product_attention(query, key, weigh_values(value, sizes), scale=SCALING)
    return divide_weights(output, key.shape[-1])


def with_score_mod(query, key, value, sizes):
    return attend_with_score_mod(query, key, value, sizes, SCALING, flex_attention).transpose(1, 2)


FORMS = [with_bias, with_extended_heads, with_weighed_values, with_score_mod]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("queries", [9, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_is_the_formula(form, dtype, tolerance, queries):
    inputs = make_inputs(dtype, queries)
    torch.testing.assert_close(form(*inputs).double(), formula(*inputs), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_without_a_bias_half_precision_is_more_accurate_than_with_one(dtype):
    """The logarithm of a size is rounded to the dtype of the mask, which the forms without a mask avoid."""
    inputs = make_inputs(dtype, queries=64, tokens=64, head_dim=64)

    def error(form):
        return (form(*inputs).double() - formula(*inputs)).square().mean().sqrt()

    dense = F.scaled_dot_product_attention(*inputs[:3], scale=SCALING).double()
    dense_error = (dense - formula(*inputs[:3], None)).square().mean().sqrt()
    assert error(with_extended_heads) < 1.2 * dense_error
    assert error(with_weighed_values) < 2.5 * dense_error
    assert error(with_weighed_values) < 0.9 * error(with_bias)


def test_values_times_sizes_stay_within_the_range_of_float16():
    query, key, value, _ = make_inputs(torch.float16)
    value, sizes = value * 4_000, torch.full((2, 9), 190.0)
    found = with_weighed_values(query, key, value, sizes)
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), formula(query, key, value, sizes), rtol=5e-3, atol=20)


@pytest.mark.parametrize(("head_dim", "width"), [(16, 24), (15, 16), (20, 24), (64, 72)])
def test_weighed_values_are_as_wide_as_kernels_like_it(head_dim, width):
    inputs = make_inputs(head_dim=head_dim)
    assert weigh_values(inputs[2], inputs[3]).shape[-1] == width
    torch.testing.assert_close(with_weighed_values(*inputs).double(), formula(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [8, 9, 197])
def test_rows_of_the_bias_are_aligned_off_the_cpu(tokens):
    sizes = torch.ones(4, tokens, device="meta")
    bias = proportional_bias(sizes, torch.bfloat16)
    assert bias.shape == (4, 1, 1, tokens)
    assert bias.dtype == torch.bfloat16
    assert all(stride % 8 == 0 for stride in bias.stride()[:-1])
    assert bias.stride(-1) == 1
    assert padded(tokens) - tokens < 8


def make_module(implementation="sdpa"):
    model = make_model()
    module = model.vit.layers[0].attention
    module.config._attn_implementation_internal = implementation
    module.stock_class = type(module)
    module.head_dim = HEAD_DIM
    return module


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention", "flash_stand_in"])
@pytest.mark.parametrize("sized", [True, False])
def test_attend_honours_the_implementation(implementation, sized, monkeypatch):
    def kernel(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        assert attention_mask is None
        output = F.scaled_dot_product_attention(query, key, value, scale=scaling)
        return output.transpose(1, 2), None

    # without sizes flex_attention is transformers' own, which compiles
    stand_ins = ["flash_stand_in"] if sized else ["flash_stand_in", "flex_attention"]
    for name in stand_ins:
        monkeypatch.setitem(AttentionInterface._global_mapping, name, kernel)
    query, key, value, sizes = make_inputs()
    sizes = sizes if sized else None
    module = make_module(implementation)
    output, weights = attend(module, query, key, value, sizes, scaling=SCALING)
    expected = formula(query, key, value, sizes).transpose(1, 2)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    assert (weights is not None) == (implementation == "eager")


@torch.no_grad()
def test_eager_tells_the_weights_of_the_formula():
    query, key, value, sizes = make_inputs()
    _, weights = attend(make_module("eager"), query, key, value, sizes, scaling=SCALING, output_attentions=True)
    torch.testing.assert_close(
        weights.double() @ value.double(), formula(query, key, value, sizes), rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_on_a_cpu_sizes_cost_one_operator_more():
    query, key, value, sizes = make_inputs()
    module, counted = make_module(), {}
    for name, given in (("dense", None), ("sized", sizes)):
        with Operations() as operators:
            attend(module, query, key, value, given, scaling=SCALING)
        counted[name] = operators.names
    assert counted["sized"] == ["log", *counted["dense"]]
    with Operations() as operators:
        bias = proportional_bias(sizes, torch.float32)
        attend(module, query, key, value, sizes, scaling=SCALING, bias=bias)
    assert operators.names == counted["sized"]


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_bias_in_another_dtype_than_the_keys_is_made_anew(implementation):
    """Under autocast hidden states, which the bias was made for, are float32, and keys are not."""
    query, key, value, sizes = make_inputs(torch.bfloat16)
    wrong = torch.full((2, 1, 1, 9), float("nan"))
    output, _ = attend(make_module(implementation), query, key, value, sizes, scaling=SCALING, bias=wrong)
    expected = formula(query, key, value, sizes).transpose(1, 2)
    torch.testing.assert_close(output.double(), expected, rtol=3e-2, atol=3e-2)


def test_an_implementation_that_somebody_registered_as_sdpa_is_called(monkeypatch):
    called = []

    def own(module, query, key, value, attention_mask, **kwargs):
        called.append(attention_mask.shape)
        return value.transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", own)
    query, key, value, sizes = make_inputs()
    output, _ = attend(make_module(), query, key, value, sizes, scaling=SCALING)
    assert called == [(2, 1, 1, 9)]
    assert torch.equal(output, value.transpose(1, 2))


def test_sdpa_drops_out_and_has_gradients():
    query, key, value, sizes = (tensor.requires_grad_() for tensor in make_inputs())
    torch.manual_seed(0)
    output, _ = attend(make_module(), query, key, value, sizes.detach(), scaling=SCALING, dropout=0.5)
    output.sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (query, key, value))
    assert not torch.allclose(output.double(), formula(query, key, value, sizes).transpose(1, 2))


def test_flex_attention_trains_on_a_cpu():
    query, key, value, sizes = (tensor.requires_grad_() for tensor in make_inputs())
    output, _ = attend(make_module("flex_attention"), query, key, value, sizes.detach(), scaling=SCALING)
    (found,) = torch.autograd.grad(output.sum(), key)
    (expected,) = torch.autograd.grad(formula(query, key, value, sizes.detach()).sum(), key)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_flex_attention_refuses_dropout_off_the_cpu():
    query, key, value, sizes = (tensor.to("meta") for tensor in make_inputs())
    with pytest.raises(UnsupportedModelError, match="attention_dropout"):
        attend(make_module("flex_attention"), query, key, value, sizes, scaling=SCALING, dropout=0.1)


@torch.no_grad()
def test_attend_compiles_as_one_graph():
    torch.compiler.reset()
    module, inputs = make_module(), make_inputs()

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(*tensors):
        return attend(module, *tensors, scaling=SCALING)[0]

    torch.testing.assert_close(compiled(*inputs).transpose(1, 2).double(), formula(*inputs), rtol=1e-5, atol=1e-5)


# -- the choice of a kernel on GPUs, on stand-ins for their tensors -------------------------------------------------


def on_gpu(dtype=torch.bfloat16, tokens=197, head_dim=64, requires_grad=False):
    shape = (8, 12, tokens, head_dim)
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=shape, requires_grad=requires_grad)


@pytest.mark.parametrize(
    ("changes", "dropout", "expected"),
    [
        ({}, 0.0, True),
        ({"dtype": torch.float16}, 0.0, True),
        ({"dtype": torch.float32}, 0.0, False),
        ({"tokens": 577}, 0.0, False),
        ({"head_dim": 20}, 0.0, False),
        ({"requires_grad": True}, 0.0, False),
        ({}, 0.1, False),
    ],
    ids=str,
)
def test_when_the_memory_efficient_kernel_is_chosen(changes, dropout, expected, monkeypatch):
    monkeypatch.setattr(attention, "_chooses_cudnn", lambda device: True)
    tensor = on_gpu(**changes)
    assert attention.prefers_efficient(tensor, tensor, tensor, dropout) is expected
    monkeypatch.setattr(attention, "_chooses_cudnn", lambda device: False)
    assert attention.prefers_efficient(tensor, tensor, tensor, dropout) is False


@pytest.mark.parametrize(
    ("hip", "capability", "cudnn", "efficient", "expected"),
    [
        (None, (9, 0), True, True, True),
        (None, (10, 0), True, True, True),
        (None, (8, 0), True, True, False),
        ("6.4", (9, 4), True, True, False),
        (None, (9, 0), False, True, False),
        (None, (9, 0), True, False, False),
    ],
)
def test_on_which_gpus(hip, capability, cudnn, efficient, expected, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: cudnn)
    monkeypatch.setattr(torch.backends.cuda, "mem_efficient_sdp_enabled", lambda: efficient)
    assert attention._chooses_cudnn(torch.device("cuda", 0)) is expected


def test_the_memory_efficient_kernel_gets_the_bias_as_it_is_stored():
    """On the meta device, where the operator has shapes but computes nothing."""
    query, key, value, sizes = (tensor.to("meta") for tensor in make_inputs(torch.bfloat16, queries=13, tokens=13))
    bias = proportional_bias(sizes, torch.bfloat16)
    with Operations() as operators:
        output = attention.attend_efficiently(query, key, value, bias, SCALING)
    assert operators.names == ["_scaled_dot_product_efficient_attention"]
    assert output.shape == (2, 13, 3, HEAD_DIM)
    assert output.is_contiguous()
