# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Clips: rows that are lists of images or videos become the frames that a model takes."""

import pickle
import sys
import types
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers as hf
from helpers.clips import clip_processor, make_frames, save_clips
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from tocom_hf import ArgumentError, DatasetError, UnreadableImageError
from tocom_hf.data.clips import TrainingClips, draw_frames, load_clips, with_clip_values
from tocom_hf.data.images import TrainingImages
from tocom_hf.data.tasks import load_labelled, require_disjoint
from tocom_hf.distillation.augmentation import Augmentation, augment
from tocom_hf.errors import MissingExtraError


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def parquet(tmp_path):
    return save_clips(tmp_path / "clips.parquet", [8, 9, 20, 13], [0, 1, 1, 0])


@pytest.mark.parametrize(("total", "num_frames"), [(8, 8), (9, 8), (23, 8), (300, 16), (16, 1), (1000, 64)])
def test_frames_are_drawn_as_video_processors_draw_them(total, num_frames):
    expected = default_sample_indices_fn(VideoMetadata(total_num_frames=total), num_frames=num_frames)
    assert draw_frames(total, num_frames) == expected.tolist()


@pytest.mark.parametrize("processor_class", [hf.VideoMAEImageProcessorPil, hf.VivitImageProcessor])
def test_clips_are_what_the_processor_makes_of_their_frames(parquet, processor_class):
    processor = clip_processor(processor_class)
    clips = load_clips(parquet, image_column="clip", label_column="label")
    processed = with_clip_values(clips, processor, 8, image_column="clip", label_column="label")
    frames = [make_frames(20, seed=2)[index] for index in (0, 2, 5, 7, 10, 12, 15, 17)]
    assert torch.equal(processed[2]["pixel_values"], processor(frames, return_tensors="pt")["pixel_values"][0])
    assert processed[2]["pixel_values"].shape == (8, 3, 16, 16)
    assert processed[1:3]["labels"] == [1, 1]


@pytest.mark.parametrize("feature", [datasets.LargeList(datasets.Image()), datasets.List(datasets.Image(), length=9)])
def test_every_kind_of_list_is_a_clip(tmp_path, feature):
    data = datasets.Dataset.from_dict({"image": [make_frames(9)]}, datasets.Features({"image": feature}))
    data.to_parquet(tmp_path / "clips.parquet")
    processed = with_clip_values(load_clips(str(tmp_path / "clips.parquet")), clip_processor(), 8)
    assert processed[0]["pixel_values"].shape == (8, 3, 16, 16)


def test_a_limit_draws_clips_and_always_the_same(tmp_path):
    path = save_clips(tmp_path / "many.parquet", [1] * 20, list(range(20)))
    drawn = load_clips(path, image_column="clip", label_column="label", max_samples=5)
    assert drawn["label"][:] == load_clips(path, image_column="clip", label_column="label", max_samples=5)["label"][:]
    assert drawn["label"][:] != [0, 1, 2, 3, 4]


