# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Which images the spread of features is taken from."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from helpers.distillation import Noise

from tocom_hf.distillation import whitening
from tocom_hf.distillation.objectives import OBJECTIVES
from tocom_hf.errors import DatasetError, UnreadableImageError


class Distiller:
    """Features that are the pixels themselves."""

    def __init__(self):
        self.objective = OBJECTIVES["whitened_features"]

    def run(self, pixel_values, source_r, target_r):
        return pixel_values[:, :, ::8, ::8].flatten(1)


def metric_of(dataset, accelerator):
    distiller = Distiller()
    args = SimpleNamespace(seed=0, skip_damaged=False, source_r=None, per_device_train_batch_size=4)
    whitening.fit_objective(distiller, dataset, args, accelerator, None, None)
    return distiller.objective.metric


class OneOfSeveral:
    """One of several processes, of which all do their part before they gather."""

    is_main_process = False
    device = torch.device("cpu")

    def __init__(self, process_index, num_processes, gathered):
        self.process_index, self.num_processes, self.gathered = process_index, num_processes, gathered

    def autocast(self):
        return torch.autocast("cpu", enabled=False)

    def gather(self, features):
        self.gathered[self.process_index] = features
        return torch.cat([self.gathered[index] for index in sorted(self.gathered)])


@pytest.mark.parametrize(("images", "processes"), [(32, 3), (7, 4)])
def test_it_is_the_same_on_any_number_of_processes(monkeypatch, images, processes):
    monkeypatch.setattr(whitening, "_IMAGES", 20)
    expected = metric_of(Noise(images), Accelerator())
    gathered = {index: torch.zeros(-(-min(images, 20) // processes), 48) for index in range(processes)}
    for index in range(processes):
        found = metric_of(Noise(images), OneOfSeveral(index, processes, gathered))
    torch.testing.assert_close(found, expected)


def test_an_image_that_cannot_be_read_is_named_with_a_way_out():
    class Damaged(Noise):
        def __getitem__(self, index):
            raise UnreadableImageError("The image x.png in the column 'image' cannot be read.")

    with pytest.raises(DatasetError, match=r"x.png .* cannot be read. Or set skip_damaged."):
        metric_of(Damaged(), Accelerator())
