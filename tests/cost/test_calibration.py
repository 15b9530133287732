# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
import copy
import dataclasses
import errno
import json
import os
from pathlib import Path

import pytest
import torch
import transformers as hf
from helpers.clock import TokenClock
from helpers.families import COMMON, FAMILIES, clip, dino, encoder_decoder
from helpers.models import make_model, make_plugins, schedule_of
from helpers.pictures import assert_drawn
from transformers.utils import logging

from tocom_hf import (
    ArgumentError,
    BudgetError,
    Calibration,
    CalibrationError,
    DegreeCost,
    DegreeError,
    TocomModel,
    apply_tome,
    calibrate,
    count_flops,
)
from tocom_hf.cost.calibration import logger


def quick(model, **arguments):
    return calibrate(model, **{"seconds": 0, "progress": False, "degrees": [0, 2, 5], **arguments})


def made_up(speedups):
    """A calibration of the test model with round figures: a batch of two takes 100 ms at degree 0."""
    costs = tuple(
        DegreeCost(r, (65, 65 - 4 * r), 8.0 / speed, 100 / speed, 20 * speed, speed) for r, speed in speedups.items()
    )
    # 4 projections of 32 x 32, an MLP of 64, their biases, and two norms
    parameters = 4 * (32 * 32 + 32) + 2 * 32 * 64 + 64 + 32 + 4 * 32
    shape = f"vit with 4 layers of {parameters:,} parameters, hidden size 32, 4 heads, patch 4"
    return Calibration(shape, (3, 32, 32), 2, "a machine", "float32", "sdpa", "2.13.0", 3, costs)


