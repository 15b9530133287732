# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Self-distillation of a plugin set on Accelerate (ToCom, section 3.3, eq. 6).

In every step two degrees m != n are drawn. The teacher is the frozen pre-trained model at degree m; the student is the
same model with the signed chain of plugins from m to n, at degree n. The plugins learn to keep the teacher's output
when the degree moves.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedModel
from transformers.utils import logging

from tocom_hf.data.colour import model_channels
from tocom_hf.devices import describe_device, evaluation_mode
from tocom_hf.distillation.arguments import DistillationArguments
from tocom_hf.distillation.branches import PluginChain
from tocom_hf.distillation.loop import Training
from tocom_hf.distillation.objectives import WhitenedFeatures, find_objective
from tocom_hf.distillation.order import is_stream
from tocom_hf.distillation.run_state import find_state, make_output_dir
from tocom_hf.distillation.student import SelfDistiller
from tocom_hf.errors import ArgumentError, DatasetError, DegreeError, UnsupportedModelError
from tocom_hf.merging.backbones import Backbone, find_backbone
from tocom_hf.merging.patching import get_settings, unset_merging
from tocom_hf.plugins.composition import Adapter, Factors
from tocom_hf.plugins.config import BackboneFacts, PluginSetConfig
from tocom_hf.plugins.plugin_set import PluginSet
from tocom_hf.plugins.translation import in_names_of


logger = logging.get_logger(__name__)


def distill(
    model: PreTrainedModel,
    dataset: Any,
    args: DistillationArguments,
    accelerator: Accelerator | None = None,
    *,
    eval_dataset: Dataset | None = None,
    init_plugins: PluginSet | None = None,
    base_model: str | None = None,
    base_model_revision: str | None = None,
    training_facts: dict | None = None,
) -> PluginSet:
    """Distil a plugin set for a pre-trained model. Runs on every process of an `accelerate launch`.

    With the same global batch the result does not depend on how many processes, machines or accumulated forward passes
    share it, up to rounding. A run that was stopped or killed goes on from its checkpoints, bit for bit on the same
    hardware, with `args.resume_from_checkpoint`.

    Args:
        model: The pre-trained model, with or without its head. Its weights are not changed; it is patched during
            training and restored afterwards.
        dataset: Unlabelled images or clips: `TrainingImages`, `TrainingClips`, or any data set of samples with finished
            `pixel_values`, float `(channels, height, width)`, of clips with the frames in front.
        args: How to train.
        accelerator: Where to train; by default a new one. Trackers that it has are logged to.
        eval_dataset: Images for the agreement grid that is recorded at the end: like `dataset`, and not part of it.
        init_plugins: The set to start from instead of plugins that change nothing, of the same backbone and rank. With
            `args.source_r` that fits the set of a pre-trained backbone to one checkpoint fine-tuned from it.
        base_model: Hub id or path of the backbone, for the set's configuration.
        base_model_revision: Its commit.
        training_facts: More facts to record in the set's configuration, such as the data set's name.

    Returns:
        The plugin set, the same on every process.

    Raises:
        UnsupportedModelError: if the architecture is not supported, or lacks what the objective compares.
        BackboneMismatchError: if `init_plugins` belongs to another backbone.
        DegreeError: if `args.source_r` is not the degree that the model records.
        DatasetError: if the data set has fewer images than one step needs, or an image that cannot be read, where
            `args.skip_damaged` is not set. Then a checkpoint is written first, if there is an `output_dir`.
        ArgumentError: if arguments contradict each other, the data set, or `init_plugins`; if weights are float16.
        PluginFileError: if a plugin of `init_plugins` cannot be read.
        CheckpointError: if the run cannot go on from its checkpoints.
        DistillationError: if the loss stays infinite or NaN.
        DistillationInterrupted: if the run was told to stop; it has written a checkpoint if there is an `output_dir`.

    Example:

    ```python
    >>> import torch
    >>> from tocom_hf import DistillationArguments, distill
    >>> from transformers import ViTConfig, ViTForImageClassification
    >>> config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64)
    >>> images = [{"pixel_values": torch.rand(3, 64, 64)} for _ in range(4)]
    >>> args = DistillationArguments(max_r=3, num_train_epochs=1, per_device_train_batch_size=4)
    >>> distill(ViTForImageClassification(config), images, args, base_model="user/vit")
    PluginSet(base_model='user/vit', r=0..3, rank=2, scale=0.1)

    ```
    """
    accelerator = accelerator or Accelerator()
    _check_accelerator(accelerator)
    backbone = find_backbone(model)
    objective = find_objective(args.objective, model)
    if get_settings(backbone) is not None:
        raise UnsupportedModelError(
            "The model merges tokens already. Distil it as transformers loads it: after apply_tome call "
            "remove_tome(model); instead of TocomModel load the checkpoint with its transformers class."
        )
    _check_dtype(model)
    _check_source_r(model, args.source_r)
    _check_channels(dataset, model)
    target_modules = None if args.target_modules is None else backbone.find_target_modules(args.target_modules)
    start = None if init_plugins is None else _starting_plugins(init_plugins, backbone, args, target_modules)
    global_batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    steps = _count_steps(dataset, args, global_batch)
    resume = None
    if args.output_dir is not None:
        make_output_dir(args.output_dir)
        resume = find_state(args.output_dir, args.resume_from_checkpoint)

    torch.manual_seed(args.seed)
    facts = BackboneFacts.of(backbone)
    run_facts = {"model": list(facts.sketch), "init_plugins": None if start is None else _digest(start)}
    with _prepared(backbone, args, target_modules) as plugin_chain:
        if start is not None:
            plugin_chain.start_from(start)
        distiller = SelfDistiller(
            backbone, plugin_chain, objective, accelerator, args.proportional_attention, args.merging_recipe
        )
        training = Training(distiller, dataset, args, accelerator, global_batch, steps, run_facts, eval_dataset)
        figures = training.run(resume)
    num_images = None if is_stream(dataset) else len(dataset)
    config = PluginSetConfig(
        backbone=facts,
        base_model=base_model,
        base_model_revision=base_model_revision,
        max_r=args.max_r,
        source_r=args.source_r,
        rank=args.rank,
        target_modules=target_modules,
        trained_scale=args.scale,
        recommended_scale=args.scale,
        merging=args.merging,
        training={
            **args.recipe(),
            "objective": objective.name,
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "num_processes": accelerator.num_processes,
            "mixed_precision": accelerator.mixed_precision,
            "attn_implementation": model.config._attn_implementation,
            "hardware": describe_device(accelerator.device),
            "num_images": num_images,
            "init_plugins": None if init_plugins is None else init_plugins.config.origin(),
            **figures,
            **(training_facts or {}),
        },
    )
    return PluginSet(config, plugin_chain.adapters())


