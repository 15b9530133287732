# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The Triton kernels against PyTorch, in Triton's interpreter on the CPU.

The interpreter has to be chosen before triton is imported, so `test_kernels.py` runs this file in a process of its own.
By hand: `TRITON_INTERPRET=1 python -m pytest tests/merging/test_triton_kernels.py`.
"""

import os
import types

import pytest
import torch
from helpers.models import make_model

from tocom_hf import apply_tome
from tocom_hf.merging.kernel_check import check_cases, find_mismatch
from tocom_hf.merging.tokens import MergePlan, match_tokens, merge_tokens


if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a process of its own, see test_kernels.py", allow_module_level=True)
pytest.importorskip("triton", minversion="3.9")  # the interpreters of older versions fail with numpy 2.4

from tocom_hf.merging import kernels, layers, triton_kernels


CPU = torch.device("cpu")


def assert_equal_plans(found, expected):
    for name, one, other in zip(expected._fields, found, expected, strict=True):
        assert one.dtype == torch.int64
        assert torch.equal(one, other), name


def random_keys(batch, tokens, heads=3, head_dim=16, dtype=torch.float32, seed=0):
    """As a layer has them: `(batch, tokens, heads, head_dim)`, not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, heads, tokens, head_dim, generator=generator).to(dtype)
    return keys.transpose(1, 2)


