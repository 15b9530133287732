# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The loop of a distillation: steps, checkpoints, signals, figures.

Only the plugins' gradients travel between processes, in one reduction per step together with the loss. The frozen
weights never do.
"""

import copy
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers.utils import logging

from tocom_hf.distillation.agreement import agreement_sums, held_out_batches, warn_of_harm
from tocom_hf.distillation.arguments import DistillationArguments
from tocom_hf.distillation.augmentation import augment
from tocom_hf.distillation.degrees import DegreePair, find_sampler
from tocom_hf.distillation.figures import Figures
from tocom_hf.distillation.order import StreamState, TrainingLoader, is_stream
from tocom_hf.distillation.run_state import RunState
from tocom_hf.distillation.stop_signal import StopSignal
from tocom_hf.distillation.student import SelfDistiller
from tocom_hf.distillation.whitening import fit_objective
from tocom_hf.errors import (
    CheckpointError,
    DatasetError,
    DistillationError,
    DistillationInterrupted,
    UnreadableImageError,
)
from tocom_hf.plugins.agreement import AgreementGrid


logger = logging.get_logger(__name__)


class _Shared(NamedTuple):
    """What all processes know of a step: the mean loss, whether one was told to stop, whether one could not read its
    images, and how many damaged images were passed over."""

    loss: float
    stop: bool
    failed: bool
    damaged: int


class Training:
    """One run of a distillation, from the beginning or from a checkpoint.

    Args:
        distiller: `SelfDistiller` with a chain that is new.
        dataset: The images.
        args: How to train.
        accelerator: Where to.
        global_batch: Images of one step, over all processes.
        steps: Steps of the whole training.
        facts: More settings that a run must share with the checkpoint that it goes on from.
        eval_dataset: Images for the agreement grid.
    """

    def __init__(
        self,
        distiller: SelfDistiller,
        dataset: Any,
        args: DistillationArguments,
        accelerator: Accelerator,
        global_batch: int,
        steps: int,
        facts: dict[str, Any],
        eval_dataset: Dataset | None = None,
    ):
        self.distiller = distiller
        self.dataset = dataset
        self.args = args
        self.accelerator = accelerator
        self.augmentation = args.augmentation
        self.global_batch = global_batch
        self.steps = steps
        self.eval_dataset = eval_dataset
        self.parameters = dict(distiller.plugins.named_parameters())
        self.peak = args.learning_rate * global_batch / 512
        self.optimizer = accelerator.prepare_optimizer(
            torch.optim.AdamW(self.parameters.values(), self.peak, weight_decay=args.weight_decay)
        )
        self.average: list[torch.Tensor] | None = None
        if args.ema_decay:
            self.average = [parameter.detach().clone() for parameter in self.parameters.values()]
        self.mean = _on_device(getattr(dataset, "image_mean", None), accelerator.device)
        self.std = _on_device(getattr(dataset, "image_std", None), accelerator.device)
        self.settings = {
            **args.recipe(),
            "objective": distiller.objective.name,
            "global_batch_size": global_batch,
            "steps": steps,
            "mixed_precision": accelerator.mixed_precision,
            "num_images": None if is_stream(dataset) else len(dataset),
            # a stream is read by so many, each its own part
            "readers": [accelerator.num_processes, args.dataloader_num_workers] if is_stream(dataset) else None,
            **facts,
        }
        self.step = 0
        self.figures = Figures()
        self.last_batch: Any = None

    def run(self, resume: tuple[Path, RunState] | None = None) -> dict[str, Any]:
        """Train to the end.

        Returns:
            Figures to record: steps, global batch, mean loss, loss by distance of the degrees, agreement grid, and with
            `skip_damaged` how often an image was passed over.

        Raises:
            DatasetError: if an image cannot be read. A checkpoint has what was learnt before.
        """
        stream_state = self._restore(*resume) if resume else None
        if len(set(gather_object([self.step]))) > 1:
            raise CheckpointError(
                f"Processes found different checkpoints in {self.args.output_dir}. On several machines output_dir must "
                "be a folder that all of them see."
            )
        loader = TrainingLoader(
            self.dataset, self.args, self.accelerator, self.global_batch, self.steps, self.step, stream_state
        )
        fit_objective(
            self.distiller, self.dataset, args=self.args, accelerator=self.accelerator, mean=self.mean, std=self.std
        )
        self.distiller.plugins.train()
        with StopSignal() as stop, self._progress_bar() as bar:
            self._train(iter(loader), loader, stop, bar)
        if self.average is not None:
            with torch.no_grad():
                for parameter, mean in zip(self.parameters.values(), self.average, strict=True):
                    parameter.copy_(mean)
        record: dict[str, Any] = {
            "steps": self.steps,
            "global_batch_size": self.global_batch,
            "skipped_steps": self.figures.skipped,
            "mean_loss": self.figures.mean_loss,
            "loss_by_distance": self.figures.by_distance(self.args.max_r),
        }
        if self.args.skip_damaged:
            record["damaged_images"] = self.figures.damaged
        if self.eval_dataset is not None:
            grid = self.measure_agreement()
            self._check_agreement(grid)
            record["agreement"] = grid.to_dict()
        return record

    def measure_agreement(self) -> AgreementGrid:
        """The agreement grid on the images held out, by all processes together."""
        self.distiller.plugins.eval()
        with self.accelerator.autocast():
            sums = agreement_sums(
                self.distiller.judge,
                self.distiller.objective.judge.agreement,
                held_out_batches(
                    self.eval_dataset,  # type: ignore[arg-type]
                    self.accelerator,
                    self.args.per_device_train_batch_size,
                    self.mean,
                    self.std,
                ),
                self.args.sources(),
                self.args.degrees(),
                self.accelerator.device,
            )
        self.distiller.plugins.train()
        sums = self.accelerator.reduce(sums, "sum")
        return AgreementGrid.from_sums(sums, self.args.sources(), self.args.degrees())

    def _train(self, batches: Iterator, loader: TrainingLoader, stop: StopSignal, bar: tqdm) -> None:
        args = self.args
        sampler = find_sampler(args.degree_sampler, args.source_r, args.train_degrees)
        in_a_row = 0
        since = time.perf_counter()
        logged = self.step
        while self.step < self.steps:
            pairs = sampler(args.seed, self.step, args.max_r)
            rate = self._learning_rate(self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            # where to go on if this step fails
            place, damaged_before = copy.deepcopy(loader.stream_state), loader.damaged.clone()
            total, failure = self._backward(batches, pairs)
            value, told_to_stop, failed, damaged = self._share(
                total, stop.signum is not None, failure is not None, loader.damaged - damaged_before
            )
            if failed:
                self._fail(failure, place, keep=in_a_row == 0)
            self.figures.damaged += damaged
            norm = self._clip()
            # fp16's loss scaling finds out for itself how large gradients may get
            finite = math.isfinite(value) and (self.accelerator.scaler is not None or math.isfinite(norm))
            if finite:
                self.optimizer.step()
                if self.average is not None and args.ema_decay is not None:
                    get_ema_multi_avg_fn(args.ema_decay)(self.average, list(self.parameters.values()), None)
            elif self.accelerator.scaler is not None:
                # _clip unscaled the gradients, which no further step may do before the scale was renewed
                self.accelerator.scaler.update()
            self.optimizer.zero_grad()
            in_a_row = 0 if finite else in_a_row + 1
            self.figures.skipped += not finite
            if in_a_row >= args.max_nonfinite_steps:
                raise DistillationError(
                    f"The loss was not finite in {in_a_row} steps in a row, up to step {self.step}. The plugins were "
                    "not changed by these. Look for images that are not finite; lower learning_rate, or use bf16 "
                    "instead of fp16. The last checkpoint is from before."
                )
            self.step += 1
            bar.update()
            if finite:
                self.figures.add(abs(pairs[0][0] - pairs[0][1]), value)
            if self.step % args.logging_steps == 0 or self.step == self.steps:
                now = time.perf_counter()
                speed = (self.step - logged) * self.global_batch / (now - since)
                since, logged = now, self.step
                self._log(bar, rate, norm, speed)
            due = told_to_stop or self.step % args.save_steps == 0 or self.step == self.steps
            if args.output_dir and due and in_a_row == 0:  # while steps fail the last good checkpoint shall stay
                self._save(loader.stream_state)
            if told_to_stop and self.step < self.steps:
                self._stop(stop.signum or signal.SIGTERM)
            if args.eval_steps and self.eval_dataset is not None and self.step % args.eval_steps == 0:
                self._log_agreement()

    def _backward(self, batches: Iterator, pairs: list[DegreePair]) -> tuple[torch.Tensor, DatasetError | None]:
        """The gradients of one step.

        Returns:
            Its loss, the mean over forward passes and pairs of degrees; and what is wrong with the images, if anything
            is. Then loss and gradients mean nothing: the step was made with other images, because where weights are
            sharded all processes must run the model equally often.
        """
        failure: DatasetError | None = None
        passes = self.args.gradient_accumulation_steps
        total = torch.zeros((), device=self.accelerator.device)
        for _ in range(passes):
            batch = self.last_batch
            try:
                if failure is None:
                    batch = self.last_batch = next(batches)
            except DatasetError as error:
                if batch is None:  # nothing was learnt that could be lost
                    raise
                failure = error
            with torch.no_grad():
                images = augment(batch["pixel_values"], batch["key"], self.augmentation, self.mean, self.std)
            for source_r, target_r in pairs:
                with self.accelerator.autocast():
                    loss = self.distiller.loss(images, source_r, target_r, batch["key"])
                loss = loss / (passes * len(pairs))
                self.accelerator.backward(loss)
                total += loss.detach()
        return total, failure

    def _share(self, loss: torch.Tensor, stop: bool, failed: bool, damaged: torch.Tensor) -> _Shared:
        """Average gradients and loss over processes, and find out what happened on any of them."""
        accelerator = self.accelerator
        if accelerator.num_processes == 1:
            return _Shared(loss.item(), stop, failed, int(damaged))
        gradients = [p.grad for p in self.parameters.values()]
        flags = torch.tensor([float(stop), float(failed)], device=loss.device)
        flat = torch.cat(
            [*(g.flatten() for g in gradients if g is not None), loss[None], flags, damaged[None].to(loss.dtype)]
        )
        flat = accelerator.reduce(flat, "mean")
        offset = 0
        for gradient in gradients:
            if gradient is not None:
                gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
                offset += gradient.numel()
        value, stopped, failures, mean_damaged = flat[-4:].tolist()
        return _Shared(value, stopped > 0, failures > 0, round(mean_damaged * accelerator.num_processes))

    def _clip(self) -> float:
        """Clip the gradients; returns the norm that they had."""
        limit = self.args.max_grad_norm or float("inf")
        norm = self.accelerator.clip_grad_norm_(list(self.parameters.values()), limit)
        return float(norm)

    def _learning_rate(self, step: int) -> float:
        """The cosine schedule, without warm-up, down to `min_learning_rate`."""
        floor = min(self.args.min_learning_rate, self.peak)
        return floor + (self.peak - floor) * (1 + math.cos(math.pi * step / self.steps)) / 2

    def _progress_bar(self) -> tqdm:
        return tqdm(
            total=self.steps,
            initial=self.step,
            desc=f"distilling on {self.accelerator.num_processes} process(es)",
            disable=not self.accelerator.is_main_process,
        )

    def _log(self, bar: tqdm, rate: float, norm: float, speed: float) -> None:
        figures = self.figures
        mean = figures.recent_loss
        by_distance = figures.by_distance(self.args.max_r)
        logged = {"loss": mean, "learning_rate": rate, "grad_norm": norm, "images_per_second": speed}
        logged |= {f"loss/distance_{name}": value for name, value in by_distance.items()}
        logged["skipped_steps"] = figures.skipped
        if self.args.skip_damaged:
            logged["damaged_images"] = figures.damaged
        self.accelerator.log(logged, step=self.step)
        parts = " ".join(f"{name}:{value:.3g}" for name, value in by_distance.items())
        damaged = f", {figures.damaged} damaged" if figures.damaged else ""
        bar.set_postfix_str(f"loss {mean:.3g} (|m-n| {parts}), lr {rate:.1e}, {speed:.1f} images/s{damaged}")

    def _log_agreement(self) -> None:
        means = self._check_agreement(self.measure_agreement())
        if means is not None:
            plain, tocom = means
            self.accelerator.log({"agreement/plain": plain, "agreement/tocom": tocom}, step=self.step)

    def _check_agreement(self, grid: AgreementGrid) -> tuple[float, float] | None:
        """The mean agreement without and with the plugins, which one of the processes warns of if they do harm."""
        means = grid.means()
        if means is not None and self.accelerator.is_main_process:
            warn_of_harm(*means, when=f"step {self.step} of {self.steps}")
        return means

    def _save(self, stream_state: StreamState) -> None:
        streams = gather_object([stream_state.to_list()])
        if self.accelerator.is_main_process:
            tensors = {f"plugins.{name}": parameter.detach() for name, parameter in self.parameters.items()}
            state = self.optimizer.optimizer.state
            for name, parameter in self.parameters.items():
                for key, value in state[parameter].items():
                    tensors[f"{key}.{name}"] = value
            for name, mean in zip(self.parameters, self.average or (), strict=False):
                tensors[f"average.{name}"] = mean
            scaler = self.accelerator.scaler
            progress = {
                **self.figures.to_dict(),
                "streams": streams,
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            state = RunState(self.step, self.settings, tensors, progress)
            state.save(str(self.args.output_dir), self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def _restore(self, folder: Path, state: RunState) -> StreamState:
        state.check_settings(self.settings, folder)
        tensors = state.tensors
        progress = state.progress
        optimizer = self.optimizer.optimizer
        device = self.accelerator.device
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"plugins.{name}"])
                keys = ("step", "exp_avg", "exp_avg_sq")
                if f"step.{name}" in tensors:
                    optimizer.state[parameter] = {
                        # AdamW counts steps on the CPU
                        key: tensors[f"{key}.{name}"].to("cpu" if key == "step" else device)
                        for key in keys
                    }
            for name, mean in zip(self.parameters, self.average or (), strict=False):
                mean.copy_(tensors[f"average.{name}"])
        if self.accelerator.scaler is not None and progress["scaler"]:
            self.accelerator.scaler.load_state_dict(progress["scaler"])
        self.step = state.step
        self.figures = Figures.from_dict(progress)
        logger.warning("Going on from %s, step %d of %d.", folder, self.step, self.steps)
        return StreamState.from_list(progress["streams"][self.accelerator.process_index % len(progress["streams"])])

    def _fail(self, failure: DatasetError | None, stream_state: StreamState, keep: bool) -> NoReturn:
        """End on all processes alike, because one of them cannot read its images.

        Args:
            failure: What is wrong with those of this process.
            stream_state: How far the stream was read for the steps that were made.
            keep: Whether to write a checkpoint.
        """
        own = None
        if failure is not None:
            advice = " Or set skip_damaged." if isinstance(failure, UnreadableImageError) else ""
            own = f"{failure}{advice}"
        reason = next(text for text in gather_object([own]) if text)
        kept = "No checkpoint was written."
        if self.args.output_dir and self.step and keep:
            self._save(stream_state)
            kept = (
                f"A checkpoint of it is in {self.args.output_dir}: go on with resume_from_checkpoint='latest' and as "
                "many images as before."
            )
        raise DatasetError(f"{reason} The last step was {self.step} of {self.steps}. {kept}")

    def _stop(self, signum: int) -> None:
        name = signal.Signals(signum).name
        where = (
            f"A checkpoint is in {self.args.output_dir}; go on with resume_from_checkpoint='latest'."
            if self.args.output_dir
            else "Without an output_dir nothing was kept."
        )
        raise DistillationInterrupted(f"Stopped by {name} after step {self.step} of {self.steps}. {where}", signum)


def _on_device(value: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if value is None else value.to(device)
