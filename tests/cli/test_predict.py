# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""`tocom predict` gives what the model itself gives, and a run that was killed goes on as if it had not been."""

import errno
import io
import json
import os

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers as hf
from helpers.clips import clip_processor, make_frames, save_clips
from helpers.families import videomae
from helpers.models import make_model, make_plugins
from PIL import Image

from tocom_hf import TocomModel, apply_tome, export
from tocom_hf.prediction import predict as module


COUNT, BATCH, NAMES = 14, 3, ["ant", "bee", "cat", "dog", "cat"]  # two classes may have one name
PROCESSOR = hf.ViTImageProcessorPil(size={"height": 32, "width": 32})
MODEL = ["--model_name_or_path", "model", "--target_r", 3]
DATA = ["--dataset_name", "data.parquet", "--output", "out", "--batch_size", BATCH]


def images(count=COUNT):
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (20, 28, 3), np.uint8)) for _ in range(count)]


def save_data(path, first=0, end=COUNT, damaged=()):
    """A parquet file with images, what they are called, and labels."""
    encoded = []
    for index, image in enumerate(images()[first:end], start=first):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        content = buffer.getvalue()
        encoded.append({"bytes": content[:-900] if index in damaged else content, "path": f"{index}.png"})
    content = {"image": encoded, "id": [f"n{index}" for index in range(first, end)], "label": [0, 1] * (end - first)}
    content["label"] = content["label"][: end - first]
    features = {"image": datasets.Image(), "id": datasets.Value("string")}
    features["label"] = datasets.ClassLabel(names=["no", "yes"])
    datasets.Dataset.from_dict(content, datasets.Features(features)).to_parquet(path)


@pytest.fixture
def vit(tmp_path):
    """A checkpoint and its data in the folder that commands run in."""
    model = make_model(num_hidden_layers=2, patch_size=8)
    model.config.id2label = dict(enumerate(NAMES))
    model.save_pretrained(tmp_path / "model")
    PROCESSOR.save_pretrained(tmp_path / "model")
    save_data(tmp_path / "data.parquet")
    return model


def read(folder="out"):
    """All predictions, as a list of rows."""
    return pq.read_table(folder).to_pylist()


def outputs(model, count=COUNT):
    """What a model gives for the images, one after the other."""
    with torch.no_grad():
        found = [model(**PROCESSOR(image, return_tensors="pt")) for image in images(count)]
    return [output.logits[0] if "logits" in output else output for output in found]


def expect(found, model):
    """Compare predictions with what a model gives in a loop."""
    for index, (row, logits) in enumerate(zip(found, outputs(model), strict=True)):
        scores = logits.softmax(-1)
        best = scores.argsort(descending=True).tolist()
        assert (row["row"], row["path"], row["reason"]) == (index, f"{index}.png", None)
        assert (row["label"], row["label_id"]) == (NAMES[best[0]], best[0])
        assert row["score"] == pytest.approx(scores[best[0]].item(), rel=1e-5)
        assert row["labels"] == [NAMES[label] for label in best[: len(row["labels"])]]
        assert row["scores"] == pytest.approx(scores[best[: len(row["labels"])]].tolist(), rel=1e-5)


@pytest.fixture
def interrupted(monkeypatch):
    """Let the process be interrupted in a batch: `interrupted(n)`, and what it counts."""
    real = module.Backend.__subclasses__()[0].run
    batches = []

    def at(number):
        def forward(self, batch):
            if len(batches) == number:
                raise KeyboardInterrupt
            batches.append(len(batch))
            return real(self, batch)

        batches.clear()
        monkeypatch.setattr("tocom_hf.prediction.backends.ModelBackend.run", forward)
        return batches

    return at


# -- what is predicted --------------------------------------------------------------------------------------------


def test_without_plugins_the_model_merges_alone(run, vit):
    ended = run("predict", *MODEL, *DATA, "--top_k", 3)
    assert ended.code == 0, ended
    assert ended.output.startswith(f"{COUNT} images; ")
    assert "images/s. Written to " in ended.output
    found = read()
    assert {len(row["labels"]) for row in found} == {3}
    expect(found, apply_tome(vit, 3))


def test_plugins_make_up_for_the_degree(run, vit, tmp_path):
    make_plugins(vit).save_pretrained(tmp_path / "plugins")
    arguments = ["--plugins", "plugins", "--source_r", 0, "--scale", 0.2]
    ended = run("predict", *MODEL, *arguments, *DATA)
    assert ended.code == 0, ended
    expect(read(), TocomModel.from_pretrained(vit, plugins=tmp_path / "plugins", source_r=0, target_r=3, scale=0.2))


