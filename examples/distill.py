# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Distil a ToCom plugin set for a pre-trained ViT from unlabelled images.

    accelerate launch examples/distill.py --model_name_or_path facebook/deit-base-patch16-224 \\
        --dataset_name ILSVRC/imagenet-1k --output_dir tocom-deit-base
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoImageProcessor, AutoModelForImageClassification, HfArgumentParser

from tocom_hf.data import load_images, with_pixel_values
from tocom_hf.distillation import DistillationArguments, distill


@dataclass
class ScriptArguments:
    model_name_or_path: str = field(metadata={"help": "Hub id or folder of the pre-trained classifier."})
    dataset_name: str = field(metadata={"help": "Hub name, folder of images or of parquet files, or a parquet file."})
    output_dir: str = field(metadata={"help": "Folder for the plugin set."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_split: str = field(default="train", metadata={"help": "Split to distil on."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first so many images."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    mixed_precision: str | None = field(default=None, metadata={"help": "no, fp16 or bf16; default: accelerate's."})
    report_to: str | None = field(default=None, metadata={"help": "Tracker of Accelerate, e.g. tensorboard."})


def main() -> None:
    script, training = HfArgumentParser((ScriptArguments, DistillationArguments)).parse_args_into_dataclasses()
    accelerator = Accelerator(
        mixed_precision=script.mixed_precision, log_with=script.report_to, project_dir=script.output_dir
    )
    if script.report_to:
        accelerator.init_trackers("tocom", config=vars(training))

    # the teacher in full precision, whatever the checkpoint is stored in
    model = AutoModelForImageClassification.from_pretrained(
        script.model_name_or_path, revision=script.model_revision, dtype=torch.float32
    )
    processor = AutoImageProcessor.from_pretrained(script.model_name_or_path, revision=script.model_revision)
    with accelerator.main_process_first():
        images = load_images(
            script.dataset_name,
            config_name=script.dataset_config_name,
            split=script.dataset_split,
            image_column=script.image_column,
            max_samples=script.max_train_samples,
        )
    plugins = distill(
        model,
        with_pixel_values(images, processor, image_column=script.image_column),
        training,
        accelerator,
        base_model=script.model_name_or_path,
        base_model_revision=getattr(model.config, "_commit_hash", None),
        training_facts={"dataset": script.dataset_name, "dataset_split": script.dataset_split},
    )
    if accelerator.is_main_process:
        plugins.save_pretrained(script.output_dir)
        print(f"{plugins} written to {Path(script.output_dir).resolve()}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