CALIBRATION = made_up({0: 1.0, 1: 1.1, 2: 1.25, 3: 1.2, 4: 1.5, 5: 1.75, 6: 2.0})
OTHER = dataclasses.replace(CALIBRATION, model="vit with 12 layers")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("r", [0, 2, 7, 40])
def test_flops_follow_the_formula(r, attention):
    """Two operations per multiply-add; the MLP sees the tokens that are left."""
    model = make_model(attn_implementation=attention)
    hidden, mlp, tokens, patches = 32, 64, 65, 64
    expected = patches * (3 * 4 * 4) * hidden  # patch embedding
    for _ in range(4):
        merged = min(r, (tokens - 1) // 2)
        left = tokens - merged
        expected += 4 * tokens * hidden * hidden + 2 * tokens * tokens * hidden
        # similarity of A and B tokens, of one head's channels
        expected += ((tokens - 1) // 2) * (tokens // 2) * (hidden // 4) if merged else 0
        expected += 2 * left * hidden * mlp
        tokens = left
    expected += hidden * 5  # classifier
    assert count_flops(model, r) == pytest.approx(2 * expected, rel=0.01)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_every_family_is_measured_and_given_back_as_it_came(family, monkeypatch):
    model = family.make()
    inputs, expected = family.inputs(), family.result(family.make(), family.inputs())
    TokenClock(monkeypatch, model)
    calibration = quick(model)
    assert calibration.degrees == [0, 2, 5]
    assert calibration[5].gflops < calibration[2].gflops < calibration[0].gflops
    entering = 64 + family.protected
    assert calibration[2].tokens == tuple(entering - 2 * layer for layer in range(5))
    for cost in calibration:
        # by this clock one second for each token that enters the last of the four layers
        seconds = entering - 3 * cost.target_r
        assert cost.latency_ms == pytest.approx(1e3 * seconds)
        assert cost.images_per_second == pytest.approx(1 / seconds)
        assert cost.speedup == pytest.approx(entering / seconds)
    assert schedule_of(model) is None
    assert torch.equal(family.result(model, inputs), expected)


def test_a_merging_model_keeps_its_settings_and_modes(model, pixel_values):
    apply_tome(model, [1, 2, 3, 4], proportional_attention=False)
    model.train()
    model.vit.layers[1].eval()
    modes, before = [module.training for module in model.modules()], model(pixel_values).logits
    quick(model)
    assert [module.training for module in model.modules()] == modes
    assert schedule_of(model) == (1, 2, 3, 4)
    assert torch.equal(model(pixel_values).logits, before)


def test_the_degrees_are_those_of_the_plugin_set(model, plugins):
    model = TocomModel.from_pretrained(model, plugins=plugins, source_r=1, target_r=3)
    weights = copy.deepcopy(model.state_dict())
    calibration = calibrate(model, seconds=0, progress=False)
    assert calibration.degrees == list(range(7))
    assert model.target_r == 3
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_without_a_set_the_degrees_are_0_to_16(model):
    assert calibrate(model, seconds=0, progress=False).degrees == list(range(17))


def test_other_image_sizes_and_batches(model):
    calibration = quick(model, image_size=(32, 48), batch_size=3)
    assert calibration.input_size == (3, 32, 48)
    assert calibration[0].tokens[0] == 1 + 8 * 12
    assert calibration[5].images_per_second == pytest.approx(3e3 / calibration[5].latency_ms)
    assert count_flops(model, 0, 48) > count_flops(model, 0)


def test_a_model_with_another_mlp_is_another_model(model, tmp_path):
    known = quick(model, cache_file=tmp_path / "cost.json")
    other = make_model(intermediate_size=128)
    assert quick(other, cache_file=tmp_path / "cost.json")[0].gflops > known[0].gflops
    with pytest.raises(CalibrationError, match="another model"):
        TocomModel.from_pretrained(other, source_r=0, target_speedup=1, calibration=known)


def test_a_wanted_cost_is_one_at_the_size_of_the_images(model):
    """The same number of GFLOPs takes more merging of larger images."""
    wanted = count_flops(model, 2, 48) / 1e9
    assert wanted > count_flops(model, 0) / 1e9
    for image_size, degree in ((None, 0), (48, 2), ((48, 48), 2)):
        tocom = TocomModel.from_pretrained(
            copy.deepcopy(model), source_r=0, plugins=make_plugins(model, max_r=6), target_gflops=wanted,
            target_image_size=image_size,
        )  # fmt: skip
        assert tocom.target_r == degree


def test_a_calibration_for_images_of_another_size_is_refused(model, tmp_path):
    known = quick(model, cache_file=tmp_path / "cost.json")
    settings = {"source_r": 0, "plugins": make_plugins(model, max_r=6), "target_speedup": 0.1}
    assert TocomModel.from_pretrained(model, **settings, calibration=known, target_image_size=32).target_r == 0
    with pytest.raises(CalibrationError, match=r"inputs of 3 x 32 x 32, not for images of 48 x 48\. Call calibrate"):
        TocomModel.from_pretrained(model, **settings, calibration=known, target_image_size=48)
    with pytest.raises(ArgumentError, match="image_size must be an integer or two"):
        TocomModel.from_pretrained(model, **settings, calibration=known, target_image_size="48")
    with pytest.raises(BudgetError, match="target_image_size says what a wanted cost is meant for"):
        TocomModel.from_pretrained(model, source_r=0, target_r=0, target_image_size=48)


def test_class_tokens_alone_are_counted_where_they_alone_are_left(model):
    assert quick(apply_tome(model, 0, class_tokens_only=True))[5].tokens == (65, 60, 55, 50, 1)


def test_the_vision_side_of_clip_is_measured_alone():
    model = hf.CLIPModel(clip()).eval()
    assert quick(model)[5].tokens[-1] == 65 - 20


@pytest.mark.parametrize("config", [hf.ViTConfig(**COMMON), dino(hf.Dinov2Config)], ids=["vit", "dinov2"])
def test_of_a_model_that_describes_images_the_encoder_is_measured_alone(config):
    model = encoder_decoder(config)
    encoder = copy.deepcopy(model.encoder)
    assert [count_flops(model, r) for r in (0, 4)] == [count_flops(encoder, r) for r in (0, 4)]
    assert [cost.tokens for cost in quick(model)] == [cost.tokens for cost in quick(encoder)]
    limit = count_flops(encoder, 4) / 1e9
    tocom = TocomModel.from_pretrained(model, plugins=make_plugins(model), source_r=0, target_gflops=limit)
    assert tocom.target_r == 4


def test_seconds_are_spent_on_rounds(model, monkeypatch):
    TokenClock(monkeypatch, model)
    one_round = 65 + (65 - 3 * 2) + (65 - 3 * 5)  # seconds, at the degrees 0, 2 and 5
    assert quick(model).rounds == 1
    assert quick(model, seconds=2.5 * one_round).rounds == 3


@pytest.mark.parametrize("enabled", [True, False])
def test_the_progress_bar_is_that_of_transformers(model, capsys, enabled):
    was_enabled = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()
    try:
        quick(model, progress=True)
    finally:
        (logging.enable_progress_bar if was_enabled else logging.disable_progress_bar)()
    assert ("measuring 3 degrees: 100%" in capsys.readouterr().err) == enabled


def test_it_moves_to_the_device_and_back(model, monkeypatch):
    devices = []
    monkeypatch.setattr(type(model), "to", lambda self, device: devices.append(str(device)))
    with pytest.raises((RuntimeError, ValueError)):  # the weights did not follow
        quick(model, device="meta")
    assert devices == ["meta", "cpu"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 0}, ArgumentError, "batch_size must be at least 1"),
        ({"image_size": 0}, ArgumentError, "image_size must be at least a patch of 4 x 4, got 0"),
        ({"image_size": (32, 3)}, ArgumentError, "image_size must be at least a patch"),
        ({"image_size": (32, 2.5)}, ArgumentError, "image_size must be an integer or two"),
        ({"image_size": 32.0}, ArgumentError, "image_size must be an integer or two"),
        ({"image_size": (32, 32, 3)}, ArgumentError, "image_size must be an integer or two"),
        ({"degrees": [0, -1]}, DegreeError, "degrees must be a non-negative integer"),
    ],
)
def test_wrong_arguments(model, arguments, error, message):
    with pytest.raises(error, match=message):
        quick(model, **arguments)