def hold_out(dataset: Any, count: int, seed: int = 0) -> tuple[Any, Subset]:
    """Split off some images for the agreement grid.

    Args:
        dataset: `TrainingImages`, or another data set with a length.
        count: Images to split off.
        seed: Decides which.

    Returns:
        The rest, and the images split off.

    Raises:
        DatasetError: if nothing would be left.
    """
    total = len(dataset)
    if not 0 < count < total:
        raise DatasetError(f"Cannot hold out {count} of {total} images. Hold out fewer, or none.")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, rest = sorted(order[:count]), sorted(order[count:])
    return dataset.select(rest) if hasattr(dataset, "select") else Subset(dataset, rest), Subset(dataset, chosen)


@contextlib.contextmanager
def _prepared(
    backbone: Backbone, args: DistillationArguments, target_modules: Iterable[str] | None
) -> Iterator[PluginChain]:
    """Freeze a model and install the branches of a chain for the length of a `with` block."""
    model = backbone.model
    requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    checkpointing = model.is_activation_checkpointing
    with evaluation_mode(model):
        plugin_chain = PluginChain(backbone, args.max_r, args.rank, args.scale, args.lora_dropout, target_modules)
        try:
            model.requires_grad_(False)
            if args.gradient_checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": False})
                for layer in backbone.layers:
                    layer.training = True  # which is when it recomputes; what is inside stays in evaluation mode
            yield plugin_chain
        finally:
            if args.gradient_checkpointing and not checkpointing:
                model.activation_checkpointing_disable()
            plugin_chain.remove(backbone)
            unset_merging(backbone)
            for parameter, required in requires_grad.items():
                parameter.requires_grad_(required)


def _count_steps(dataset: Any, args: DistillationArguments, global_batch: int) -> int:
    if is_stream(dataset):
        if args.objective == WhitenedFeatures.name:
            raise ArgumentError(
                f"objective={args.objective!r} looks at images from all over the data set first, which a stream does "
                "not allow. Download the data set, or use objective='features'."
            )
        if args.max_steps is None:
            raise ArgumentError("A stream has no length: say with max_steps how many steps to train for.")
        if not hasattr(dataset, "view"):
            raise DatasetError("Pass streams as TrainingImages(stream, processor).")
        return args.max_steps
    count = len(dataset)
    if count < global_batch:
        raise DatasetError(
            f"The data set has {count} images, but one step takes {global_batch}. "
            "Lower per_device_train_batch_size or use more images."
        )
    # views are uint8, and the first image may be one that cannot be read
    finished = not hasattr(dataset, "view")
    if args.randaugment_num_ops and finished and dataset[0]["pixel_values"].dtype != torch.uint8:
        raise ArgumentError(
            "RandAugment needs images that are not normalised yet: pass TrainingImages, whose samples are uint8."
        )
    return args.max_steps or count // global_batch * args.num_train_epochs


