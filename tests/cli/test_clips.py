# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Commands read clips for models of video as they read images for others, or say why they do not."""

import json

import pytest
import torch
import transformers as hf
from helpers.clips import clip_processor, make_frames, save_clips
from helpers.families import videomae, vivit, vjepa2
from helpers.models import make_plugins
from PIL import Image

from tocom_hf import MergeRecipe, PluginSet, TocomModel, apply_tome


NAMES = ["run", "walk", "jump"]


def checkpoint(folder, model, processor):
    model.config.id2label = dict(enumerate(NAMES))
    model.config.label2id = {name: index for index, name in enumerate(NAMES)}
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def clip_model(tmp_path):
    """VideoMAE with large weights, so that its answers differ from clip to clip."""
    torch.manual_seed(0)
    model = hf.VideoMAEForVideoClassification(videomae(num_labels=3, num_hidden_layers=2, initializer_range=0.3)).eval()
    checkpoint(tmp_path / "model", model, clip_processor())
    make_plugins(model).save_pretrained(tmp_path / "plugins")
    return model


def right(model, lengths, labels):
    """How many clips a model gets right: those of `save_clips` with 8 frames, drawn and processed by hand."""
    total = 0
    for seed, (length, label) in enumerate(zip(lengths, labels, strict=True)):
        frames = [make_frames(length, seed)[i * length // 8] for i in range(8)]
        with torch.no_grad():
            total += int(model(**clip_processor()(frames, return_tensors="pt")).logits.argmax() == label)
    return total


def test_evaluate_counts_clips_that_are_classified_right(run, clip_model, tmp_path):
    lengths, labels = [8, 11, 16, 9, 30, 8, 12, 13], [0, 1, 2, 0, 1, 2, 0, 1]
    # the data set counts its classes in another order than the checkpoint
    order = ["jump", "run", "walk"]
    save_clips(tmp_path / "clips.parquet", lengths, [order.index(NAMES[label]) for label in labels], order)
    ended = run(
        "evaluate", "--checkpoints", "model", "--source_r", 0, "--plugins", "plugins", "--dataset_name",
        "clips.parquet", "--test_split", "test[:5]", "--validation_split", "test[5:]", "--image_column", "clip",
        "--target_r", 0, 5, "--scales", 0.1, "--per_device_eval_batch_size", 2, "--speed_rounds", 1,
        "--output_dir", "results",
    )  # fmt: skip
    assert ended.code == 0, ended
    report = json.loads((tmp_path / "results/grid.json").read_text())
    assert report["settings"]["test"] == "test[:5], 5 clips"
    assert "| clips/s (speed-up) |" in ended.output
    plain = [right(apply_tome(clip_model, r), lengths[:5], labels[:5]) / 5 for r in (0, 5)]
    for r, share in zip((0, 5), plain, strict=True):
        assert f"r 0 -> {r}: plain {share:.2%}" in ended.output


def test_find_recipe_chooses_by_clips(run, clip_model, tmp_path):
    save_clips(tmp_path / "clips.parquet", [8, 9, 10, 11])
    ended = run(
        "find-recipe", "--model_name_or_path", "model", "--dataset_name", "clips.parquet", "--image_column", "clip",
        "--degrees", 4, "--max_evaluations", 1, "--output_dir", "found",
    )  # fmt: skip
    assert ended.code == 0, ended
    apply_tome(clip_model, 4, recipe=MergeRecipe.load(tmp_path / "found/recipe.json"))


def test_fit_scales_fits_to_clips(run, clip_model, tmp_path):
    save_clips(tmp_path / "clips.parquet", [8, 9, 10, 11])
    ended = run(
        "fit-scales", "--model_name_or_path", "model", "--plugins", "plugins", "--source_r", 0, "--target_r", 4,
        "--dataset_name", "clips.parquet", "--image_column", "clip", "--max_steps", 2, "--output_dir", "fitted",
    )  # fmt: skip
    assert ended.code == 0, ended
    fitted = PluginSet.from_pretrained(tmp_path / "fitted")
    assert fitted.config.training["num_images"] == 4
    TocomModel.from_pretrained(tmp_path / "model", plugins=fitted, source_r=0, target_r=4)


# datasets sleeps for seconds at the end of every pass over a stream
@pytest.mark.parametrize("streaming", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_distill_learns_from_clips(run, clip_model, tmp_path, streaming):
    (tmp_path / "data").mkdir()
    for split, lengths in (("train", [8, 9, 10, 11]), ("test", [12, 13])):
        save_clips(tmp_path / f"data/{split}.parquet", lengths)
    ended = run(
        "distill", "--model_name_or_path", "model", "--dataset_name", "data", "--image_column", "clip",
        "--eval_split", "test", "--streaming", streaming, "--max_r", 2, "--max_steps", 4, "--random_erasing", 1.0,
        "--per_device_train_batch_size", 2, "--mixup", 0.5, "--learning_rate", 0.1, "--output_dir", "distilled",
    )  # fmt: skip
    assert ended.code == 0, ended
    plugins = PluginSet.from_pretrained(tmp_path / "distilled")
    assert len(plugins.config.training["agreement"]["degrees"]) == 3
    TocomModel.from_pretrained(tmp_path / "model", plugins=plugins, source_r=0, target_r=2)
    assert any(factors.lora_B.any() for index in (0, 1) for factors in plugins.adapter(index).values())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--randaugment_num_ops", "2"], "RandAugment is for images; leave it out for clips: --randaugment_num_ops 0"),
        (["--image_size", "32"], "Models of clips take them at the size of their configuration only"),
    ],
)
def test_distill_refuses_what_is_for_images_alone(refused, clip_model, option, message):
    arguments = ["--model_name_or_path", "model", "--dataset_name", "none", "--max_r", "2", "--output_dir", "out"]
    assert message in refused("distill", *arguments, *option)


def test_calibrate_and_merge_report_count_clips(run, tmp_path):
    checkpoint(
        tmp_path / "model", hf.VivitForVideoClassification(vivit(num_labels=3)), clip_processor(hf.VivitImageProcessor)
    )
    ended = run("merge-report", "model", "--target_r", "0", "9", "--seconds", "0")
    assert ended.code == 0, ended
    assert "VivitForVideoClassification" in ended.output
    ended = run("calibrate", "model", "--target_r", "9", "--seconds", "0", "--output", "calibration.json")
    assert ended.code == 0, ended
    assert (tmp_path / "calibration.json").is_file()


def test_images_are_not_taken_for_clips(refused, clip_model, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "images/a.png")
    arguments = ["--model_name_or_path", "model", "--dataset_name", "images", "--degrees", 2, "--output_dir", "found"]
    error = refused("find-recipe", *arguments)
    assert "DatasetError: The column 'image' of 'images' holds Image(" in error
    assert error.endswith("not clips. Name the clip column with --image_column.")


def test_video_processors_need_torchvision(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_torchvision_available", lambda: False)
    hf.VJEPA2ForVideoClassification(vjepa2()).save_pretrained(tmp_path / "model")
    (tmp_path / "model/video_preprocessor_config.json").write_text('{"video_processor_type": "VJEPA2VideoProcessor"}')
    save_clips(tmp_path / "clips.parquet", [8], [0])
    error = refused(
        "evaluate", "--checkpoints", "model", "--dataset_name", "clips.parquet", "--target_r", 0, "--output_dir", "out",
        "--image_column", "clip", "--test_split", "train", "--source_r", 0,
    )  # fmt: skip
    assert "the video processors of transformers need torchvision" in error
    assert error.endswith("Run: pip install torchvision")


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (clip_processor(side=32), "makes frames of 32 x 32 pixels, but the model takes 16 x 16. Correct size and crop"),
        (hf.VideoMAEImageProcessorPil(do_resize=False, do_center_crop=False), "makes frames of 16 x 32 pixels"),
        (hf.ViTImageProcessorPil(size={"height": 16, "width": 16}), "of one clip; expected (1, 8, 3, height, width)"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "distill"])
def test_processors_must_fit_the_model_before_data_are_loaded(
    refused, clip_model, tmp_path, command, processor, message
):
    processor.save_pretrained(tmp_path / "model")
    arguments = {
        "evaluate": ["--checkpoints", "model", "--dataset_name", "user/none", "--target_r", 0],
        "distill": ["--model_name_or_path", "model", "--dataset_name", "user/none", "--max_r", 2],
    }
    assert message in refused(command, *arguments[command], "--output_dir", "out")


def test_checkpoints_of_images_and_of_clips_are_not_mixed(refused, clip_model, tmp_path):
    hf.ViTForImageClassification(
        hf.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path / "image")
    arguments = ["--dataset_name", "clips.parquet", "--target_r", "0", "--output_dir", "out"]
    error = refused("evaluate", "--checkpoints", "image", "model", *arguments)
    assert "ArgumentError: image takes images and model takes clips" in error


def test_models_of_spectrograms_are_refused(refused, tmp_path):
    config = hf.ASTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    hf.ASTModel(config).save_pretrained(tmp_path / "model")
    arguments = ["--model_name_or_path", "model", "--dataset_name", "images", "--degrees", 2, "--output_dir", "found"]
    assert "takes spectrograms (audio-spectrogram-transformer), and this command reads images and clips" in refused(
        "find-recipe", *arguments
    )


def test_visualize_refuses_models_of_clips(refused, clip_model):
    arguments = ["--model_name_or_path", "model", "--images", "a.png", "--output", "out.png"]
    assert "takes clips (videomae), and this command reads images only" in refused("visualize", *arguments)