def test_clips_are_not_written_anew(parquet, monkeypatch):
    clips = load_clips(parquet, image_column="clip").select([3, 1])
    monkeypatch.setattr(datasets.Dataset, "map", lambda *_, **__: pytest.fail("copied"))
    processed = with_clip_values(clips, clip_processor(), 8, image_column="clip")
    frames = [make_frames(13, seed=3)[index * 13 // 8] for index in range(8)]
    assert torch.equal(processed[0]["pixel_values"], clip_processor()(frames, return_tensors="pt")["pixel_values"][0])
    assert len(TrainingClips(clips, clip_processor(), 8, image_column="clip").select([1])) == 1


def test_short_clips_are_refused_as_video_processors_refuse_them(tmp_path):
    with pytest.raises(ValueError, match="exceeds total_num_frames"):
        default_sample_indices_fn(VideoMetadata(total_num_frames=7), num_frames=8)
    clips = load_clips(save_clips(tmp_path / "clips.parquet", [8, 7]), image_column="clip")
    processed = with_clip_values(clips, clip_processor(), 8, image_column="clip")
    assert processed[0]["pixel_values"].shape[0] == 8
    with pytest.raises(DatasetError, match=r"The clip .* in the column 'clip' has 7 frames, and the model takes 8\."):
        processed[1]


@pytest.mark.parametrize("clip", [None, []])
def test_missing_clips_are_named(clip):
    features = datasets.Features({"image": datasets.List(datasets.Image())})
    data = datasets.Dataset.from_dict({"image": [clip]}, features)
    with pytest.raises(UnreadableImageError, match="'image' has a sample without a clip"):
        with_clip_values(data, clip_processor(), 8)[0]


def test_damaged_frames_are_named_and_those_that_are_not_seen_are_not_read(tmp_path):
    paths = []
    for index, frame in enumerate(make_frames(16)):
        paths.append(str(tmp_path / f"{index}.png"))
        frame.save(paths[-1])
    (tmp_path / "3.png").write_bytes(b"no picture")
    features = datasets.Features({"image": datasets.List(datasets.Image())})
    processed = with_clip_values(datasets.Dataset.from_dict({"image": [paths]}, features), clip_processor(), 8)
    assert processed[0]["pixel_values"].shape[0] == 8
    (tmp_path / "4.png").write_bytes(b"no picture")
    with pytest.raises(UnreadableImageError, match=r"4\.png in the column 'image' cannot be read"):
        processed[0]


def test_frames_of_several_sizes_are_no_clip():
    frames = [*make_frames(7), *make_frames(1, size=(9, 9))]
    data = datasets.Dataset.from_dict(
        {"image": [frames]}, datasets.Features({"image": datasets.List(datasets.Image())})
    )
    with pytest.raises(DatasetError, match="frames of several sizes: 9 x 9 and 24 x 20 pixels"):
        with_clip_values(data, clip_processor(), 8)[0]


def test_images_are_no_clips(tmp_path):
    data = datasets.Dataset.from_dict({"image": make_frames(2)}).cast_column("image", datasets.Image())
    data.to_parquet(tmp_path / "images.parquet")
    with pytest.raises(DatasetError, match=r"holds Image.*, not clips\. Name the clip column with --image_column"):
        load_clips(str(tmp_path / "images.parquet"))
    with pytest.raises(
        DatasetError, match=r"no column 'video'; it has image\. Name the clip column with --image_column"
    ):
        load_clips(str(tmp_path / "images.parquet"), image_column="video")


def test_processors_of_images_are_refused(parquet):
    clips = load_clips(parquet, image_column="clip")
    processed = with_clip_values(clips, hf.ViTImageProcessorPil(), 8, image_column="clip")
    with pytest.raises(ArgumentError, match=r"ViTImageProcessorPil makes .* expected \(1, 8, 3, height, width\)"):
        processed[0]


def test_processed_clips_can_go_to_worker_processes(parquet):
    clips = load_clips(parquet, image_column="clip")
    processed = with_clip_values(clips, clip_processor(), 8, image_column="clip")
    assert torch.equal(pickle.loads(pickle.dumps(processed))[1]["pixel_values"], processed[1]["pixel_values"])


def test_clips_in_two_splits_are_found(parquet):
    load = lambda split: load_labelled(parquet, split, image_column="clip", load=load_clips)[0]  # noqa: E731
    require_disjoint(load("train[:2]"), load("train[2:]"))
    with pytest.raises(DatasetError, match="1 images are in the validation split and in the test split"):
        require_disjoint(load("train[:2]"), load("train[1:]"))


def test_views_show_the_same_part_of_all_frames(parquet):
    processor = clip_processor()
    views = TrainingClips(load_clips(parquet, image_column="clip"), processor, 8, image_column="clip", min_crop=0.2)
    view = views.view(2, np.random.default_rng(5))
    assert view.dtype == torch.uint8
    frames = [make_frames(20, seed=2)[index] for index in (0, 2, 5, 7, 10, 12, 15, 17)]
    images = datasets.Dataset.from_dict({"image": frames}).cast_column("image", datasets.Image())
    alone = TrainingImages(images, processor, min_crop=0.2)
    assert torch.equal(view, torch.stack([alone.view(index, np.random.default_rng(5)) for index in range(8)]))
    assert views.select([2])[0]["pixel_values"].shape == (8, 3, 16, 16)


@pytest.mark.parametrize(
    "processor",
    [
        clip_processor(),
        clip_processor(hf.VivitImageProcessor),
        hf.VivitImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_normalize=False),
    ],
)
def test_whole_views_are_normalised_as_the_processor_does(processor):
    """ViViT's scales to [-1, 1] before it normalises."""
    frames = make_frames(8, size=(16, 16))
    data = datasets.Dataset.from_dict(
        {"image": [frames]}, datasets.Features({"image": datasets.List(datasets.Image())})
    )
    views = TrainingClips(data, processor, 8)
    expected = processor(frames, return_tensors="pt")["pixel_values"].float()
    batch, keys = views[0]["pixel_values"][None], torch.zeros(1, dtype=torch.int64)
    found = augment(batch, keys, Augmentation(), views.image_mean, views.image_std)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@dataclass
class FakeDecoder:
    """What torchcodec makes of a video, without its frames' file."""

    frames: Any

    def __len__(self):
        return len(self.frames)

    def get_frames_at(self, indices):
        return types.SimpleNamespace(data=torch.stack([self.frames[index] for index in indices]))


@pytest.fixture
def videos(monkeypatch, tmp_path):
    """A folder of two videos that a stand-in for torchcodec decodes, one of them damaged."""
    frames = torch.stack([torch.from_numpy(np.array(frame)) for frame in make_frames(20)])

    def decode_example(feature, value, token_per_repo_id=None):
        assert feature.dimension_order == "NHWC"
        if value["path"].endswith("damaged.mp4"):
            raise RuntimeError("no moov atom\nat all")
        return FakeDecoder(frames)

    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", types.ModuleType("torchcodec.decoders"))
    monkeypatch.setattr(datasets.Video, "decode_example", decode_example)
    (tmp_path / "videos").mkdir()
    for name in ("damaged.mp4", "good.mp4"):
        (tmp_path / "videos" / name).write_bytes(b"a video")
    return str(tmp_path / "videos")


def test_videos_are_decoded_at_the_frames_that_are_drawn(videos):
    clips, processor = load_clips(videos, image_column="video"), clip_processor()
    frames = [make_frames(20)[index] for index in (0, 5, 10, 15)]
    processed = with_clip_values(clips, processor, 4, image_column="video")
    assert torch.equal(processed[1]["pixel_values"], processor(frames, return_tensors="pt")["pixel_values"][0])
    with pytest.raises(UnreadableImageError, match=r"The clip .*damaged.mp4 .* cannot be read: no moov atom\. Repair"):
        processed[0]
    with pytest.raises(DatasetError, match=r"The clip .*good.mp4 .* has 20 frames, and the model takes 32"):
        with_clip_values(clips, processor, 32, image_column="video")[1]


def test_grey_models_get_grey_frames(videos):
    processor = hf.VideoMAEImageProcessorPil(do_normalize=False, do_resize=False, do_center_crop=False)
    clips = load_clips(videos, image_column="video")
    values = with_clip_values(clips, processor, 4, image_column="video", num_channels=1)[1]["pixel_values"]
    grey = np.stack([np.array(make_frames(20)[index].convert("L")) for index in (0, 5, 10, 15)])
    torch.testing.assert_close(values[:, 0], torch.from_numpy(grey) / 255)


def test_videos_without_their_decoder_are_refused_before_any_is_read(videos, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(
        MissingExtraError, match=r"'video' holds videos, which torchcodec decodes.*pip install torchcodec"
    ):
        load_clips(videos, image_column="video")