def test_a_scale_is_for_plugins(refused, vit):
    assert "--scale is the strength of plugins, and the model has none" in refused(
        "predict", *MODEL, *DATA, "--scale", 1
    )


def test_a_model_without_a_head_gives_features(run, vit, tmp_path):
    backbone = apply_tome(vit.vit, 3)
    vit.vit.save_pretrained(tmp_path / "backbone")
    PROCESSOR.save_pretrained(tmp_path / "backbone")
    ended = run("predict", "--model_name_or_path", "backbone", "--target_r", 3, *DATA, "--rows_per_part", 4)
    assert ended.code == 0, ended
    found = read()
    assert {*found[0]} == {"row", "path", "features", "reason"}
    for row, output in zip(found, outputs(backbone), strict=True):
        np.testing.assert_allclose(row["features"], output.last_hidden_state[0, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_export_runs_in_its_runtime(run, tmp_path):
    save_data(tmp_path / "data.parquet")
    vit = make_model(num_hidden_layers=1, patch_size=8)
    vit.config.id2label = dict(enumerate(NAMES))
    export(vit, tmp_path / "exported", format="torch", degrees=[3], processor=PROCESSOR)
    arguments = ["--model_name_or_path", "exported", "--target_r", 3, *DATA]
    ended = run("predict", *arguments)
    assert ended.code == 0, ended
    expect(read(), apply_tome(vit, 3))


def test_an_export_has_settings_of_its_own(refused, tmp_path):
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported/manifest.json").write_text("{}")
    arguments = ["--model_name_or_path", "exported", "--target_r", 3, *DATA]
    assert "is an export, which has its own: leave --source_r out" in refused("predict", *arguments, "--source_r", 0)
    assert "manifest.json has format_version None" in refused("predict", *arguments)


def test_clips_are_predicted(run, tmp_path):
    torch.manual_seed(0)
    model = hf.VideoMAEForVideoClassification(videomae(num_labels=3, num_hidden_layers=2, initializer_range=0.3)).eval()
    model.save_pretrained(tmp_path / "model")
    clip_processor().save_pretrained(tmp_path / "model")
    save_clips(tmp_path / "clips.parquet", [8, 11, 16])
    ended = run(
        "predict", "--model_name_or_path", "model", "--target_r", 5, "--dataset_name", "clips.parquet",
        "--image_column", "clip", "--output", "out", "--batch_size", 2,
    )  # fmt: skip
    assert ended.code == 0, ended
    assert ended.output.startswith("3 clips; ")
    apply_tome(model, 5)
    for seed, (length, row) in enumerate(zip([8, 11, 16], read(), strict=True)):
        frames = [make_frames(length, seed)[i * length // 8] for i in range(8)]
        with torch.no_grad():
            logits = model(**clip_processor()(frames, return_tensors="pt")).logits
        assert row["label"] == f"LABEL_{logits.argmax()}"


def test_columns_are_kept_with_what_they_mean(run, vit):
    assert run("predict", *MODEL, *DATA, "--keep_columns", "id", "label=true_label").code == 0
    found = datasets.load_dataset("out", split="train")
    assert found["id"][:] == [f"n{index}" for index in range(COUNT)]
    assert found["true_label"][:] == [0, 1] * (COUNT // 2)
    assert found.features["true_label"].names == ["no", "yes"]
    assert {*found["label"]} <= {*NAMES}


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("label", "The results have a column 'label' of their own"),
        ("id=row", "Give it another: --keep_columns id=true_id"),
        ("image=picture", "The column 'image' holds Image("),
        ("name", "has no column 'name'; it has image, id, label. Name the further column with --keep_columns"),
    ],
)
def test_columns_that_cannot_be_kept(refused, vit, tmp_path, column, message):
    assert message in refused("predict", *MODEL, *DATA, "--keep_columns", column)
    assert not (tmp_path / "out").exists()


# -- stopped and taken up -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("streaming", "numbers"), [([], [1, 4]), (["--streaming"], [2])])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(run, vit, interrupted, tmp_path, streaming, numbers):
    arguments = ["--dataset_name", "data.parquet", "--batch_size", BATCH, "--rows_per_part", BATCH, *streaming]
    arguments += [*MODEL, "--keep_columns", "id", "--output"]
    assert run("predict", *arguments, "whole").code == 0
    expect(read("whole"), apply_tome(vit, 3))
    for number in numbers:
        interrupted(number)
        stopped = run("predict", *arguments, f"out-{number}")
        assert stopped.code == 130
        assert (
            stopped.errors == "tocom predict: stopped; the same command goes on from the last file that was written.\n"
        )
        assert len([*(tmp_path / f"out-{number}").glob("*.parquet")]) == number
        batches = interrupted(None)
        ended = run("predict", *arguments, f"out-{number}")
        assert ended.code == 0, ended
        assert sum(batches) == COUNT - number * BATCH
        assert pq.read_table(f"out-{number}").equals(pq.read_table("whole"))


def test_a_finished_run_does_nothing_and_mends_what_was_lost(run, vit, interrupted):
    arguments = [*MODEL, *DATA, "--rows_per_part", BATCH]
    assert run("predict", *arguments).code == 0
    whole = pq.read_table("out")
    batches = interrupted(None)
    assert run("predict", *arguments).output.startswith(f"{COUNT} images, all of them before. Written to ")
    assert batches == []
    with open("out/part-00001.parquet", "r+b") as file:
        file.truncate(100)
    os.unlink("out/part-00004.parquet")
    ended = run("predict", *arguments)
    assert ended.output.startswith(f"{COUNT} images, 5 of them now; "), ended
    assert batches == [3, 2]
    assert pq.read_table("out").equals(whole)


def test_a_part_that_was_left_half_written_is_replaced(run, vit, interrupted, tmp_path):
    arguments = [*MODEL, *DATA, "--rows_per_part", BATCH]
    interrupted(2)
    run("predict", *arguments)
    half = (tmp_path / "out/part-00001.parquet").read_bytes()[:200]
    for name in ("part-00002.parquet", ".writing-part-00002.parquet"):
        (tmp_path / "out" / name).write_bytes(half)
    interrupted(None)
    assert run("predict", *arguments).code == 0
    expect(read(), apply_tome(vit, 3))
    assert not os.path.exists("out/.writing-part-00002.parquet")


def test_a_slow_run_writes_small_parts(run, vit, monkeypatch):
    monkeypatch.setattr(module, "_PART_SECONDS", 0.0)
    assert run("predict", *MODEL, *DATA).code == 0
    assert len([name for name in os.listdir("out") if name.endswith(".parquet")]) == -(-COUNT // BATCH)
    expect(read(), apply_tome(vit, 3))


def test_other_commands_are_refused_on_the_same_folder(run, refused, vit, interrupted, tmp_path):
    interrupted(2)
    run("predict", *MODEL, *DATA, "--rows_per_part", BATCH)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    settings = json.loads(before[".tocom-predictions.json"])["settings"]
    assert len(settings.pop("model_fingerprint")) == 16
    assert settings == {
        "model": "model", "plugins": None, "source_r": None, "target_r": 3, "scale": None, "dtype": "float32",
        "dataset": "data.parquet", "dataset_config": None, "split": "train", "dataset_rows": COUNT, "streaming": False,
        "image_column": "image", "keep_columns": {}, "top_k": 5, "num_shards": 1,
    }  # fmt: skip
    line = refused("predict", *MODEL, *DATA, "--target_r", 4, "--dtype", "bfloat16")
    assert "ArgumentError: out holds predictions of another run (.tocom-predictions.json): " in line
    assert "dtype is 'float32' there and 'bfloat16' now; " in line
    assert "target_r is 3 there and 4 now. Give the command of that run to go on with it; else choose " in line
    vit.classifier.bias.data += 1
    vit.save_pretrained(tmp_path / "model")
    assert "model_fingerprint is " in refused("predict", *MODEL, *DATA)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_what_does_not_change_the_predictions_may_change(run, vit, interrupted):
    interrupted(2)
    run("predict", *MODEL, *DATA, "--rows_per_part", BATCH)
    interrupted(None)
    others = ["--batch_size", 4, "--rows_per_part", 5, "--num_workers", 1, "--skip_damaged", "--device", "cpu"]
    assert run("predict", *MODEL, *DATA, *others).code == 0
    expect(read(), apply_tome(vit, 3))


def test_a_full_disk_leaves_no_half_written_part(run, refused, vit, monkeypatch):
    arguments = [*MODEL, *DATA, "--rows_per_part", BATCH]
    real = os.replace

    def fail(source, target):
        if str(target).endswith("part-00002.parquet"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", fail)
    line = refused("predict", *arguments)
    assert "part-00002.parquet cannot be written: [Errno 28] No space left on device. Free space on the disk of" in line
    assert "give the same command again: it goes on. The 6 rows that are written stay." in line
    assert sorted(os.listdir("out")) == [".tocom-predictions.json", "part-00000.parquet", "part-00001.parquet"]
    monkeypatch.setattr(os, "replace", real)
    assert run("predict", *arguments).code == 0
    expect(read(), apply_tome(vit, 3))


def test_a_batch_that_is_too_large_for_the_memory_may_be_smaller(run, refused, vit, monkeypatch):
    real = hf.ViTModel.forward

    def forward(self, pixel_values, **arguments):
        if len(pixel_values) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
        return real(self, pixel_values, **arguments)

    monkeypatch.setattr(hf.ViTModel, "forward", forward)
    line = refused("predict", *MODEL, *DATA)
    assert "The memory of cpu does not suffice for a batch of 3. Give the same command again with a smaller" in line
    assert run("predict", *MODEL, *DATA, "--batch_size", 2).code == 0
    expect(read(), apply_tome(vit, 3))


# -- damaged data -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_damaged_images_stop_it_or_get_their_reason(run, refused, vit, tmp_path, streaming):
    save_data(tmp_path / "data.parquet", damaged=(4, 9, 10, 11))
    arguments = [*MODEL, *DATA, *streaming, "--rows_per_part", BATCH]
    line = refused("predict", *arguments)
    assert "UnreadableImageError: Row 4: The image 4.png in the column 'image' cannot be read: " in line
    assert "Or pass over such rows with --skip_damaged. The same command goes on from the last part" in line
    ended = run("predict", *arguments, "--skip_damaged")
    assert ended.code == 0, ended
    assert ended.output.startswith(f"{COUNT} images, {COUNT - BATCH} of them now, 4 of these damaged; ")
    found = read()
    expected = outputs(apply_tome(vit, 3))
    for index, row in enumerate(found):
        if index in (4, 9, 10, 11):
            assert [row[name] for name in ("label", "label_id", "score", "labels", "scores")] == [None] * 5
            assert f"The image {index}.png in the column 'image' cannot be read: " in row["reason"]
        else:
            assert (row["label_id"], row["reason"]) == (int(expected[index].argmax()), None)


def test_images_of_several_sizes_need_a_processor_that_resizes(refused, vit, tmp_path):
    hf.ViTImageProcessorPil(do_resize=False).save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    for index, side in enumerate((32, 40)):
        Image.new("RGB", (side, side)).save(tmp_path / f"images/{index}.png")
    line = refused("predict", *MODEL, "--dataset_name", "images", "--output", "out")
    assert "The image of row 1 becomes an input of the shape (3, 40, 40), that of row 0 one of (3, 32, 32)" in line


# -- streams and shards -------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, vit):
    """The same data in a folder of three files."""
    (tmp_path / "data").mkdir()
    for number, (first, end) in enumerate(((0, 5), (5, 6), (6, COUNT))):
        save_data(tmp_path / f"data/{number}.parquet", first, end)
    return ["--dataset_name", "data", "--batch_size", BATCH, "--keep_columns", "id"]


def test_a_stream_gives_what_a_table_gives(run, vit, files):
    for output, streaming in (("table", []), ("stream", ["--streaming"])):
        assert run("predict", *MODEL, *files, "--output", output, *streaming).code == 0
    assert pq.read_table("stream").equals(pq.read_table("table"))
    expect(read("stream"), apply_tome(vit, 3))


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_shards_together_are_the_whole(run, refused, vit, files, streaming, tmp_path):
    assert run("predict", *MODEL, *files, "--output", "whole").code == 0
    whole = read("whole")
    for index in (1, 0):
        arguments = [*MODEL, *files, "--output", "out", *streaming, "--num_shards", 2, "--shard_index", index]
        assert run("predict", *arguments).code == 0
    found = read()
    assert [row["id"] for row in found] == [row["id"] for row in whole]
    for row, expected in zip(found, whole, strict=True):
        assert (row["label"], row["label_id"], row["path"]) == (
            expected["label"],
            expected["label_id"],
            expected["path"],
        )
        assert row["scores"] == pytest.approx(expected["scores"], rel=1e-5)
        if not streaming:
            assert row["row"] == expected["row"]
    state = json.loads((tmp_path / "out/.tocom-predictions-shard-00001-of-00002.json").read_text())
    assert state["finished"]
    line = refused("predict", *MODEL, "--dataset_name", "data", "--output", "out", "--num_shards", 2)
    assert "keep_columns is {'id': 'id'} there and {} now" in line


def test_a_shard_is_one_of_those_that_there_are(refused, vit):
    assert "--shard_index must be one of 0 to 1, got 2" in refused(
        "predict", *MODEL, *DATA, "--num_shards", 2, "--shard_index", 2
    )
    line = refused("predict", *MODEL, *DATA, "--streaming", "--num_shards", 2)
    assert "The stream is read as 1 file, of which each shard takes some, so that 2 shards are too many" in line
