# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The order in which distillation sees images: the same whatever the number of processes, and resumable anywhere."""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import IterableDataset as HubStream
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from transformers.utils import logging

from tocom_hf.distillation.keyed_random import image_keys
from tocom_hf.errors import DatasetError, UnreadableImageError


logger = logging.get_logger(__name__)

_MAX_DAMAGED = 10  # damaged images in a row that are passed over


class TrainingOrder(Sampler[int]):
    """The images of a whole training, epoch after epoch, each epoch in an order of its own.

    An image is named by its position `epoch * count + index`. A global batch is a run of positions in this order, of
    which each process takes its part; the images of an epoch that do not fill a global batch are left out of it.

    Args:
        count: Images of the data set.
        global_batch: Images of one step, over all processes.
        seed: Decides the order.
        steps: Steps of the training.
        start: Steps that were already done.
    """

    def __init__(self, count: int, global_batch: int, seed: int, steps: int, start: int = 0):
        self.count, self.global_batch, self.seed, self.steps, self.start = count, global_batch, seed, steps, start

    def __len__(self) -> int:
        return (self.steps - self.start) * self.global_batch

    def __iter__(self) -> Iterator[int]:
        per_epoch = self.count // self.global_batch
        order, known = torch.empty(0, dtype=torch.long), -1
        for step in range(self.start, self.steps):
            epoch, batch = divmod(step, per_epoch)
            if epoch != known:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order, known = torch.randperm(self.count, generator=generator), epoch
            chosen = order[batch * self.global_batch : (batch + 1) * self.global_batch]
            yield from (epoch * self.count + chosen).tolist()


class KeyedImages(Dataset):
    """Images by their position in a `TrainingOrder`, each with the key that everything random about it comes from.

    Args:
        dataset: Samples with `pixel_values`, or `TrainingImages`.
        seed: Seed of the training.
        skip_damaged: Take another image in the place of one that is damaged. Which one is a function of the position,
            so it is the same whichever process or worker finds the damage. Samples then tell how many images were
            passed over for them.
    """

    def __init__(self, dataset: Any, seed: int, skip_damaged: bool = False):
        self.dataset, self.seed, self.skip_damaged = dataset, seed, skip_damaged

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        epoch, index = divmod(position, len(self.dataset))
        if not self.skip_damaged:
            return _keyed_sample(self.dataset, index, self.seed, epoch, index)
        chosen = index
        for damaged in itertools.count():
            try:
                sample = _keyed_sample(self.dataset, chosen, self.seed, epoch, index)
                return {**sample, "damaged": torch.tensor(damaged)}
            except UnreadableImageError as error:
                _pass_over(error, damaged + 1)
            # numbered from 1: a seed that ends in 0 is the one without it, which decides the view
            draw = np.random.default_rng((self.seed, epoch, index, damaged + 1))
            chosen = int(draw.integers(len(self.dataset)))
        raise AssertionError  # the loop has no end


@dataclass
class StreamState:
    """How far one process has read a stream.

    Attributes:
        next_worker: The worker that the next batch comes from; they take turns.
        done: For each worker, the epoch that it is in and the samples of this epoch that it has delivered.
    """

    next_worker: int = 0
    done: dict[int, tuple[int, int]] = field(default_factory=dict)

    def to_list(self) -> list[list[int]]:
        """As a list that JSON can hold."""
        return [[self.next_worker], *([worker, *place] for worker, place in sorted(self.done.items()))]

    @classmethod
    def from_list(cls, content: list[list[int]]) -> "StreamState":
        [next_worker], *done = content
        return cls(next_worker, {worker: (epoch, count) for worker, epoch, count in done})