@pytest.mark.parametrize(
    ("budget", "degree"),
    [
        ({"target_speedup": 1.2}, 2),
        ({"target_speedup": 0.5}, 0),
        ({"target_speedup": 1.5}, 4),
        ({"target_latency_ms": 60}, 5),
        ({"target_latency_ms": 100}, 0),
        ({"target_gflops": 5.0}, 5),
        ({"target_speedup": 1.2, "degrees": [3, 4]}, 3),
    ],
)
def test_the_smallest_degree_within_the_budget(budget, degree):
    assert CALIBRATION.degree_for(**budget) == degree


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"target_speedup": 2.5}, r"target_speedup=2.5 cannot be reached: the best figure is 2x at target_r=6 .*batch"),
        ({"target_latency_ms": 40}, r"the best figure is 50 ms at target_r=6"),
        ({"target_gflops": 3, "degrees": [0, 4]}, r"the best figure is 5.333 GFLOPs at target_r=4"),
        ({}, "Give one of target_speedup"),
        ({"target_speedup": 2, "target_gflops": 1}, "Give one budget, not target_speedup and target_gflops"),
        ({"target_speedup": 0}, "positive number"),
        ({"target_gflops": float("nan")}, "positive number"),
        ({"target_latency_ms": "fast"}, "positive number"),
        ({"target_speedup": 1, "degrees": [9]}, "None of the degrees"),
    ],
)
def test_budgets_that_cannot_be_met_name_the_best_figure(budget, message):
    with pytest.raises(BudgetError, match=message):
        CALIBRATION.degree_for(**budget)


def test_it_prints_a_row_for_every_degree():
    lines = str(CALIBRATION).splitlines()
    assert len(lines) == 2 + 7
    assert lines[-1].split() == ["6", "41", "4", "50.00", "40.0", "2.00x"]


def test_it_plots(tmp_path):
    figure = CALIBRATION.plot(tmp_path / "plot.png")
    assert_drawn(tmp_path / "plot.png", 600, 400)
    assert list(figure.axes[0].lines[1].get_ydata()) == [cost.speedup for cost in CALIBRATION]


def test_an_unknown_degree_is_named():
    with pytest.raises(DegreeError, match="Degree 9 was not measured; 0, 1, 2"):
        CALIBRATION[9]


def test_json_round_trip(tmp_path):
    CALIBRATION.to_json_file(tmp_path / "new" / "calibration.json")
    assert Calibration.from_json_file(tmp_path / "new" / "calibration.json") == CALIBRATION
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["calibration.json"]


def damaged():
    content = dataclasses.asdict(CALIBRATION)
    yield "", "JSONDecodeError"
    yield "[]", "TypeError"
    yield json.dumps({**content, "costs": []}), "no degree 0"
    yield json.dumps({key: value for key, value in content.items() if key != "device"}), "device"
    yield json.dumps({**content, "costs": [{**content["costs"][0], "speedup": "fast"}]}), "ValueError"
    yield json.dumps({**content, "more": 1}), "more"


