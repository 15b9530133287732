# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Distils a tiny model on a parquet file of images, in one of several processes.

A launcher runs it as `distill_worker.py settings.json`; the fork server calls `main` with the settings.
"""

import json
import os
import signal
import sys

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import ViTImageProcessorPil

from helpers.models import make_model
from tocom_hf.data.images import TrainingImages, load_images
from tocom_hf.distillation.distill import DistillationArguments, distill
from tocom_hf.merging.backbones import find_backbone


class ShardingAccelerator(Accelerator):
    """Shards on CPUs as Accelerate does with FSDP, which it offers on GPUs only."""

    @property
    def distributed_type(self):
        return DistributedType.FSDP

    def prepare(self, model):
        for layer in find_backbone(model).layers:
            fully_shard(layer)
        fully_shard(model)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        return model


def main(settings):
    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = settings["cache"]
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # which it waits for its threads in every epoch of a stream
    images = load_images(settings["images"], streaming=settings.get("streaming", False))
    dataset = TrainingImages(images, ViTImageProcessorPil(size={"height": 32, "width": 32}))
    kill_at = settings.get("kill_at")
    # None for all processes
    kill_rank = settings.get("kill_rank")
    if kill_at is not None and kill_rank in (None, int(os.environ.get("RANK", "0"))):
        step = torch.optim.AdamW.step
        calls = []

        def die(*args, **kwargs):
            calls.append(1)
            if len(calls) == kill_at + 1:
                os.kill(os.getpid(), getattr(signal, settings["signal"]))
            return step(*args, **kwargs)

        torch.optim.AdamW.step = die
    accelerator = ShardingAccelerator(cpu=True) if settings.get("shard") else Accelerator(cpu=True)
    arguments = dict(settings["arguments"])
    if "output_dir" in arguments:
        # a folder for each process, where a test names one
        arguments["output_dir"] = arguments["output_dir"].format(rank=os.environ.get("RANK", "0"))
    plugins = distill(make_model(), dataset, DistillationArguments(**arguments), accelerator)
    if accelerator.is_main_process:
        plugins.save_pretrained(settings["plugins"])
    accelerator.end_training()


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        main(json.load(file))