class KeyedStream(IterableDataset):
    """The part of a stream that one process reads, epoch after epoch without end.

    Shards are split over processes and, within each, over loading workers. Every sample tells where in the stream it
    is, which is what a checkpoint remembers.

    Args:
        images: `TrainingImages` over a `datasets.IterableDataset`.
        seed: Seed of the training.
        process_index, num_processes: Which part to read.
        batch_size: Samples of a batch; each worker delivers whole batches.
        shuffle_buffer_size: Samples that are shuffled among each other; shards are shuffled anyhow.
        state: Where to go on.
        skip_damaged: Pass over damaged images. Samples then tell how many there were since the one before.
    """

    def __init__(
        self,
        images: Any,
        seed: int,
        process_index: int,
        num_processes: int,
        batch_size: int,
        shuffle_buffer_size: int,
        state: StreamState | None = None,
        skip_damaged: bool = False,
    ):
        self.images, self.seed, self.skip_damaged = images, seed, skip_damaged
        self.process_index, self.num_processes = process_index, num_processes
        self.stream: HubStream = split_dataset_by_node(images.images, rank=process_index, world_size=num_processes)
        self.shuffle_buffer_size = shuffle_buffer_size
        self.batch_size, self.state = batch_size, state or StreamState()

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        if worker < self.state.next_worker:
            # the loader asks its workers in turn, beginning with the first, but it is a later one's turn
            blank = {"pixel_values": torch.empty(0), "key": torch.tensor(0), "place": torch.tensor([worker, -1, 0])}
            blank |= {"damaged": torch.tensor(0)} if self.skip_damaged else {}
            yield from itertools.repeat(blank, self.batch_size)
        first_epoch, done = self.state.done.get(worker, (0, 0))
        # here, so that it is the worker's own: a stream keeps its epoch in memory that it shares with all workers, and
        # one of them would begin its epoch in the order of another that is ahead
        stream = self.stream.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer_size)
        damaged = 0
        for epoch in itertools.count(first_epoch):
            stream.set_epoch(epoch)
            count = 0
            for count, sample in enumerate(stream, start=1):
                if epoch == first_epoch and count <= done:
                    continue
                index = (count * num_workers + worker) * self.num_processes + self.process_index
                try:
                    keyed = _keyed_sample(self.images, sample, self.seed, epoch, index)
                except UnreadableImageError as error:
                    if not self.skip_damaged:
                        raise
                    damaged += 1
                    _pass_over(error, damaged)
                    continue
                if self.skip_damaged:
                    keyed["damaged"] = torch.tensor(damaged)
                damaged = 0
                yield {**keyed, "place": torch.tensor([worker, epoch, count])}
            if count == 0:
                raise DatasetError(
                    f"The stream has no images for worker {worker} of process {self.process_index}. "
                    "Use fewer processes or dataloader_num_workers, or split the data set into more files."
                )


class TrainingLoader:
    """Batches of keyed images for one process, from the step where a run starts or goes on.

    Args:
        dataset: Samples with `pixel_values`, or `TrainingImages` over a data set or a stream.
        args: `DistillationArguments`.
        accelerator: Of this process.
        global_batch: Images of one step, over all processes.
        steps: Steps of the training.
        start: Steps that were already done.
        stream_state: Where in the stream to go on.

    Attributes:
        stream_state: How far the stream was read for the batches delivered so far.
        damaged: Images that were passed over for them, with `args.skip_damaged`; int64 `()` on the device.
    """

    def __init__(
        self,
        dataset: Any,
        args: Any,
        accelerator: Accelerator,
        global_batch: int,
        steps: int,
        start: int = 0,
        stream_state: StreamState | None = None,
    ):
        self.accelerator, self.stream_state = accelerator, copy.deepcopy(stream_state or StreamState())
        self.damaged = torch.zeros((), dtype=torch.long, device=accelerator.device)
        settings: dict[str, Any] = {
            "batch_size": args.per_device_train_batch_size,
            "num_workers": args.dataloader_num_workers,
            "pin_memory": accelerator.device.type == "cuda",
        }
        if is_stream(dataset):
            process = accelerator.process_index, accelerator.num_processes
            stream = KeyedStream(
                dataset,
                args.seed,
                *process,
                args.per_device_train_batch_size,
                args.shuffle_buffer_size,
                stream_state,
                args.skip_damaged,
            )
            shards = max(stream.stream.num_shards, 1)
            if args.dataloader_num_workers > shards:
                logger.warning("Reading with %d workers: a process has no more files than that.", shards)
                settings["num_workers"] = shards
            self._num_workers = max(settings["num_workers"], 1)
            self._loader = DataLoader(stream, **settings)
        else:
            order = TrainingOrder(len(dataset), global_batch, args.seed, steps, start)
            loader = DataLoader(KeyedImages(dataset, args.seed, args.skip_damaged), sampler=order, **settings)
            self._loader = accelerator.prepare_data_loader(loader)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        device = self.accelerator.device
        for batch in self._loader:
            if "place" in batch:
                worker, epoch, count = batch.pop("place")[-1].tolist()
                if epoch < 0:
                    continue
                self.stream_state.done[worker] = (epoch, count)
                self.stream_state.next_worker = (worker + 1) % self._num_workers
            batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
            if "damaged" in batch:
                self.damaged += batch.pop("damaged").sum()
            yield batch


def is_stream(dataset: Any) -> bool:
    """Whether images come one after the other, without a length."""
    return isinstance(getattr(dataset, "images", dataset), HubStream)


def _keyed_sample(dataset: Any, sample: Any, seed: int, epoch: int, index: int) -> dict[str, torch.Tensor]:
    if hasattr(dataset, "view"):
        pixel_values = dataset.view(sample, np.random.default_rng((seed, epoch, index)))
    else:
        pixel_values = dataset[sample]["pixel_values"]
    return {"pixel_values": pixel_values, "key": image_keys(seed, torch.tensor(epoch), torch.tensor(index))}


def _pass_over(error: UnreadableImageError, in_a_row: int) -> None:
    """Say that an image is left out, once in each process, and give up where too many are."""
    if in_a_row > _MAX_DAMAGED:
        raise DatasetError(
            f"{in_a_row} images in a row are damaged, too many to pass over all of them. The last one: {error}"
        ) from error
    logger.warning_once(f"Passed over: {error}")