@pytest.mark.parametrize(("text", "message"), [*damaged()])
def test_damaged_files_are_refused(tmp_path, text, message):
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(CalibrationError, match=message):
        Calibration.from_json_file(tmp_path / "calibration.json")


def test_a_cache_file_is_reused_until_something_changes(model, tmp_path):
    path = tmp_path / "calibration.json"
    first = quick(model, cache_file=path)
    assert quick(model, cache_file=path) == first
    assert quick(model, cache_file=path, degrees=[2]) == first
    more = quick(model, cache_file=path, degrees=[0, 6])
    assert more.degrees == [0, 6]
    other = quick(model.double(), cache_file=path, degrees=[0, 6])
    assert other.dtype == "float64"
    assert Calibration.from_json_file(path) == other


def test_a_calibration_that_cannot_be_kept_is_used_all_the_same(model, tmp_path, monkeypatch):
    def fill_the_disk(path, text, **arguments):
        path.write_bytes(text[:20].encode())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    said = []
    monkeypatch.setattr(Path, "write_text", fill_the_disk)
    monkeypatch.setattr(logger, "warning", said.append)
    assert quick(model, cache_file=tmp_path / "cost.json").degrees == [0, 2, 5]
    assert said == [f"The calibration cannot be kept in {tmp_path / 'cost.json'}: No space left on device."]
    assert not any(tmp_path.iterdir())
    with pytest.raises(OSError, match="No space left"):
        CALIBRATION.to_json_file(tmp_path / "cost.json")
    assert not any(tmp_path.iterdir())


def load(model, **arguments):
    return TocomModel.from_pretrained(model, plugins=make_plugins(model), source_r=0, **arguments)


def test_from_pretrained_takes_a_budget_instead_of_a_degree(model, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint")
    plugins = make_plugins(model)
    found = TocomModel.from_pretrained(
        tmp_path / "checkpoint", plugins=plugins, source_r=0, target_speedup=1.5, calibration=CALIBRATION
    )
    expected = TocomModel.from_pretrained(tmp_path / "checkpoint", plugins=plugins, source_r=0, target_r=4)
    assert found.target_r == 4
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in found.state_dict().items())
    CALIBRATION.to_json_file(tmp_path / "calibration.json")
    recorded = TocomModel.from_pretrained(found, target_latency_ms=100, calibration=CALIBRATION)
    assert recorded.target_r == 0


def test_a_budget_of_flops_needs_no_calibration(model):
    budget = count_flops(model, 3) / 1e9
    assert load(model, target_gflops=budget).target_r == 3


def test_a_budget_of_time_is_measured_and_kept_in_a_file(model, tmp_path, monkeypatch):
    clock = TokenClock(monkeypatch, model)
    path = tmp_path / "calibration.json"
    # the speed-up at degree r is 65 / (65 - 3 r): 1.16 at degree 3 and 1.23 at degree 4
    assert load(model, target_speedup=1.2, calibration=path).target_r == 4
    measured_until = clock.now
    assert measured_until > 0
    assert TocomModel.from_pretrained(model, target_speedup=1.15, calibration=path).target_r == 3
    assert clock.now == measured_until  # the model has not run again


def test_a_model_without_plugins_has_one_degree(model):
    assert TocomModel.from_pretrained(model, source_r=4, target_gflops=1).target_r == 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target_speedup": 2.5}, BudgetError, "best figure is 2x at target_r=6"),
        ({"target_speedup": 2, "target_r": 3}, BudgetError, "Give target_r or target_speedup, not both"),
        ({"target_speedup": 2, "target_gflops": 3}, BudgetError, "Give one budget"),
        ({"target_speedup": -1}, BudgetError, "positive number"),
        (
            {"target_speedup": 1, "calibration": dataclasses.replace(CALIBRATION, model="vit")},
            CalibrationError,
            "other",
        ),
    ],
)
def test_a_budget_that_fails_leaves_the_model_as_it_was(model, arguments, error, message):
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        load(model, **{"calibration": CALIBRATION, **arguments})
    assert not isinstance(model, TocomModel)
    assert schedule_of(model) is None
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