@pytest.mark.parametrize("protected", range(6))
@pytest.mark.parametrize("tokens", [7, 8, 33])
def test_plans_are_those_of_pytorch_for_every_degree(tokens, protected):
    keys = random_keys(1, tokens, seed=tokens + protected)
    largest = (tokens - protected) // 2
    for r in range(1, largest + 1, 5 if tokens == 33 else 1):
        found = triton_kernels.plan_merge(keys, r, protected)
        assert_equal_plans(found, match_tokens(keys.mean(2), r, protected))


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "head_dim", "r", "protected"),
    [(3, 197, 12, 64, 16, 1), (2, 131, 1, 5, 64, 2), (1, 260, 2, 80, 100, 0), (2, 66, 2, 130, 20, 5)],
)
def test_plans_of_several_blocks_of_tokens(batch, tokens, heads, head_dim, r, protected):
    keys = random_keys(batch, tokens, heads, head_dim)
    assert_equal_plans(triton_kernels.plan_merge(keys, r, protected), match_tokens(keys.mean(2), r, protected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_plans_in_half_precision(dtype):
    # four heads: their sum is exact in float32, so there is one rounding to compare
    keys = random_keys(2, 65, 4, 32, dtype)
    assert_equal_plans(triton_kernels.plan_merge(keys, 16, 1), match_tokens(keys.mean(2), 16, 1))


@pytest.mark.parametrize("tokens", [6, 67, 150])
def test_ties_merge_the_lower_position_into_the_lower_position(tokens):
    """Entries of plus and minus one: products are exact in any order, and most similarities are equal."""
    generator = torch.Generator().manual_seed(tokens)
    keys = (torch.randint(0, 2, (2, tokens, 1, 4), generator=generator) * 2 - 1).float().expand(-1, -1, 3, -1)
    for protected in (0, 1, 2):
        for r in (1, (tokens - protected) // 4 or 1, (tokens - protected) // 2):
            found = triton_kernels.plan_merge(keys, r, protected)
            assert_equal_plans(found, match_tokens(keys.mean(2), r, protected))


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan"), float("inf")])
def test_keys_that_are_all_alike_lose_no_token(value):
    keys = torch.full((2, 19, 2, 8), value)
    plan = triton_kernels.plan_merge(keys, 6, 1)
    assert_equal_plans(plan, match_tokens(keys.mean(2), 6, 1))


def test_some_keys_that_are_no_numbers_lose_no_token():
    keys = random_keys(2, 35)
    keys[0, 4], keys[1, 9] = float("nan"), float("nan")
    plan = triton_kernels.plan_merge(keys, 12, 1)
    everything = torch.cat([plan.kept, plan.merged], dim=1).sort(dim=1).values
    assert torch.equal(everything, torch.arange(70).view(2, 35))
    assert_equal_plans(plan, match_tokens(keys.mean(2), 12, 1))


def random_states(batch, tokens, hidden, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    residual, branch = (torch.randn(batch, tokens, hidden, generator=generator).to(dtype) for _ in range(2))
    return residual, branch, torch.randint(1, 40, (batch, tokens), generator=generator).float()


def crowded_plan(batch, tokens, r, protected):
    """A plan in which several tokens merge into one: all into three of the B tokens."""
    plan = match_tokens(random_keys(batch, tokens).mean(2), r, protected)
    first_of_b = (torch.arange(batch) + 1).unsqueeze(1) * (tokens - r) - (tokens - protected) // 2
    return plan._replace(into=first_of_b + torch.arange(r) * 2 % 3)


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("with_branch", [True, False])
@pytest.mark.parametrize(("tokens", "r", "protected"), [(7, 3, 0), (22, 1, 5), (33, 16, 1)])
def test_merges_are_those_of_pytorch(tokens, r, protected, with_branch, sized):
    residual, branch, sizes = random_states(2, tokens, 40)
    branch = branch if with_branch else None
    sizes = sizes if sized else None
    plan = crowded_plan(2, tokens, r, protected)
    hidden_states, sizes_out, bias = triton_kernels.carry_out(residual, branch, plan, sizes)
    total = residual if branch is None else residual + branch
    expected, expected_sizes = merge_tokens(total, sizes, plan)
    torch.testing.assert_close(hidden_states, expected, rtol=1e-6, atol=1e-6)
    exact, _ = merge_tokens(total.double(), sizes, plan)
    torch.testing.assert_close(hidden_states.double(), exact, rtol=1e-6, atol=1e-6)
    assert torch.equal(sizes_out, expected_sizes)
    torch.testing.assert_close(bias[:, 0, 0, : tokens - r], expected_sizes.log(), rtol=1e-6, atol=1e-6)
    assert bias.shape[-1] % 8 == 0
    # tokens that take in no other are exact copies
    untouched = expected_sizes == (1 if sizes is None else sizes.flatten()[plan.kept])
    copies = total.flatten(0, 1)[plan.kept]
    assert torch.equal(hidden_states[untouched], copies[untouched])


@pytest.mark.parametrize("dtypes", [("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")], ids=str)
def test_merges_in_half_precision_round_once(dtypes):
    residual, branch, sizes = random_states(1, 21, 24)
    residual, branch = (x.to(getattr(torch, name)) for x, name in zip((residual, branch), dtypes, strict=True))
    plan = crowded_plan(1, 21, 7, 1)
    hidden_states, _, bias = triton_kernels.carry_out(residual, branch, plan, sizes)
    total = residual + branch
    assert hidden_states.dtype == bias.dtype == total.dtype
    exact, _ = merge_tokens(total.double(), sizes, plan)
    # the interpreter cuts bfloat16 off where a GPU rounds, also the sum of the two
    tolerance = torch.finfo(total.dtype).eps * (4 if total.dtype == torch.bfloat16 else 1)
    torch.testing.assert_close(hidden_states.double(), exact, rtol=tolerance, atol=max(tolerance / 8, 1e-6))


def test_inputs_need_not_be_contiguous():
    residual, branch, sizes = random_states(2, 13, 48)
    plan = crowded_plan(2, 13, 4, 1)
    branch = branch[:, :1].expand(-1, 13, -1)
    expected = triton_kernels.carry_out(residual[:, :, ::2].contiguous(), branch[:, :, ::2].contiguous(), plan, sizes)
    spread = torch.stack([sizes, sizes], dim=-1)[..., 0]
    apart = MergePlan(*(torch.stack([index, index], dim=-1)[..., 1] for index in plan))
    found = triton_kernels.carry_out(residual[:, :, ::2], branch[:, :, ::2], apart, spread)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_an_image_does_not_depend_on_its_batch_and_runs_are_alike():
    keys, (residual, branch, sizes) = random_keys(2, 17), random_states(2, 17, 24)

    def run(images):
        plan = triton_kernels.plan_merge(keys[images], 5, 1)
        hidden_states, sizes_out, _ = triton_kernels.carry_out(residual[images], branch[images], plan, sizes[images])
        return *plan, hidden_states, sizes_out

    together, again = run(slice(0, 2)), run(slice(0, 2))
    assert all(torch.equal(one, other) for one, other in zip(together, again, strict=True))
    for image in range(2):
        alone = run(slice(image, image + 1))
        first_rows = [image * 17, image * 17, image * 12, 0, 0]
        for one, other, first_row in zip(together, alone, first_rows, strict=True):
            assert torch.equal(one[image : image + 1] - first_row, other)


def test_the_self_check_passes(monkeypatch):
    # the others are of more tokens, which takes the interpreter a while; all of them run on a GPU
    small = [case for case in check_cases(torch.float32) if case.keys.shape[1] < 80]
    monkeypatch.setattr("tocom_hf.merging.kernel_check.check_cases", lambda dtype: small)
    assert find_mismatch(triton_kernels, CPU, torch.float32) is None


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        ({"plan_merge": lambda *args: swap(triton_kernels.plan_merge(*args))}, "plan differs"),
        ({"carry_out": lambda *args: add(triton_kernels.carry_out(*args), 0)}, "means differ"),
        ({"carry_out": lambda *args: add(triton_kernels.carry_out(*args), 1)}, "sizes differ"),
        ({"carry_out": lambda *args: add(triton_kernels.carry_out(*args), 2)}, "logarithms of sizes differ"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_self_check_finds_faults(broken, expected, monkeypatch):
    # one case shows the fault; all of them take seconds
    first = next(check_cases(torch.float32))
    small = first._replace(keys=first.keys[:1, :13], r=4)
    monkeypatch.setattr("tocom_hf.merging.kernel_check.check_cases", lambda dtype: [small])
    working = {"plan_merge": triton_kernels.plan_merge, "carry_out": triton_kernels.carry_out}
    kernels_to_check = types.SimpleNamespace(**{**working, **broken})
    assert expected in find_mismatch(kernels_to_check, CPU, torch.float32)


def swap(plan):
    return plan._replace(merged=plan.merged.flip(1))


def add(outputs, index):
    outputs[index][0, ..., 0] += 1e-3
    return outputs


def test_the_operators_run_the_kernels():
    keys, (residual, branch, sizes) = random_keys(1, 15), random_states(1, 15, 24)
    plan = MergePlan(*torch.ops.tocom_hf.plan_merge(keys, 6, 1))
    assert_equal_plans(plan, match_tokens(keys.mean(2), 6, 1))
    found = torch.ops.tocom_hf.carry_out(residual, branch, *plan, sizes)
    expected = triton_kernels.carry_out(residual, branch, plan, sizes)
    assert all(torch.equal(one, other) for one, other in zip(found[:2], expected[:2], strict=True))
    # shapes, strides and dtypes of the stand-ins that torch.compile computes with
    samples = [(torch.ops.tocom_hf.plan_merge.default, (keys, 6, 1))]
    carry_out = torch.ops.tocom_hf.carry_out.default
    samples += [(carry_out, (residual, other, *plan, sizes)) for other in (None, branch.bfloat16())]
    for operator, arguments in samples:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_compiled_layer_is_one_graph(monkeypatch):
    """The condition is met by a stand-in: on a CPU the kernels never turn on."""
    monkeypatch.setattr(kernels, "_applies", lambda tensor: True)
    keys, (residual, branch, sizes) = random_keys(1, 15), random_states(1, 15, 24)

    def layer(keys, residual, branch, sizes):
        plan = MergePlan(*torch.ops.tocom_hf.plan_merge(keys, 6, 1))
        return torch.ops.tocom_hf.carry_out(residual, branch, *plan, sizes)[:2]

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = layer(keys, residual, branch, sizes)
    found = compiled(keys, residual, branch, sizes)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("schedule", [6, [5, 0, 7, 2]], ids=str)
def test_a_model_gives_the_same_with_the_kernels(schedule, monkeypatch):
    used = []

    def fused_plan(keys, r, protected):
        used.append("plan")
        return triton_kernels.plan_merge(keys, r, protected)

    def fused_merge(residual, branch, plan, sizes):
        used.append("merge")
        hidden_states, sizes_out, bias = triton_kernels.carry_out(residual, branch, plan, sizes)
        return kernels.FusedMerge(hidden_states, sizes_out, bias[..., : sizes_out.shape[1]])

    model, pixel_values = apply_tome(make_model(), schedule, restore=True), torch.randn(1, 3, 32, 32)
    expected = model(pixel_values).logits
    monkeypatch.setattr(layers, "fused_plan", fused_plan)
    monkeypatch.setattr(layers, "fused_merge", fused_merge)
    torch.testing.assert_close(model(pixel_values).logits, expected, rtol=1e-5, atol=1e-5)
    assert used == ["plan", "merge"] * (4 if schedule == 6 else 3)
