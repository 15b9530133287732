# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""When the kernels of a GPU turn on, with stand-ins for them; and the kernels themselves, in a process of its own."""

import importlib.metadata
import importlib.util
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.paths import ROOT
from packaging.version import Version

from tocom_hf import ArgumentError
from tocom_hf.merging import kernels
from tocom_hf.merging.attention import padded
from tocom_hf.merging.kernel_check import check_cases, find_mismatch
from tocom_hf.merging.tokens import MergePlan, match_tokens, merge_tokens


GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def described(monkeypatch):
    monkeypatch.delenv("TOCOM_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "describe_device", lambda device: "A GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(kernels.logger, "propagate", True)
    caplog.set_level(logging.INFO)
    caplog.set_level(logging.INFO, logger=kernels.logger.name)
    return caplog


class Checks:
    """A self-check with a given result, that counts how often it runs."""

    def __init__(self, result=None):
        self.result = result
        self.calls = []

    def __call__(self, module, device, dtype):
        self.calls.append((device, dtype))
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def test_kernels_that_pass_are_checked_once_for_each_device_and_dtype(log):
    check = Checks()
    switch = kernels.KernelSwitch(SimpleNamespace, check)
    for _ in range(3):
        assert switch.is_on(GPU, torch.float32)
        assert switch.is_on(GPU, torch.bfloat16)
        assert switch.is_on(torch.device("cuda", 1), torch.float32)
    assert check.calls == [(GPU, torch.float32), (GPU, torch.bfloat16), (torch.device("cuda", 1), torch.float32)]
    assert "their results agree with PyTorch's" in log.text
    assert not [record for record in log.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ("their plan differs from PyTorch's (ties: merged)", "their plan differs from PyTorch's (ties: merged)"),
        (RuntimeError("no C compiler"), "their self-check failed with RuntimeError: no C compiler"),
    ],
    ids=["wrong", "raises"],
)
def test_kernels_that_fail_stay_off_and_warn_once(log, result, reason):
    check = Checks(result)
    switch = kernels.KernelSwitch(SimpleNamespace, check)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        assert not switch.is_on(GPU, dtype)
    assert len(check.calls) == 2
    warnings = [record.getMessage() for record in log.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert f"A GPU (cuda:0) instead of its Triton kernels, because {reason}" in warnings[0]
    assert "TOCOM_KERNELS=0" in warnings[0]


def test_without_triton_they_stay_off(log):
    def load():
        raise ModuleNotFoundError("No module named 'triton'")

    assert not kernels.KernelSwitch(load, Checks()).is_on(GPU, torch.float32)
    assert "the package triton cannot be imported" in log.text


def test_the_environment_turns_them_off(monkeypatch, log):
    monkeypatch.setenv("TOCOM_KERNELS", "0")
    check = Checks()
    assert not kernels.KernelSwitch(SimpleNamespace, check).is_on(GPU, torch.float32)
    assert check.calls == []
    assert log.text == ""


def test_another_value_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("TOCOM_KERNELS", "off")
    with pytest.raises(ArgumentError, match=r"TOCOM_KERNELS is 'off'\. Set it to 0"):
        kernels.KernelSwitch(SimpleNamespace, Checks()).is_on(GPU, torch.float32)


def test_threads_that_ask_at_once_check_once():
    check, barrier = Checks(), threading.Barrier(4)
    switch, answers = kernels.KernelSwitch(SimpleNamespace, check), []

    def ask():
        barrier.wait()
        answers.append(switch.is_on(GPU, torch.float32))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 4
    assert len(check.calls) == 1


def test_within_a_capture_of_cuda_graphs_nothing_is_checked(monkeypatch):
    check = Checks()
    monkeypatch.setattr(kernels, "SWITCH", kernels.KernelSwitch(SimpleNamespace, check))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not kernels._is_on(GPU, torch.float32)
    assert check.calls == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert kernels._is_on(GPU, torch.float32)


def test_on_a_cpu_they_are_never_asked_for(monkeypatch):
    monkeypatch.setattr(kernels, "SWITCH", None)
    keys, residual = torch.randn(1, 9, 2, 4), torch.randn(1, 9, 8)
    assert kernels.fused_plan(keys, 2, 1) is None
    assert kernels.fused_merge(residual, residual, match_tokens(keys.mean(2), 2, 1), None) is None


def on_gpu(*shape, dtype=torch.float32, requires_grad=False):
    return SimpleNamespace(device=GPU, shape=shape, dtype=dtype, requires_grad=requires_grad, detach=lambda: None)


PLAN = MergePlan(None, None, None)


@pytest.mark.parametrize(
    ("keys", "applies"),
    [
        (on_gpu(1, 197, 12, 64), True),
        (on_gpu(1, 197, 12, 64, dtype=torch.float16), True),
        (on_gpu(1, 197, 12, 64, requires_grad=True), True),  # a plan has no gradient
        (on_gpu(1, 4096, 12, 256), True),
        (on_gpu(1, 4097, 12, 64), False),
        (on_gpu(1, 197, 12, 257), False),
        (on_gpu(1, 197, 12, 64, dtype=torch.float64), False),
    ],
)
def test_which_plans_the_kernel_makes(keys, applies, monkeypatch):
    monkeypatch.setattr(kernels, "SWITCH", kernels.KernelSwitch(SimpleNamespace, Checks()))
    operators = SimpleNamespace(plan_merge=lambda keys, r, protected: (1, 2, 3))
    monkeypatch.setattr(torch.ops, "tocom_hf", operators)
    assert kernels.fused_plan(keys, 8, 1) == (MergePlan(1, 2, 3) if applies else None)


@pytest.mark.parametrize(
    ("residual", "branch", "applies"),
    [
        (on_gpu(1, 197, 768), on_gpu(1, 197, 768), True),
        (on_gpu(1, 197, 768), None, True),
        (on_gpu(1, 197, 768), on_gpu(1, 197, 768, dtype=torch.bfloat16), True),
        (on_gpu(1, 4097, 768), None, False),
        (on_gpu(1, 197, 8193), None, False),
        (on_gpu(1, 197, 768, requires_grad=True), None, False),
        (on_gpu(1, 197, 768), on_gpu(1, 197, 768, requires_grad=True), False),
        (on_gpu(1, 197, 768), on_gpu(1, 197, 768, dtype=torch.float64), False),
        (on_gpu(1, 197, 768, dtype=torch.float64), None, False),
    ],
)
def test_which_merges_the_kernel_makes(residual, branch, applies, monkeypatch):
    monkeypatch.setattr(kernels, "SWITCH", kernels.KernelSwitch(SimpleNamespace, Checks()))
    outputs = torch.ones(1, 13, 8), torch.ones(1, 13), torch.ones(1, 1, 1, padded(13))
    monkeypatch.setattr(torch.ops, "tocom_hf", SimpleNamespace(carry_out=lambda *args: outputs))
    found = kernels.fused_merge(residual, branch, PLAN, None)
    assert (found is not None) == applies
    if found is not None:
        assert found.bias.shape == (1, 1, 1, 13)
        with torch.no_grad():
            assert kernels.fused_merge(on_gpu(1, 197, 768, requires_grad=True), None, PLAN, None) is not None


def test_traced_and_exported_programs_get_none(monkeypatch):
    monkeypatch.setattr(kernels, "SWITCH", kernels.KernelSwitch(SimpleNamespace, Checks()))
    assert kernels._applies(on_gpu(1))
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_exporting", lambda: True)
        assert not kernels._applies(on_gpu(1))
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    assert not kernels._applies(on_gpu(1))


def test_the_switch_is_a_constant_of_a_compiled_graph(monkeypatch):
    torch.compiler.reset()
    check = Checks()
    monkeypatch.setattr(kernels, "SWITCH", kernels.KernelSwitch(SimpleNamespace, check))

    @torch.compile(fullgraph=True, backend="eager")
    def layer(x):
        return x + 1 if kernels._is_on(GPU, torch.float32) else x

    for _ in range(2):
        assert layer(torch.zeros(2)).tolist() == [1, 1]
    assert check.calls == [(GPU, torch.float32)]


def test_a_model_on_a_cpu_compiles_through_the_questions():
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def layer(keys, residual):
        plan = kernels.fused_plan(keys, 2, 1)
        if plan is None:
            plan = match_tokens(keys.mean(2), 2, 1)
        fused = kernels.fused_merge(residual, None, plan, None)
        return merge_tokens(residual, None, plan)[0] if fused is None else fused.hidden_states

    assert layer(torch.randn(2, 9, 2, 4), torch.randn(2, 9, 8)).shape == (2, 7, 8)


def test_the_questions_of_a_gpu_compile_as_one_graph(monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(kernels, "SWITCH", kernels.KernelSwitch(SimpleNamespace, Checks()))

    @torch.compile(fullgraph=True, backend="eager")
    def layer(x):
        return x + 1 if kernels._applies(x) else x

    assert layer(torch.zeros(2)).tolist() == [1, 1]


class Operators(torch.nn.Module):
    """What a layer does on a GPU."""

    def forward(self, keys, residual, sizes):
        plan = torch.ops.tocom_hf.plan_merge(keys, 3, 1)
        return torch.ops.tocom_hf.carry_out(residual, None, *plan, sizes)


def test_each_kernel_is_one_operator_of_a_graph():
    """Without triton: the stand-ins of the operators have shapes, but compute nothing."""
    inputs = torch.randn(2, 13, 2, 4), torch.randn(2, 13, 8, dtype=torch.float16), torch.ones(2, 13)
    exported = torch.export.export(Operators(), inputs)
    targets = [str(node.target) for node in exported.graph.nodes if str(node.target).startswith("tocom_hf")]
    assert targets == ["tocom_hf.plan_merge.default", "tocom_hf.carry_out.default"]
    hidden_states, sizes, bias = (node.meta["val"] for node in exported.graph.output_node().args[0])
    assert (hidden_states.shape, hidden_states.dtype) == ((2, 10, 8), torch.float16)
    assert (sizes.shape, sizes.dtype) == ((2, 10), torch.float32)
    assert (bias.shape, bias.dtype) == ((2, 1, 1, 16), torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_self_check_accepts_pytorch_itself(dtype):
    """So its tolerances fit each dtype, and none of its random keys are nearly tied."""

    def plan_merge(keys, r, protected):
        return match_tokens(keys.mean(2), r, protected)

    def carry_out(residual, branch, plan, sizes):
        hidden_states, sizes_out = merge_tokens((residual + branch).double(), sizes, plan)
        batch, tokens_out = sizes_out.shape
        logs = torch.full((batch, 1, 1, padded(tokens_out)), float("nan"), dtype=residual.dtype)
        logs[..., :tokens_out] = sizes_out.log()[:, None, None]
        return hidden_states.to(residual.dtype), sizes_out, logs

    assert find_mismatch(SimpleNamespace(plan_merge=plan_merge, carry_out=carry_out), CPU, dtype) is None
    assert len(list(check_cases(dtype))) == 4


def require_triton():
    """Skip the test without a triton whose interpreter works with numpy 2.4."""
    if importlib.util.find_spec("triton") is None or Version(importlib.metadata.version("triton")) < Version("3.9"):
        pytest.skip("triton 3.9 is not installed")


def run_apart(*arguments, **environment):
    """Run Python in a process of its own, where triton has not been imported yet."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_kernels_in_tritons_interpreter():
    """The interpreter replaces the compiler for a whole process."""
    require_triton()
    tests = Path(__file__).with_name("test_triton_kernels.py")
    finished = run_apart("-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", tests, TRITON_INTERPRET="1")
    assert finished.returncode == 0, finished.stdout
    assert "passed" in finished.stdout


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_gpus_that_are_not_here(capability, tmp_path):
    """The interpreter takes what the compiler refuses. Compiling needs no GPU."""
    require_triton()
    tests = Path(__file__).parents[1]
    python_path = os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])
    finished = run_apart(
        "-m", "helpers.compile_kernels", capability, PYTHONPATH=python_path, TRITON_CACHE_DIR=str(tmp_path)
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == ["_plan_kernel"] * 4 + ["_merge_kernel"] * 4
