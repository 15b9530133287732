# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Threads that switch degrees and run the model at once see the weights of one degree, never half of two."""

import copy
import pickle
import threading
import time

import pytest
import torch
from helpers.models import make_model, make_plugins

from tocom_hf import TocomModel
from tocom_hf.merging.patching import set_merging
from tocom_hf.model import tocom_model
from tocom_hf.model.locks import ReadersWriterLock


def compose(model):
    return TocomModel.from_pretrained(model, plugins=make_plugins(model), source_r=0, target_r=4)


@pytest.fixture
def composed(model):
    return compose(model)


@pytest.fixture
def small():
    """For tests that compile or export: each further layer is traced anew and shows nothing new."""
    return compose(make_model(num_hidden_layers=2))


def logits(model, pixel_values):
    with torch.no_grad():
        return model(pixel_values=pixel_values).logits


def run(*targets):
    errors = []

    def guarded(target):
        try:
            target()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(target,), daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"
    assert errors == []


def assert_switches_while_other_runs(switched, running, pixel_values):
    """A switch of one model waits for no forward call of another."""
    handle = running.classifier.register_forward_hook(lambda *_: run(lambda: switched.set_target_r(1)))
    logits(running, pixel_values)
    handle.remove()
    assert switched.target_r == 1


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow, id="compiled in place")])
def test_forward_calls_see_one_degree_while_another_thread_switches(small, pixel_values, compiled):
    composed = small
    expected = []
    for degree in (1, 2, 4):
        composed.set_target_r(degree)
        expected.append(logits(composed, pixel_values))
    if compiled:
        composed.compile(backend="eager", fullgraph=True)
        for degree in (1, 2, 4):
            composed.set_target_r(degree)
            logits(composed, pixel_values)
    stop, seen = threading.Event(), set()

    def switch():
        deadline = time.monotonic() + 60
        rounds = 0
        try:
            # on a busy machine a forward call may need many switches to get in between
            while rounds < 15 or (len(seen) < 2 and time.monotonic() < deadline):
                for degree in (1, 4, 2):
                    composed.set_target_r(degree)
                rounds += 1
        finally:
            stop.set()

    def forward():
        while not stop.is_set():
            found = logits(composed, pixel_values)
            matches = [i for i, result in enumerate(expected) if torch.allclose(found, result, rtol=1e-5, atol=1e-5)]
            assert len(matches) == 1
            seen.update(matches)

    run(switch, forward, forward)
    assert len(seen) > 1


@pytest.mark.parametrize("compiling", [False, True], ids=["", "while another thread compiles"])
def test_a_switch_in_the_middle_of_a_forward_call_waits_for_its_end(composed, pixel_values, compiling, monkeypatch):
    # torch keeps one flag for all threads
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", compiling)
    before, inside, order = logits(composed, pixel_values), threading.Event(), []

    def pause(*_):
        inside.set()
        time.sleep(0.2)

    handles = (
        composed.vit.layers[1].register_forward_hook(pause),
        composed.classifier.register_forward_hook(lambda *_: order.append("forward")),
    )

    def forward():
        assert torch.equal(logits(composed, pixel_values), before)

    def switch():
        inside.wait(30)
        composed.set_target_r(1)
        order.append("switch")

    run(forward, switch)
    for handle in handles:
        handle.remove()
    assert order == ["forward", "switch"]


def test_a_failure_while_weights_are_copied_restores_them(composed, pixel_values, monkeypatch):
    before, weights = logits(composed, pixel_values), copy.deepcopy(composed.state_dict())

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    calls = iter([interrupted, set_merging])
    monkeypatch.setattr(tocom_model, "set_merging", lambda *a, **k: next(calls)(*a, **k))
    with pytest.raises(KeyboardInterrupt):
        composed.set_target_r(1)
    assert composed.target_r == 4
    assert composed.config.tocom["target_r"] == 4
    assert all(torch.equal(value, weights[name]) for name, value in composed.state_dict().items())
    assert torch.equal(logits(composed, pixel_values), before)
    monkeypatch.undo()
    composed.set_target_r(1)


