# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Self-distillation of a plugin set on Accelerate (ToCom, section 3.3, eq. 6).

In every step two degrees m != n are drawn. The teacher is the frozen pre-trained model at degree m; the student is the
same model with the signed chain of plugins from m to n, at degree n. The plugins learn to keep the teacher's output
when the degree moves.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .architectures import Backbone, find_backbone
from .composition import Factors, chain, require_scale
from .config import BackboneFacts, PluginSetConfig
from .errors import ArgumentError, DatasetError, DegreeError, UnsupportedModelError
from .merging import require_degree
from .patching import apply_tome, get_schedule, remove_tome
from .plugins import PluginSet


@dataclass
class DistillationArguments:
    """How a plugin set is distilled. The defaults are the paper's (section 4.1), apart from its augmentation.

    Attributes:
        max_r: Largest degree; the set has this many plugins.
        rank: Rank h of one plugin.
        scale: Factor s in front of the plugins during training.
        lora_dropout: Dropout probability on the plugins' input.
        num_train_epochs: Passes over the data set.
        per_device_train_batch_size: Images per process and step.
        learning_rate: Peak learning rate for a global batch of 512 images; scales linearly with the batch.
        min_learning_rate: What the cosine schedule ends at.
        weight_decay: Of AdamW.
        seed: Decides plugin initialisation, degrees and the order of images.
        dataloader_num_workers: Worker processes that load images.
    """

    max_r: int = 16
    rank: int = 2
    scale: float = 0.1
    lora_dropout: float = 0.1
    num_train_epochs: int = 10
    per_device_train_batch_size: int = 128
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-5
    weight_decay: float = 0.05
    seed: int = 0
    dataloader_num_workers: int = 0

    def __post_init__(self):
        if require_degree(self.max_r, "max_r") < 1:
            raise DegreeError("max_r must be at least 1: a plugin set needs two degrees.")
        if require_degree(self.rank, "rank") < 1:
            raise DegreeError("rank must be at least 1.")
        require_scale(self.scale)
        for name in ("num_train_epochs", "per_device_train_batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ArgumentError(f"{name} must be positive, got {getattr(self, name)!r}.")
        if not 0 <= self.lora_dropout < 1:
            raise ArgumentError(f"lora_dropout must be in [0, 1), got {self.lora_dropout!r}.")


def distill(
    model: PreTrainedModel,
    dataset: Dataset,
    args: DistillationArguments,
    accelerator: Accelerator | None = None,
    *,
    base_model: str | None = None,
    base_model_revision: str | None = None,
    training_facts: dict | None = None,
) -> PluginSet:
    """Distil a plugin set for a pre-trained model. Runs on every process of an `accelerate launch`.

    Args:
        model: The pre-trained model with its head. Its weights are not changed; it is patched during training and
            restored afterwards.
        dataset: Unlabelled images: samples with `pixel_values`, float `(channels, height, width)`.
        args: How to train.
        accelerator: Where to train; by default a new one. Trackers that it has are logged to.
        base_model: Hub id or path of the backbone, for the set's configuration.
        base_model_revision: Its commit.
        training_facts: More facts to record in the set's configuration, such as the data set's name.

    Returns:
        The plugin set, the same on every process.

    Raises:
        UnsupportedModelError: if the architecture is not supported or the model returns no logits.
        DatasetError: if the data set has fewer images than one step needs.
    """
    accelerator = accelerator or Accelerator()
    backbone = find_backbone(model)
    if not hasattr(model, "classifier") and not hasattr(model, "cls_classifier"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no classifier. Plugins are distilled on logits; "
            "load the pre-trained model with AutoModelForImageClassification."
        )
    global_batch = args.per_device_train_batch_size * accelerator.num_processes
    count = len(dataset)  # type: ignore[arg-type]
    if count < global_batch:
        raise DatasetError(
            f"The data set has {count} images, but one step takes {global_batch}. "
            "Lower per_device_train_batch_size or use more images."
        )
    was_training, schedule = model.training, get_schedule(model)
    if schedule is not None:
        raise UnsupportedModelError("The model merges tokens already. Call remove_tome(model) before distilling.")
    requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    torch.manual_seed(args.seed)
    plugin_chain = PluginChain(backbone, args.max_r, args.rank, args.scale, args.lora_dropout)
    try:
        distiller = SelfDistiller(model.eval().requires_grad_(False), plugin_chain)
        history = _train(distiller, dataset, args, accelerator, global_batch)
    finally:
        plugin_chain.remove(backbone)
        remove_tome(model)
        model.train(was_training)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(requires_grad[name])
    config = PluginSetConfig(
        backbone=BackboneFacts.of(backbone),
        base_model=base_model,
        base_model_revision=base_model_revision,
        max_r=args.max_r,
        rank=args.rank,
        trained_scale=args.scale,
        recommended_scale=args.scale,
        training={
            **asdict(args),
            **history,
            **(training_facts or {}),
            "num_images": count,
            "num_processes": accelerator.num_processes,
        },
    )
    return PluginSet(config, plugin_chain.adapters())


def degree_pair(seed: int, step: int, max_r: int) -> tuple[int, int]:
    """Two different degrees in `0..max_r`, uniform, a function of seed and step alone: the same on every process."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    first = int(torch.randint(0, max_r + 1, (), generator=generator))
    second = int(torch.randint(0, max_r, (), generator=generator))
    return first, second + (second >= first)


class PluginChain(nn.Module):
    """The plugins of all degrees as one low-rank branch per projection, of which a step uses a slice.

    The factors of plugin `P_i_i+1` are rows `i * rank .. (i + 1) * rank`, so the chain between two degrees is a
    contiguous slice and costs two small matrix products per projection, whatever its length.

    Args:
        backbone: Where the branches are installed.
        max_r: Number of plugins.
        rank: Rank of one plugin.
        scale: Factor s.
        dropout: Dropout probability on the input of the branches.
    """

    def __init__(self, backbone: Backbone, max_r: int, rank: int, scale: float, dropout: float):
        super().__init__()
        self.max_r, self.rank, self.scale = max_r, rank, scale
        self.paths = list(backbone.projections())
        self.branches = nn.ModuleList()
        for path, base in backbone.projections().items():
            branch = PluginBranch(cast(nn.Linear, base), max_r * rank, dropout)
            self.branches.append(branch)
            backbone.module.set_submodule(path, ProjectionWithPlugins(base, branch))

    def activate(self, source_r: int, target_r: int) -> None:
        """Use the signed chain between two degrees from now on; none where they are equal."""
        indices, sign = chain(source_r, target_r)
        active = slice(indices.start * self.rank, indices.stop * self.rank)
        for _, branch in self._items():
            branch.active, branch.factor = active, sign * self.scale

    def adapters(self) -> dict[int, dict[str, Factors]]:
        """The plugins by index, as float32 copies on the CPU."""
        return {i: {path: branch.factors(i, self.rank) for path, branch in self._items()} for i in range(self.max_r)}

    def remove(self, backbone: Backbone) -> None:
        """Put the original projections back."""
        for path in self.paths:
            backbone.module.set_submodule(path, cast(nn.Module, backbone.module.get_submodule(path).base))

    def _items(self) -> Iterator[tuple[str, "PluginBranch"]]:
        return zip(self.paths, cast(Iterable[PluginBranch], self.branches), strict=True)


class PluginBranch(nn.Module):
    """The low-rank branch beside one projection. `lora_A` starts as in PEFT, `lora_B` (stored transposed) at zero."""

    def __init__(self, base: nn.Linear, rows: int, dropout: float):
        super().__init__()
        weight = base.weight
        self.lora_A = nn.Parameter(torch.empty(rows, base.in_features, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(rows, base.out_features, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.dropout = dropout
        self.active: slice = slice(0, 0)
        self.factor: float = 0.0

    def forward(self, hidden_states: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if self.factor == 0.0:
            return output
        lora_A, lora_B = (p[self.active].to(hidden_states.dtype) for p in (self.lora_A, self.lora_B))
        hidden_states = F.dropout(hidden_states, self.dropout, self.training)
        return output + F.linear(F.linear(hidden_states, lora_A) * self.factor, lora_B.t())

    def factors(self, index: int, rank: int) -> Factors:
        rows = slice(index * rank, (index + 1) * rank)
        lora_A, lora_B = self.lora_A.detach()[rows], self.lora_B.detach()[rows].t()
        return Factors(lora_A.float().cpu().clone(), lora_B.float().cpu().contiguous().clone())


class ProjectionWithPlugins(nn.Module):
    """A frozen projection and the branch beside it."""

    branch: PluginBranch

    def __init__(self, base: nn.Module, branch: PluginBranch):
        super().__init__()
        self.base = base
        # the branch belongs to the chain: registered once, so that its parameters have one name
        object.__setattr__(self, "branch", branch)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.branch(hidden_states, self.base(hidden_states))


class SelfDistiller(nn.Module):
    """Teacher and student on one copy of the frozen weights; its forward is the distillation loss.

    Args:
        model: The frozen model in evaluation mode, with the branches of `plugins` installed.
        plugins: The chain to train.
    """

    def __init__(self, model: PreTrainedModel, plugins: PluginChain):
        super().__init__()
        self.model, self.plugins = model, plugins

    def forward(self, pixel_values: torch.Tensor, source_r: int, target_r: int) -> torch.Tensor:
        """`KL(teacher at source_r || student at target_r)` at temperature 1, the mean over images (ToCom, eq. 6).

        Args:
            pixel_values: `(batch, channels, height, width)`.
            source_r: The teacher's degree m.
            target_r: The student's degree n.
        """
        self.plugins.activate(source_r, source_r)
        apply_tome(self.model, source_r)
        with torch.no_grad():
            teacher = self.model(pixel_values=pixel_values).logits
        self.plugins.activate(source_r, target_r)
        apply_tome(self.model, target_r)
        student = self.model(pixel_values=pixel_values).logits
        teacher, student = F.log_softmax(teacher.float(), dim=-1), F.log_softmax(student.float(), dim=-1)
        return F.kl_div(student, teacher, log_target=True, reduction="batchmean")

    def train(self, mode: bool = True):
        """Only the plugins train; the frozen model stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self


def _train(
    distiller: SelfDistiller, dataset: Dataset, args: DistillationArguments, accelerator: Accelerator, global_batch: int
) -> dict:
    loader = DataLoader(
        dataset,
        batch_size=args.per_device_train_batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.dataloader_num_workers,
        generator=torch.Generator().manual_seed(args.seed),
    )
    learning_rate = args.learning_rate * global_batch / 512
    optimizer = torch.optim.AdamW(distiller.plugins.parameters(), learning_rate, weight_decay=args.weight_decay)
    module, optimizer, loader = accelerator.prepare(distiller, optimizer, loader)
    steps = len(loader) * args.num_train_epochs
    floor = min(args.min_learning_rate / learning_rate, 1.0)

    def cosine(step: int) -> float:
        return floor + (1 - floor) * (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2

    scheduler = torch.optim.lr_scheduler.LambdaLR(getattr(optimizer, "optimizer", optimizer), cosine)
    desc = f"distilling on {accelerator.num_processes} process(es)"
    bar = tqdm(total=steps, desc=desc, disable=not accelerator.is_main_process)
    module.train()
    step, total = 0, 0.0
    for _ in range(args.num_train_epochs):
        for batch in loader:
            source_r, target_r = degree_pair(args.seed, step, args.max_r)
            loss = module(batch["pixel_values"], source_r, target_r)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            value = accelerator.reduce(loss.detach(), "mean").item()
            step += 1
            total += value
            figures = {"loss": value, "learning_rate": scheduler.get_last_lr()[0]}
            accelerator.log(figures, step=step)
            bar.update()
            bar.set_postfix(loss=f"{total / step:.4f}", lr=f"{figures['learning_rate']:.1e}")
    bar.close()
    return {"steps": step, "global_batch_size": global_batch, "mean_loss": total / step}
