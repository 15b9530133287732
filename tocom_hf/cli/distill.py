# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Distil a ToCom plugin set for a pre-trained ViT from unlabelled images.

    tocom distill --preset paper --model_name_or_path facebook/deit-base-patch16-224 \\
        --dataset_name ILSVRC/imagenet-1k --output_dir tocom-deit-base --resume_from_checkpoint latest

It may be stopped or killed at any time: the same command goes on from the newest checkpoint. On several devices:
`accelerate launch -m tocom_hf.cli.distill` with the same options.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tocom_hf.cli.endings import CommandParser, run_command
from tocom_hf.cli.loading import load_config, load_model, make_accelerator, unmasked
from tocom_hf.cli.samples import SampleKind
from tocom_hf.errors import ArgumentError, DatasetError


if TYPE_CHECKING:
    from tocom_hf.distillation.arguments import DistillationArguments

COMMAND = "tocom distill"


@dataclass
class ScriptArguments:
    model_name_or_path: str = field(metadata={"help": "Pre-trained model, with or without its head: Hub id or folder."})
    dataset_name: str = field(metadata={"help": "Hub name, folder of images, or parquet file."})
    preset: str | None = field(
        default=None,
        metadata={"help": "Recipe to start from: paper. Other arguments override it."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_split: str = field(default="train", metadata={"help": "Split to distil on."})
    eval_split: str | None = field(default=None, metadata={"help": "Split for the agreement grid."})
    num_eval_images: int = field(
        default=512, metadata={"help": "Images for the agreement grid; held out of dataset_split without eval_split."}
    )
    init_plugins: str | None = field(
        default=None,
        metadata={
            "help": "Plugin set to start from: Hub id or folder. Its max_r, rank, scale and target_modules become the "
            "defaults."
        },
    )
    image_column: str = field(
        default="image", metadata={"help": "Column of the images, or of the clips: lists of images, or videos."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use only so many images, drawn at random (of a stream the first)."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read images as they come; needs max_steps."})
    image_size: int | None = field(default=None, metadata={"help": "Height and width, if not the processor's."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    mixed_precision: str | None = field(default=None, metadata={"help": "no, fp16 or bf16; default: accelerate's."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Of transformers: sdpa, eager, flash_attention_2, ...; default: its choice."}
    )
    report_to: str | None = field(default=None, metadata={"help": "Tracker of Accelerate, e.g. tensorboard."})


def parse_args(argv: Sequence[str] | None) -> "tuple[ScriptArguments, DistillationArguments]":
    from tocom_hf.cli.dataclass_parser import DataclassParser
    from tocom_hf.distillation.arguments import PRESETS, DistillationArguments
    from tocom_hf.plugins.plugin_set import PluginSet

    early = CommandParser(COMMAND, add_help=False)
    early.add_argument("--preset", choices=PRESETS)
    early.add_argument("--init_plugins", "--init-plugins")
    start = early.parse_known_args(argv)[0]
    parser = DataclassParser(COMMAND, __doc__, (ScriptArguments, DistillationArguments))
    parser.set_defaults(**PRESETS.get(start.preset, {}))
    if start.init_plugins is not None:
        config = PluginSet.from_pretrained(start.init_plugins).config
        modules = None if config.target_modules is None else list(config.target_modules)
        parser.set_defaults(max_r=config.max_r, rank=config.rank, scale=config.trained_scale, target_modules=modules)
    script, training = parser.parse_into_dataclasses(argv)
    if training.output_dir is None:
        parser.error("--output_dir is required")
    return script, training


def load_pretrained(script: ScriptArguments, config: Any) -> Any:
    """The model as it was pre-trained: with its classifier if the checkpoint has one, of CLIP and its like only the
    vision tower. In full precision, whatever the checkpoint is stored in."""
    import torch
    import transformers

    from tocom_hf.merging.architectures import ARCHITECTURES

    tower = getattr(config, "vision_config", None)
    # DeiT's class with two heads is known to no Auto class
    endings = ("ForImageClassification", "ForVideoClassification")
    heads = [name for name in config.architectures or () if any(ending in name for ending in endings)]
    model_class: Any = transformers.AutoModel
    if heads:
        model_class = getattr(transformers, heads[0], transformers.AutoModelForImageClassification)
    elif tower is not None and tower.model_type in ARCHITECTURES:
        model_class = transformers.AutoModel._model_mapping[type(tower)]
    return load_model(
        model_class,
        script.model_name_or_path,
        revision=script.model_revision,
        dtype=torch.float32,
        attn_implementation=script.attn_implementation,
        **unmasked(config),
    )


def find_kind(script: ScriptArguments, training: "DistillationArguments", config: Any) -> SampleKind:
    """Whether the model takes images or clips, before any are loaded; of clips some options are refused."""
    kind = SampleKind.of(config, script.model_name_or_path)
    if kind.num_frames is not None and training.randaugment_num_ops:
        raise ArgumentError("RandAugment is for images; leave it out for clips: --randaugment_num_ops 0.")
    if kind.num_frames is not None and script.image_size is not None:
        raise ArgumentError(
            "Models of clips take them at the size of their configuration only. Leave --image_size out."
        )
    return kind


def load_data(script: ScriptArguments, training: "DistillationArguments", kind: SampleKind) -> tuple[Any, Any]:
    """The images or clips to distil on, and those of the agreement grid or `None`."""
    import datasets

    from tocom_hf.data.clips import encoded_clips
    from tocom_hf.data.images import require_different_images
    from tocom_hf.distillation.distill import hold_out

    if script.eval_split is not None:
        require_different_images(script.dataset_name, script.dataset_split, script.eval_split)
    processor = kind.load_processor(script.model_name_or_path, revision=script.model_revision)
    if script.image_size is not None:
        processor.size = {"height": script.image_size, "width": script.image_size}
        processor.crop_size = None
    common: dict[str, Any] = {
        "config_name": script.dataset_config_name,
        "image_column": script.image_column,
        "streaming": script.streaming,
    }
    views: dict[str, Any] = {
        "image_column": script.image_column,
        "min_crop": training.min_crop,
        "flip": training.flip,
    }
    loaded = kind.load(script.dataset_name, split=script.dataset_split, max_samples=script.max_train_samples, **common)
    images = kind.views(loaded, processor, **views)
    if script.eval_split is not None:
        held_out = kind.load(script.dataset_name, split=script.eval_split, max_samples=script.num_eval_images, **common)
        if script.streaming:  # so few are held
            encoded = encoded_clips(held_out, script.image_column)
            samples = list(encoded)
            if not samples:
                raise DatasetError(f"There are no images in the split {script.eval_split!r} of {script.dataset_name}.")
            held_out = datasets.Dataset.from_list(samples, features=encoded.features)
        return images, kind.views(held_out, processor, **views)
    count = 0 if script.streaming else min(script.num_eval_images, len(images) // 10)
    return hold_out(images, count, training.seed) if count else (images, None)


def distill_set(arguments: "tuple[ScriptArguments, DistillationArguments]") -> None:
    from tocom_hf.distillation.distill import distill
    from tocom_hf.plugins.agreement import AgreementGrid
    from tocom_hf.plugins.cards import AGREEMENT_FIGURE
    from tocom_hf.plugins.plugin_set import PluginSet

    script, training = arguments
    output_dir = str(training.output_dir)
    accelerator = make_accelerator(
        mixed_precision=script.mixed_precision, log_with=script.report_to, project_dir=output_dir
    )
    if script.report_to:
        accelerator.init_trackers("tocom")
    init_plugins = None if script.init_plugins is None else PluginSet.from_pretrained(script.init_plugins)
    config = load_config(script.model_name_or_path, revision=script.model_revision)
    kind = find_kind(script, training, config)
    model = load_pretrained(script, config)
    with accelerator.main_process_first():
        images, held_out = load_data(script, training, kind)
    plugins = distill(
        model,
        images,
        training,
        accelerator,
        eval_dataset=held_out,
        init_plugins=init_plugins,
        base_model=script.model_name_or_path,
        base_model_revision=getattr(model.config, "_commit_hash", None),
        training_facts={"dataset": script.dataset_name, "dataset_split": script.dataset_split},
    )
    if accelerator.is_main_process:
        plugins.save_pretrained(output_dir)
        if "agreement" in plugins.config.training:
            grid = AgreementGrid.from_dict(plugins.config.training["agreement"])
            grid.plot().savefig(Path(output_dir) / AGREEMENT_FIGURE, dpi=120)
            print(grid)
        print(f"{plugins} written to {Path(output_dir).resolve()}")
    accelerator.end_training()


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(COMMAND, parse_args, distill_set, argv, extra="train")


if __name__ == "__main__":
    sys.exit(main())