@pytest.mark.parametrize("loaded", [False, True], ids=["a stock model", "a TocomModel"])
def test_a_failure_while_a_model_is_equipped_leaves_it_as_it_was(model, plugins, pixel_values, monkeypatch, loaded):
    if loaded:
        TocomModel.from_pretrained(model, plugins=plugins, source_r=0, target_r=2)
    before, weights, model_class = logits(model, pixel_values), copy.deepcopy(model.state_dict()), type(model)
    config = copy.deepcopy(model.config.to_dict())
    copy_weights, count = tocom_model.copy_weights, iter(range(100))

    def failing(source, target):
        if next(count) == (1 if loaded else 0):
            raise MemoryError
        copy_weights(source, target)

    monkeypatch.setattr(tocom_model, "copy_weights", failing)
    with pytest.raises(MemoryError):
        TocomModel.from_pretrained(model, plugins=make_plugins(model, seed=4), source_r=0, target_r=5)
    assert type(model) is model_class
    assert model.config.to_dict() == config
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model, pixel_values), before)
    assert isinstance(model, TocomModel) == loaded
    if loaded:
        assert (model.source_r, model.target_r) == (0, 2)


def test_a_switch_within_the_own_forward_call_is_refused(composed, pixel_values):
    composed.vit.layers[0].register_forward_hook(lambda *_: composed.set_target_r(1))
    with pytest.raises(RuntimeError, match="within its own forward call"):
        logits(composed, pixel_values)
    assert composed.target_r == 4


def test_nested_calls_and_blocks(composed, pixel_values):
    at = dict.fromkeys((1, 2, 4))
    for degree in at:
        composed.set_target_r(degree)
        at[degree] = logits(composed, pixel_values)
    with composed.at(1):
        assert torch.equal(logits(composed, pixel_values), at[1])
        with composed.at(2):
            assert torch.equal(logits(composed, pixel_values), at[2])
        assert torch.equal(logits(composed, pixel_values), at[1])
    assert torch.equal(logits(composed, pixel_values), at[4])
    nested = []

    def call_again(*_):
        if not nested:
            nested.append(None)
            nested.append(logits(composed, pixel_values))

    handle = composed.classifier.register_forward_hook(call_again)
    logits(composed, pixel_values)
    handle.remove()
    assert torch.equal(nested[1], at[4])


def test_compiled_exported_copied_and_replicated_models(small, pixel_values):
    composed = small
    expected = logits(composed, pixel_values)
    compiled = torch.compile(composed, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, pixel_values), expected)
    for strict in (False, True):
        exported = torch.export.export(composed, (pixel_values,), strict=strict).module()
        torch.testing.assert_close(exported(pixel_values).logits, expected)
    for clone in (copy.deepcopy(composed), pickle.loads(pickle.dumps(composed))):
        assert torch.equal(logits(clone, pixel_values), expected)
        assert_switches_while_other_runs(clone, composed, pixel_values)
    assert torch.equal(logits(composed, pixel_values), expected)
    replica = composed._replicate_for_data_parallel()
    replica._modules, replica._parameters = dict(composed._modules), dict(composed._parameters)
    assert torch.equal(logits(replica, pixel_values), expected)


def test_gradient_checkpointing_under_the_lock(composed, pixel_values):
    composed.train()
    composed(pixel_values=pixel_values, labels=torch.tensor([0, 1, 2])).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in composed.named_parameters()}
    composed.zero_grad()
    composed.gradient_checkpointing_enable()
    composed(pixel_values=pixel_values, labels=torch.tensor([0, 1, 2])).loss.backward()
    for name, parameter in composed.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_a_stream_of_readers_does_not_starve_a_writer():
    lock, stop, written = ReadersWriterLock(), threading.Event(), threading.Event()

    def read():
        while not stop.is_set():
            with lock.reading():
                time.sleep(0.002)

    def write():
        with lock.writing():
            written.set()
        stop.set()

    run(read, read, read, read, write)
    assert written.is_set()


def test_a_writer_is_alone():
    lock, inside = ReadersWriterLock(), []

    def work(way, mark):
        def loop():
            for _ in range(300):
                with way():
                    inside.append(mark)
                    assert mark == "r" or inside == ["w"]
                    assert mark == "w" or "w" not in inside
                    inside.remove(mark)

        return loop

    run(*(work(lock.reading, "r") for _ in range(3)), *(work(lock.writing, "w") for _ in range(2)))


def test_an_exception_releases_the_lock():
    lock = ReadersWriterLock()
    for way in (lock.reading, lock.writing, lock.writing):
        with pytest.raises(KeyboardInterrupt), way():
            raise KeyboardInterrupt
    run(lambda: lock.writing().__enter__())


def test_two_models_do_not_share_locks(plugins, pixel_values):
    one, other = (TocomModel.from_pretrained(make_model(), plugins=plugins, source_r=0, target_r=2) for _ in range(2))
    assert_switches_while_other_runs(other, one, pixel_values)