def _check_channels(dataset: Any, model: PreTrainedModel) -> None:
    """Hold the views of `TrainingImages` against what the model takes."""
    views, taken = getattr(dataset, "num_channels", None), model_channels(model.config)
    if views not in (None, taken):
        raise ArgumentError(
            f"The images have {views} channel(s), but the model takes {taken}. Make them with "
            f"TrainingImages(..., num_channels={taken}) and an image processor whose image_mean has {taken} value(s)."
        )


def _check_dtype(model: PreTrainedModel) -> None:
    """Refuse weights in float16: without loss scaling small gradients vanish, which only a worse set would tell."""
    if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        raise ArgumentError(
            "The model's weights are float16, in which small gradients vanish. Load it with dtype=torch.float32, and "
            "for speed set mixed_precision of the Accelerator."
        )


def _check_source_r(model: PreTrainedModel, source_r: int | None) -> None:
    """Hold the teacher's degree against the one that a fine-tuned checkpoint records."""
    recorded = getattr(model.config, "tocom", None)
    known = recorded.get("source_r") if isinstance(recorded, dict) else None
    if known is not None and source_r not in (None, known):
        raise DegreeError(
            f"source_r={source_r} contradicts the checkpoint, whose configuration records source_r={known}. "
            f"Distil on it with source_r={known}."
        )
    if known and source_r is None:
        logger.warning(
            "The model was trained at r = %s, and is about to be a teacher at every degree. To fit plugins to this "
            "checkpoint, set source_r=%s.",
            known,
            known,
        )


def _starting_plugins(
    plugins: PluginSet,
    backbone: Backbone,
    args: DistillationArguments,
    target_modules: Mapping[str, tuple[int, int]] | None,
) -> dict[int, Adapter]:
    """The plugins of a set to train on, all read, with what they add to a weight kept at the scale to train with."""
    plugins = in_names_of(backbone, plugins)
    config = plugins.config
    plugins.check_backbone(backbone)
    if config.rank != args.rank or config.min_r != 0 or config.max_r < args.max_r:
        raise ArgumentError(
            f"Cannot start from {plugins} with max_r={args.max_r} and rank={args.rank}. Choose the set's rank and a "
            "max_r within its degrees, which must begin at 0."
        )
    if config.target_modules != target_modules:
        raise ArgumentError(
            f"Cannot start from {plugins} with target_modules={_names(target_modules)}: it applies to "
            f"{_names(config.target_modules)}."
        )
    if config.recipe != args.merging_recipe:
        raise ArgumentError(
            f"Cannot start from {plugins} with another merging recipe than the set's. Write the set's to a file, "
            "plugins.config.recipe.save(path), and pass it as merge_recipe."
        )
    if config.proportional_attention != args.proportional_attention:
        raise ArgumentError(
            f"Cannot start from {plugins} with proportional_attention={args.proportional_attention}: it was distilled "
            f"with {not args.proportional_attention}."
        )
    if config.source_r not in (None, args.source_r):
        raise ArgumentError(
            f"Cannot start from {plugins} with source_r={args.source_r}: it was distilled for r = {config.source_r} "
            "only."
        )
    if not args.scale:
        raise ArgumentError("With scale=0 the plugins of a set have no effect, so there is nothing to start from.")
    factor = config.trained_scale / args.scale
    adapters: dict[int, Adapter] = {}
    for index in range(args.max_r):
        adapter = {}
        for path, (lora_A, lora_B) in plugins.adapter(index).items():
            adapter[path] = Factors(lora_A.detach().float().cpu(), lora_B.detach().float().cpu() * factor)
        adapters[index] = adapter
    return adapters


def _names(target_modules: Iterable[str] | None) -> str:
    return "query and value" if target_modules is None else ", ".join(target_modules)


def _digest(adapters: dict[int, Adapter]) -> str:
    """Tells one starting point from another."""
    digest = hashlib.sha256()
    for adapter in adapters.values():
        for path in sorted(adapter):
            for factor in adapter[path]:
                digest.update(factor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_accelerator(accelerator: Accelerator) -> None:
    if accelerator.gradient_accumulation_steps != 1:
        raise ArgumentError(
            "Give gradient_accumulation_steps in the DistillationArguments, not to the Accelerator: "
            "all forward passes of a step run at the same pair of degrees."
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ArgumentError(
            "DeepSpeed's engine owns optimiser and gradients, of which distillation has only the plugins'. To shard "
            "the frozen weights use FSDP (examples/configs/fsdp.yaml)."
        )
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if accelerator.distributed_type == DistributedType.FSDP and plugin is not None and plugin.fsdp_version != 2:
        raise ArgumentError("Set fsdp_version to 2 (examples/configs/fsdp.yaml): version 1 wraps the model.")
