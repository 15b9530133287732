# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Data sets of small clips, and processors for them that need no torchvision."""

import datasets
import numpy as np
import transformers as hf
from PIL import Image


def make_frames(count, seed=0, size=(24, 20)):
    """Random frames as PIL images."""
    generator = np.random.default_rng(seed)
    width, height = size
    return [Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8)) for _ in range(count)]


def save_clips(path, lengths, labels=None, names=None, column="clip"):
    """A parquet file of random clips with so many frames each, and their labels: the path as a text."""
    content = {column: [make_frames(length, seed) for seed, length in enumerate(lengths)]}
    features = {column: datasets.List(datasets.Image())}
    if labels is not None:
        content["label"] = labels
        features["label"] = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    datasets.Dataset.from_dict(content, datasets.Features(features)).to_parquet(path)
    return str(path)


def clip_processor(processor_class=hf.VideoMAEImageProcessorPil, side=16):
    """For clips of this height and width."""
    return processor_class(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
