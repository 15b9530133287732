# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""A damaged image costs no work: the run keeps what it has learnt, or passes over the image in a way that is fixed."""

import itertools
import shutil

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.distillation import ARGUMENTS
from helpers.fork_server import ranks
from helpers.models import make_model
from PIL import Image
from transformers import ViTImageProcessorPil

from tocom_hf import ArgumentError, DatasetError, DistillationArguments, PluginSet, distill
from tocom_hf.data.images import TrainingImages, load_images
from tocom_hf.distillation.order import KeyedImages, KeyedStream, StreamState, TrainingLoader
from tocom_hf.distillation.run_state import RunState, list_checkpoints


COUNT = 24
PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})
GREY = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5], image_std=[0.5])


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """A cache that is thrown away; datasets waits for its threads at the end of an epoch of a stream, and
    PyTorch five seconds for each process of a loader that has failed."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of images; image i has the grey value 10 i, so that a view shows which it is."""
    folder = tmp_path_factory.mktemp("whole")
    for index in range(COUNT):
        Image.new("RGB", (36, 36), (10 * index,) * 3).save(folder / f"{index:02}.png")
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of it, to damage."""
    return shutil.copytree(whole, tmp_path / "images")


def damage(folder, *indices):
    for index in indices:
        (folder / f"{index:02}.png").write_bytes(b"damaged")


def views_of(folder, streaming=False):
    return TrainingImages(load_images(str(folder), streaming=streaming), PROCESSOR)


def shown(pixel_values):
    return int(pixel_values.flatten()[0]) // 10


def run(dataset, **settings):
    eval_dataset = settings.pop("eval_dataset", None)
    arguments = DistillationArguments(**{**ARGUMENTS, "per_device_train_batch_size": 4, **settings})
    model = make_model(num_hidden_layers=2, patch_size=8)
    return distill(model, dataset, arguments, Accelerator(cpu=True), eval_dataset=eval_dataset)


def assert_equal(one, other):
    for index in range(one.config.max_r):
        for path, factors in one.adapter(index).items():
            for own, expected in zip(factors, other.adapter(index)[path], strict=True):
                assert torch.equal(own, expected)


def test_other_images_are_not_disturbed_and_the_one_in_its_place_is_fixed(folder, whole):
    damage(folder, 3, 7)
    expected, keyed = KeyedImages(views_of(whole), seed=0), KeyedImages(views_of(folder), seed=0, skip_damaged=True)
    replacements = {}
    for position in range(2 * COUNT):
        sample = keyed[position]
        assert sample["key"] == expected[position]["key"]
        if position % COUNT in (3, 7):
            assert sample["damaged"] >= 1
            replacements[position] = shown(sample["pixel_values"])
        else:
            assert sample["damaged"] == 0
            assert torch.equal(sample["pixel_values"], expected[position]["pixel_values"])
    assert not {3, 7} & set(replacements.values())
    assert len(set(replacements.values())) > 1
    again = KeyedImages(views_of(folder), seed=0, skip_damaged=True)
    assert {position: shown(again[position]["pixel_values"]) for position in replacements} == replacements


@pytest.mark.parametrize("settings", [{"dataloader_num_workers": 2}, {"gradient_accumulation_steps": 2}])
def test_workers_and_accumulation_change_nothing(folder, settings):
    damage(folder, 3, 7)
    expected = run(views_of(folder), skip_damaged=True, max_steps=6)
    size = 4 // settings.get("gradient_accumulation_steps", 1)
    found = run(views_of(folder), skip_damaged=True, max_steps=6, per_device_train_batch_size=size, **settings)
    assert found.config.training["damaged_images"] == expected.config.training["damaged_images"] == 2
    for path, factors in expected.adapter(0).items():
        for own, other in zip(factors, found.adapter(0)[path], strict=True):
            torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("streaming", [False, True])
def test_all_processes_end_alike_and_one_goes_on(folder, tmp_path, fork_server, streaming):
    """A damaged image is in the part of one process only, and the other would wait for it for ever."""
    damage(folder, 3)
    arguments = {**ARGUMENTS, "max_steps": 6, "per_device_train_batch_size": 2, "output_dir": str(tmp_path / "out")}
    arguments["seed"] = 1
    settings = {"images": str(folder), "cache": str(tmp_path / "cache"), "streaming": streaming}
    settings |= {"plugins": str(tmp_path / "set"), "arguments": arguments}
    finished = fork_server.run("helpers.distill_worker:main", settings, tmp_path, ranks(2))
    assert len(list_checkpoints(tmp_path / "out")) == 1
    for process in finished:
        assert process.code == 1, process.output
        assert "03.png in the column 'image' cannot be read" in process.output
        assert f"A checkpoint of it is in {tmp_path / 'out'}" in process.output
    arguments |= {"skip_damaged": True, "resume_from_checkpoint": "latest"}
    finished = fork_server.run("helpers.distill_worker:main", settings, tmp_path, ranks(2))
    assert [process.code for process in finished] == [0, 0], finished[0].output + finished[1].output
    assert PluginSet.from_pretrained(tmp_path / "set").config.training["damaged_images"] == 1


def test_several_processes_pass_over_the_same_images(folder):
    """The batches of two processes, one after the other, are those of one."""
    damage(folder, 3, 7)

    class Process:
        device, num_processes = torch.device("cpu"), 2

        def __init__(self, process_index):
            self.process_index = process_index

        def prepare_data_loader(self, loader):
            from accelerate.data_loader import prepare_data_loader

            return prepare_data_loader(loader, num_processes=2, process_index=self.process_index, put_on_device=False)

    args = DistillationArguments(per_device_train_batch_size=4, skip_damaged=True)
    loaders = [TrainingLoader(views_of(folder), args, Process(rank), 8, 6) for rank in (0, 1)]
    parts = [list(loader) for loader in loaders]
    args = DistillationArguments(per_device_train_batch_size=8, skip_damaged=True)
    single = TrainingLoader(views_of(folder), args, Accelerator(cpu=True), 8, 6)
    for first, second, both in zip(*parts, single, strict=True):
        assert first.keys() == {"pixel_values", "key"}
        assert torch.equal(torch.cat([first["pixel_values"], second["pixel_values"]]), both["pixel_values"])
    assert loaders[0].damaged + loaders[1].damaged == single.damaged
    assert single.damaged >= 4  # two in each of two epochs


def test_a_damaged_image_stops_the_run_with_its_name_and_a_checkpoint(folder, whole, tmp_path):
    damage(folder, 3)
    out = tmp_path / "out"
    settings = {"max_steps": 6, "output_dir": str(out), "seed": 1}
    with pytest.raises(DatasetError) as caught:
        run(views_of(folder), **settings)
    (checkpoint,) = list_checkpoints(out)
    step = RunState.load(checkpoint).step
    assert 0 < step < 6
    message = str(caught.value)
    assert f"The image {folder}/03.png in the column 'image' cannot be read" in message
    assert "Or set skip_damaged." in message
    assert f"The last step was {step} of 6. A checkpoint of it is in {out}: go on with" in message
    shutil.copy(whole / "03.png", folder)
    resumed = run(views_of(folder), resume_from_checkpoint="latest", **settings)
    assert_equal(resumed, run(views_of(whole), max_steps=6, seed=1))


def test_a_stopped_run_may_go_on_passing_over_the_image(folder, tmp_path):
    damage(folder, 3)
    settings = {"max_steps": 6, "output_dir": str(tmp_path / "out"), "seed": 1}
    with pytest.raises(DatasetError):
        run(views_of(folder), **settings)
    resumed = run(views_of(folder), resume_from_checkpoint="latest", skip_damaged=True, **settings)
    expected = run(views_of(folder), max_steps=6, seed=1, skip_damaged=True)
    assert_equal(resumed, expected)
    assert resumed.config.training["damaged_images"] == expected.config.training["damaged_images"] == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_stops_and_goes_on_in_the_same_place(folder, whole, tmp_path, workers):
    damage(folder, 20)
    settings = {"max_steps": 6, "output_dir": str(tmp_path / "out"), "dataloader_num_workers": workers}
    settings |= {"shuffle_buffer_size": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    with pytest.raises(DatasetError, match=r"20\.png.*A checkpoint of it is in") as caught:
        run(views_of(folder, streaming=True), **settings)
    assert "\n" not in str(caught.value)
    shutil.copy(whole / "20.png", folder)
    resumed = run(views_of(folder, streaming=True), resume_from_checkpoint="latest", **settings)
    del settings["output_dir"]
    assert_equal(resumed, run(views_of(whole, streaming=True), **settings))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_passes_over_damaged_images_and_goes_on_at_the_right_sample(folder, workers):
    damage(folder, 0, 3, 4, 23)
    args = DistillationArguments(
        per_device_train_batch_size=3, dataloader_num_workers=workers, shuffle_buffer_size=4, skip_damaged=True
    )
    images, accelerator = views_of(folder, streaming=True), Accelerator(cpu=True)

    def read(loader, count):
        batches = [batch["pixel_values"] for batch in itertools.islice(loader, count)]
        return batches, int(loader.damaged)

    whole, damaged = read(TrainingLoader(images, args, accelerator, 3, 100), 20)
    assert [len(batch) for batch in whole] == [3] * 20
    assert not {0, 3, 4, 23} & {shown(view) for batch in whole for view in batch}
    assert damaged >= 8  # four in each of two whole epochs
    for stop in (3, 7, 13):
        first = TrainingLoader(images, args, accelerator, 3, 100)
        _, before = read(first, stop)
        state = StreamState.from_list(first.stream_state.to_list())
        rest, after = read(TrainingLoader(images, args, accelerator, 3, 100, stop, state), 20 - stop)
        assert all(torch.equal(own, expected) for own, expected in zip(rest, whole[stop:], strict=True))
        assert before + after == damaged


@pytest.mark.parametrize("streaming", [False, True])
def test_too_many_damaged_images_are_an_error(folder, streaming):
    damage(folder, *range(COUNT))
    with pytest.raises(DatasetError, match=r"11 images in a row are damaged, too many .*\.png"):
        run(views_of(folder, streaming), skip_damaged=True, max_steps=3)


def test_images_that_are_not_damaged_but_refused_are_not_passed_over(folder):
    """Whoever has a folder of them has to convert it, and would be told nothing."""
    for index in range(COUNT):
        (folder / f"{index:02}.png").unlink()
        Image.new("F", (36, 36), 0.5).save(folder / f"{index:02}.tiff")
    with pytest.raises(DatasetError, match="32 bits"):
        run(views_of(folder), skip_damaged=True, max_steps=3)


def test_samples_without_an_image_are_passed_over_too():
    images = [None, *(Image.new("RGB", (36, 36), (10 * i,) * 3) for i in range(1, 8))]
    data = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    plugins = run(TrainingImages(data, PROCESSOR), skip_damaged=True, max_steps=2)
    assert plugins.config.training["damaged_images"] == 1


def test_the_first_image_may_be_damaged_where_randaugment_is_on(folder):
    damage(folder, 0)
    run(views_of(folder), skip_damaged=True, max_steps=1, randaugment_num_ops=1)


def test_an_image_held_out_is_named(folder):
    damage(folder, 5)
    views = views_of(folder)
    with pytest.raises(DatasetError, match=r"05\.png.*cannot be read"):
        run(views.select([0, 1, 2, 3, 4, 6, 7, 8]), max_steps=1, eval_dataset=views)


def test_views_of_other_channels_than_the_models_are_refused(folder):
    views = TrainingImages(load_images(str(folder)), GREY)
    with pytest.raises(ArgumentError, match=r"have 1 channel\(s\), but the model takes 3"):
        run(views)


def test_the_seed_of_a_view_is_not_that_of_a_replacement():
    """NumPy takes (1, 2, 0) for (1, 2): numbers of attempts begin with 1."""
    same = [np.random.default_rng(seed).random() for seed in ((1, 2, 3), (1, 2, 3, 0), (1, 2, 3, 1))]
    assert same[0] == same[1] != same[2]


def test_a_stream_of_a_process_passes_over_its_own(folder):
    damage(folder, 1, 2)
    stream = KeyedStream(views_of(folder, streaming=True), 0, 0, 1, 1, 4, skip_damaged=True)
    samples = list(itertools.islice(stream, COUNT - 2))
    assert sorted(shown(sample["pixel_values"]) for sample in samples) == [0, *range(3, COUNT)]
