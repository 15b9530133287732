# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""A distillation gives one result whatever the hardware, and never loses work."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers.distillation import Noise
from helpers.fork_server import ranks
from helpers.models import make_model
from helpers.paths import ROOT
from PIL import Image
from safetensors.torch import load_file

from tocom_hf.distillation.distill import DistillationArguments, distill, hold_out
from tocom_hf.distillation.objectives import OBJECTIVES
from tocom_hf.errors import ArgumentError, CheckpointError, DatasetError, DistillationError, DistillationInterrupted


WORKER = "helpers.distill_worker:main"
# everything random that there is: dropout, crops, RandAugment, erasing, mixing
RECIPE = {
    "max_r": 4, "max_steps": 8, "per_device_train_batch_size": 8, "learning_rate": 0.3, "lora_dropout": 0.1,
    "randaugment_num_ops": 2, "random_erasing": 0.25, "mixup": 0.8, "cutmix": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """52 images with some structure, as a folder of two parquet files."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(52, 3, 6, 6, generator=generator)
    pixels = (torch.nn.functional.interpolate(coarse, (40, 36), mode="bicubic").clamp(0, 1) * 255).byte()
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    for shard in (0, 1):
        data = datasets.Dataset.from_dict({"image": pictures[26 * shard : 26 * shard + 26]})
        data.cast_column("image", datasets.Image()).to_parquet(folder / f"train-{shard}.parquet")
    return str(folder)


def settings_of(tmp_path, name, images, **settings):
    """The settings of a worker, and the folder that its plugin set goes to."""
    plugins = tmp_path / name
    arguments = {**RECIPE, **settings.pop("arguments", {})}
    fixed = {"images": images, "plugins": str(plugins), "cache": str(tmp_path / "cache"), "arguments": arguments}
    return {**fixed, **settings}, plugins


@pytest.fixture(scope="module")
def run(fork_server):
    """Distil in one or several processes of their own; returns the folder of the set, and what they printed."""

    def call(tmp_path, name, images, processes=1, machines=1, code=0, **settings):
        content, plugins = settings_of(tmp_path, name, images, **settings)
        environments = [{}] if processes == 1 else ranks(processes, machines)
        finished = fork_server.run(WORKER, content, tmp_path, environments)
        output = "".join(process.output for process in finished)
        assert [process.code for process in finished] == [code] * processes, output
        return plugins, output

    return call


def weights(folder):
    return {
        f"{path.parent.name}.{name}": tensor
        for path in sorted(Path(folder).glob("P_*/*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def distance(one, other):
    """Relative distance of two plugin sets as a whole."""
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    squares = sum((one[name].double() - other[name].double()).square().sum() for name in one)
    return float((squares / sum(tensor.double().square().sum() for tensor in one.values())).sqrt())


@pytest.fixture(scope="module")
def one_process(run, images, tmp_path_factory):
    plugins, _ = run(tmp_path_factory.mktemp("one"), "one", images)
    return plugins


@pytest.mark.slow
def test_two_processes_of_torchrun_give_what_one_gives(images, one_process, tmp_path):
    """The launcher that users run. Each process imports torch anew, which takes most of the time; the other tests give
    theirs the environment that it would.
    """
    settings, plugins = settings_of(tmp_path, "two", images, arguments={"per_device_train_batch_size": 4})
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = ROOT / "tests" / "helpers" / "distill_worker.py"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(tmp_path / "settings.json")],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert distance(one_process, plugins) < 1e-4


def test_two_machines_give_what_one_gives(run, images, one_process, tmp_path):
    """Two processes, the first of its machine each, that only share a network address and the output folder."""
    arguments = {"per_device_train_batch_size": 4}
    plugins, _ = run(tmp_path, "machines", images, processes=2, machines=2, arguments=arguments)
    assert distance(one_process, plugins) < 1e-4


def test_sharded_weights_give_what_whole_ones_give(run, images, one_process, tmp_path):
    arguments = {"per_device_train_batch_size": 4}
    plugins, _ = run(tmp_path, "sharded", images, processes=2, arguments=arguments, shard=True)
    assert distance(one_process, plugins) < 1e-4


@pytest.mark.parametrize(
    ("objective", "target_modules"),
    [("features", None), ("whitened_features", None), ("hidden_states", ["all-linear"])],
)
def test_what_lies_below_the_head_is_compared_on_sharded_weights(run, images, tmp_path, objective, target_modules):
    """Two processes with half of the batch and of the weights each; the model has a head, which is not run."""
    plugins = []
    for name, processes, shard in (("whole", 1, False), ("sharded", 2, True)):
        settings = {
            "objective": objective,
            "target_modules": target_modules,
            "per_device_train_batch_size": 8 // processes,
        }
        folder, _ = run(tmp_path, name, images, processes=processes, arguments=settings, shard=shard)
        plugins.append(folder)
    assert distance(*plugins) < 1e-4


def test_accumulation_gives_what_one_large_batch_gives(run, images, one_process, tmp_path):
    arguments = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    plugins, _ = run(tmp_path, "accumulated", images, arguments=arguments)
    assert distance(one_process, plugins) < 1e-4


def test_loading_workers_change_nothing(run, images, one_process, tmp_path):
    plugins, _ = run(tmp_path, "workers", images, arguments={"dataloader_num_workers": 2})
    assert distance(one_process, plugins) == 0


def test_a_killed_run_goes_on_bit_for_bit(run, images, one_process, tmp_path):
    """kill -9 in the middle of an epoch, behind the last checkpoint."""
    settings = {"output_dir": str(tmp_path / "run"), "save_steps": 3}
    run(tmp_path, "killed", images, code=-signal.SIGKILL, arguments=settings, kill_at=4, signal="SIGKILL")
    resumed = {**settings, "resume_from_checkpoint": "latest"}
    plugins, output = run(tmp_path, "resumed", images, arguments=resumed)
    assert "step 3 of 8" in output
    assert distance(one_process, plugins) == 0


def test_a_stopped_run_of_two_processes_goes_on_with_one(run, images, one_process, tmp_path):
    """SIGTERM to one process stops both after the step, with a checkpoint; how many go on does not matter."""
    settings = {"output_dir": str(tmp_path / "run"), "save_steps": 100}
    arguments = {**settings, "per_device_train_batch_size": 4}
    kill = {"kill_at": 4, "signal": "SIGTERM", "kill_rank": 1}
    _, output = run(tmp_path, "stopped", images, processes=2, code=1, arguments=arguments, **kill)
    assert output.count("DistillationInterrupted: Stopped by SIGTERM after step 6 of 8") == 2
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-6"]
    plugins, _ = run(tmp_path, "resumed", images, arguments={**settings, "resume_from_checkpoint": "latest"})
    assert distance(one_process, plugins) < 1e-4


def test_machines_that_do_not_share_a_folder_are_told(run, images, tmp_path):
    """The first of two finds a checkpoint in its folder, the second none."""
    settings = {"max_steps": 3, "save_steps": 2, "output_dir": str(tmp_path / "machine-0")}
    run(tmp_path, "first", images, arguments=settings)
    resumed = {
        **settings,
        "per_device_train_batch_size": 4,
        "output_dir": str(tmp_path / "machine-{rank}"),
        "resume_from_checkpoint": "latest",
    }
    _, output = run(tmp_path, "both", images, processes=2, machines=2, code=1, arguments=resumed)
    assert output.count("CheckpointError: Processes found different checkpoints") == 2
    assert "a folder that all of them see" in output


def test_a_killed_run_on_a_stream_goes_on_bit_for_bit(run, images, tmp_path):
    settings = {"save_steps": 3, "shuffle_buffer_size": 5}
    whole, _ = run(tmp_path, "whole", images, streaming=True, arguments=settings)
    saved = {**settings, "output_dir": str(tmp_path / "run")}
    kill = {"kill_at": 7, "signal": "SIGKILL"}
    run(tmp_path, "killed", images, code=-signal.SIGKILL, streaming=True, arguments=saved, **kill)
    resumed = {**saved, "resume_from_checkpoint": "latest"}
    rest, _ = run(tmp_path, "resumed", images, streaming=True, arguments=resumed)
    assert distance(whole, rest) == 0


# --- in this process ---


def arguments(tmp_path=None, **settings):
    folder = {} if tmp_path is None else {"output_dir": str(tmp_path), "save_steps": 2}
    plain = {"max_r": 4, "max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 0.3}
    return DistillationArguments(**{**plain, **folder, **settings})


def factors(plugins):
    adapters = (plugins.adapter(i) for i in range(plugins.config.max_r))
    return torch.cat([factor.flatten() for adapter in adapters for pair in adapter.values() for factor in pair])


def stop_at(monkeypatch, step):
    """Send SIGINT within a step."""
    original, calls = torch.optim.AdamW.step, []

    def interrupt(*args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupt)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"ema_decay": 0.7},
        {"max_grad_norm": 0.01},
        {"degree_sampler": "antithetic"},
        {"target_modules": ["all-linear"]},
        {"objective": "whitened_features"},
        {"train_degrees": [0, 4]},
    ],
)
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, monkeypatch, extra):
    expected = factors(distill(make_model(), Noise(), arguments(**extra)))
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(DistillationInterrupted, match=r"SIGINT after step 4 of 6.*resume_from_checkpoint='latest'"):
            distill(make_model(), Noise(), arguments(tmp_path, **extra))
    assert signal.getsignal(signal.SIGINT) is handler
    resumed = arguments(tmp_path, **extra, resume_from_checkpoint="latest")
    plugins = distill(make_model(), Noise(), resumed)
    assert torch.equal(factors(plugins), expected)
    assert plugins.config.training["steps"] == 6
    # a run that is done has nothing left to do
    assert torch.equal(factors(distill(make_model(), Noise(), resumed)), expected)


def test_other_settings_are_refused(tmp_path):
    distill(make_model(), Noise(), arguments(tmp_path))
    with pytest.raises(CheckpointError, match="rank: 2 in the checkpoint, now 3"):
        distill(make_model(), Noise(), arguments(tmp_path, resume_from_checkpoint="latest", rank=3))
    with pytest.raises(CheckpointError, match="model:"):
        distill(make_model(seed=1), Noise(), arguments(tmp_path, resume_from_checkpoint="latest"))
    with pytest.raises(CheckpointError, match="num_images: 32 in the checkpoint, now 40"):
        distill(make_model(), Noise(40), arguments(tmp_path, resume_from_checkpoint="latest"))
    with pytest.raises(CheckpointError, match="has checkpoints of another run"):
        distill(make_model(), Noise(), arguments(tmp_path))


def test_a_run_from_another_set_is_not_gone_on_with(tmp_path):
    first, second = (distill(make_model(), Noise(), arguments(seed=seed)) for seed in (1, 2))
    distill(make_model(), Noise(), arguments(tmp_path), init_plugins=first)
    resumed = arguments(tmp_path, resume_from_checkpoint="latest")
    for other in (None, second):
        with pytest.raises(CheckpointError, match="init_plugins:"):
            distill(make_model(), Noise(), resumed, init_plugins=other)
    distill(make_model(), Noise(), resumed, init_plugins=first)


def test_where_and_how_often_may_change(tmp_path):
    distill(make_model(), Noise(), arguments(tmp_path))
    changed = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "save_steps": 5, "logging_steps": 1}
    distill(make_model(), Noise(), arguments(tmp_path, resume_from_checkpoint="latest", **changed))


class Poisoned(Noise):
    """Images of which some are NaN."""

    def __init__(self, bad):
        super().__init__()
        self.images[bad] = float("nan")


def test_steps_that_are_not_finite_are_skipped_and_counted():
    plugins = distill(make_model(), Poisoned([5]), arguments(max_steps=8))
    assert plugins.config.training["skipped_steps"] == 2  # once in each epoch of four steps
    assert factors(plugins).isfinite().all()
    assert plugins.config.training["mean_loss"] < float("inf")


def test_such_steps_are_skipped_with_loss_scaling_too():
    """What fp16 does on a GPU, with torch's loss scaling for CPUs."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    try:
        plugins = distill(make_model(), Poisoned([5]), arguments(max_steps=8), accelerator)
    finally:
        accelerator.state._mixed_precision = "no"
    assert plugins.config.training["skipped_steps"] == 2
    assert factors(plugins).isfinite().all()


def test_too_many_such_steps_in_a_row_stop_the_run_and_keep_the_last_good_checkpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(DistillationInterrupted):
            distill(make_model(), Noise(), arguments(tmp_path, save_steps=1))
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(DistillationError, match=r"3 steps in a row.*last checkpoint"):
        distill(
            make_model(),
            Poisoned(list(range(32))),
            arguments(tmp_path, save_steps=1, resume_from_checkpoint="latest", max_nonfinite_steps=3),
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_clipping_changes_only_gradients_above_the_limit():
    free, clipped = (distill(make_model(), Noise(), arguments(max_grad_norm=limit)) for limit in (None, 1e9))
    assert torch.equal(factors(free), factors(clipped))
    assert not torch.equal(factors(free), factors(distill(make_model(), Noise(), arguments(max_grad_norm=1e-9))))


def test_the_moving_average_is_that_of_the_formula(monkeypatch):
    history, original = [], torch.optim.AdamW.step

    def record(self, *args, **kwargs):
        if not history:
            history.append([p.detach().clone() for group in self.param_groups for p in group["params"]])
        original(self, *args, **kwargs)
        history.append([p.detach().clone() for group in self.param_groups for p in group["params"]])

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", record)
        plugins = distill(make_model(), Noise(), arguments(ema_decay=0.7))
    expected = [p.double() for p in history[0]]
    for state in history[1:]:
        expected = [0.7 * mean + 0.3 * p.double() for mean, p in zip(expected, state, strict=True)]
    total = sum(p.square().sum() for p in expected)
    torch.testing.assert_close(factors(plugins).double().square().sum(), total, rtol=1e-5, atol=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_checkpointing_changes_nothing(objective):
    model = make_model()
    plain = distill(make_model(), Noise(), arguments(objective=objective))
    recomputed = distill(model, Noise(), arguments(objective=objective, gradient_checkpointing=True))
    torch.testing.assert_close(factors(recomputed), factors(plain), rtol=1e-4, atol=1e-6)
    assert not model.is_activation_checkpointing


@pytest.fixture
def fresh_accelerate():
    """Accelerate fixes its settings per process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
def test_bfloat16_trains():
    plugins = distill(make_model(), Noise(), arguments(), Accelerator(cpu=True, mixed_precision="bf16"))
    assert plugins.config.training["mixed_precision"] == "bf16"
    assert factors(plugins).isfinite().all()


def test_features_of_a_backbone_are_distilled():
    plugins = distill(make_model().vit, Noise(), arguments(max_steps=40))
    assert plugins.config.training["objective"] == "features"
    by_distance = plugins.config.training["loss_by_distance"]
    assert set(by_distance) == {"1", "2", "3", "4"}


def test_hidden_states_are_distilled():
    """And judged by features, of which the plugins keep more."""
    settings = {"objective": "hidden_states", "max_steps": 40, "learning_rate": 1.0, "eval_degrees": [0, 4]}
    plugins = distill(make_model(), Noise(), arguments(**settings), eval_dataset=Noise(8))
    assert plugins.config.training["objective"] == "hidden_states"
    grid = plugins.config.training["agreement"]
    assert grid["plain"][0][0] == pytest.approx(1, abs=1e-5)
    assert grid["tocom"][0][1] > grid["plain"][0][1]


def test_whitened_features_are_distilled():
    """By the spread of the images themselves, of which damaged ones are no part; judged by features."""
    settings = {
        "objective": "whitened_features", "max_steps": 40, "learning_rate": 0.3, "eval_degrees": [0, 4],
        "source_r": 0, "train_degrees": [2, 4], "lora_dropout": 0.0,
    }  # fmt: skip
    plugins = distill(make_model(), Poisoned([5]), arguments(**settings), eval_dataset=Noise(8))
    assert plugins.config.training["objective"] == "whitened_features"
    assert set(plugins.config.training["loss_by_distance"]) <= {"2", "3-4", "4"}
    grid = plugins.config.training["agreement"]
    assert grid["tocom"][0][1] > grid["plain"][0][1]


def test_a_stream_has_no_spread():
    stream = datasets.Dataset.from_dict({"image": [None] * 4}).to_iterable_dataset()
    with pytest.raises(ArgumentError, match="which a stream does not allow"):
        distill(make_model(), stream, arguments(objective="whitened_features", max_steps=2))


def test_the_grid_is_recorded_and_shows_the_gain():
    settings = {"max_r": 8, "max_steps": 60, "per_device_train_batch_size": 16, "lora_dropout": 0.0}
    plugins = distill(make_model().vit, Noise(), arguments(**settings), eval_dataset=Noise())
    grid = plugins.config.training["agreement"]
    assert grid["degrees"] == [0, 2, 4, 6, 8]
    assert grid["images"] == 32
    assert grid["tocom"][0][4] > grid["plain"][0][4]
    assert grid["tocom"][4][0] > grid["plain"][4][0]
    assert all(grid["tocom"][i][i] == grid["plain"][i][i] for i in range(5))


def test_plugins_that_do_harm_are_told_of(caplog):
    settings = {"max_steps": 8, "per_device_train_batch_size": 16, "eval_degrees": [0, 4]}
    for learning_rate, told in ((0.1, False), (100.0, True)):
        caplog.clear()
        plugins = distill(
            make_model(), Noise(), arguments(**settings, learning_rate=learning_rate), eval_dataset=Noise(8)
        )
        grid = plugins.config.training["agreement"]
        assert (grid["tocom"][0][1] + grid["tocom"][1][0] < grid["plain"][0][1] + grid["plain"][1][0]) == told
        assert ("Lower learning_rate" in caplog.text) == told


def test_trackers_get_the_figures(tmp_path):
    logged = []

    class Recorder(Accelerator):
        def log(self, values, step=None, **kwargs):
            logged.append((step, values))

    distill(
        make_model(), Noise(48), arguments(logging_steps=2, eval_steps=3), Recorder(cpu=True), eval_dataset=Noise(8)
    )
    figures = [values for step, values in logged if "loss" in values]
    assert [step for step, values in logged if "loss" in values] == [2, 4, 6]
    assert {"loss", "learning_rate", "grad_norm", "images_per_second", "skipped_steps"} <= figures[-1].keys()
    assert any(name.startswith("loss/distance_") for name in figures[-1])
    assert [step for step, values in logged if "agreement/tocom" in values] == [3, 6]


def test_holding_out_splits():
    data = Noise(10)
    rest, held_out = hold_out(data, 4)
    assert sorted([*rest.indices, *held_out.indices]) == list(range(10))
    for count in (0, 10, 11):
        with pytest.raises(DatasetError, match="hold out"):
            hold_out(data, count)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": -1}, r"seed must be an integer in \[0, 2\*\*32\), got -1"),
        ({"seed": 2**63}, "seed must be an integer in"),
        ({"learning_rate": "1e-3"}, "learning_rate must be a positive number"),
        ({"flip": None, "weight_decay": True}, "weight_decay must be a number"),
    ],
)
def test_numbers_out_of_range_are_refused(wrong, message):
    with pytest.raises(ArgumentError, match=message):
        arguments(**wrong)


def test_contradicting_arguments_are_refused(tmp_path):
    with pytest.raises(ArgumentError, match="DistillationArguments, not to the Accelerator"):
        distill(make_model(), Noise(), arguments(), Accelerator(cpu=True, gradient_accumulation_steps=2))
    with pytest.raises(ArgumentError, match="must be even"):
        arguments(mixup=0.8, per_device_train_batch_size=7)
    with pytest.raises(ArgumentError, match="needs output_dir"):
        arguments(resume_from_checkpoint="latest")
    with pytest.raises(ArgumentError, match="TrainingImages"):
        distill(make_model(), Noise(), arguments(randaugment_num_ops=2))
