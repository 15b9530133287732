# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Fine-tune a ViT for image classification while it merges `source_r` tokens in every layer.

The checkpoint records its `source_r`, so that `TocomModel.from_pretrained` can run it at another degree later.

    tocom finetune --model_name_or_path google/vit-base-patch16-224-in21k --dataset_name food101 \\
        --source_r 4 --output_dir vit-food101 --num_train_epochs 5 --learning_rate 1e-4

With `--lora_rank 8` only LoRA adapters and the head are trained. They are merged into the weights at the end, so the
result is an ordinary checkpoint as well. The other options are those of transformers' TrainingArguments. On several
devices: `accelerate launch -m tocom_hf.cli.finetune` with the same options.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tocom_hf.cli.endings import run_command
from tocom_hf.cli.loading import load_config, load_processor, refused_input
from tocom_hf.errors import ArgumentError, DatasetError


if TYPE_CHECKING:
    import datasets
    import torch
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

COMMAND = "tocom finetune"


@dataclass
class ScriptArguments:
    model_name_or_path: str = field(metadata={"help": "Hub id or folder of the pre-trained model."})
    dataset_name: str = field(
        metadata={"help": "Name in tocom_hf.data.tasks.TASKS, Hub name, folder of images or parquet, parquet file."}
    )
    source_r: int = field(default=0, metadata={"help": "Tokens merged in every layer during training."})
    lora_rank: int | None = field(
        default=None, metadata={"help": "Train LoRA adapters of this rank and the head, instead of all weights."}
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the layers that get adapters; default: all linear layers but the head."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on after training."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="label", metadata={"help": "Column of the integer labels."})


def parse_args(argv: Sequence[str] | None) -> "tuple[ScriptArguments, TrainingArguments]":
    # TrainingArguments names no extra where Accelerate is missing.
    import accelerate  # noqa: F401
    from transformers import TrainingArguments

    from tocom_hf.cli.dataclass_parser import DataclassParser

    parser = DataclassParser(COMMAND, __doc__, (ScriptArguments, TrainingArguments))
    script, training = parser.parse_into_dataclasses(argv)
    if training.resume_from_checkpoint and not Path(training.resume_from_checkpoint).is_dir():
        parser.error(f"--resume_from_checkpoint {training.resume_from_checkpoint} is not a folder")
    return script, training


def load_split(script: ScriptArguments, split: str) -> "tuple[datasets.Dataset, int]":
    """One split of the data set, and the number of its classes."""
    from tocom_hf.data.tasks import load_labelled

    return load_labelled(
        script.dataset_name,
        split,
        config_name=script.dataset_config_name,
        image_column=script.image_column,
        label_column=script.label_column,
    )


def collate(samples: list[dict]) -> "dict[str, torch.Tensor]":
    import torch

    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": torch.tensor([sample["labels"] for sample in samples]),
    }


def with_lora(model: "PreTrainedModel", rank: int, target_modules: list[str] | None) -> "PeftModel":
    """Freeze the model but for its head, and put LoRA adapters beside other layers."""
    from peft import LoraConfig, get_peft_model

    heads = [name for name, _ in model.named_children() if "classifier" in name]
    with refused_input("The layers of --lora_target_modules cannot be adapted"):
        return get_peft_model(
            model,
            LoraConfig(
                r=rank,
                lora_alpha=2 * rank,
                target_modules=target_modules or "all-linear",
                exclude_modules=heads,
                modules_to_save=heads,
            ),
        )


def compute_accuracy(prediction: Any) -> dict[str, float]:
    import numpy as np

    return {"accuracy": float((np.argmax(prediction.predictions, axis=-1) == prediction.label_ids).mean())}


def find_start(script: ScriptArguments, training: "TrainingArguments") -> "tuple[str, PreTrainedConfig]":
    """Where the weights come from that the training starts with, and their configuration.

    A run that is resumed goes on with the head of its checkpoint, in the order of its classes. Checkpoints of LoRA hold
    adapters alone, which Trainer loads.
    """
    start = script.model_name_or_path
    if training.resume_from_checkpoint and not script.lora_rank:
        start = training.resume_from_checkpoint
    config = load_config(start)
    # the degree that the checkpoint was trained at; this run makes a new one
    recorded = config.__dict__.pop("tocom", None)
    if start == training.resume_from_checkpoint and recorded and recorded.get("source_r") != script.source_r:
        raise ArgumentError(
            f"{start} was trained at source_r={recorded.get('source_r')}, and shall go on at --source_r "
            f"{script.source_r}. Pass the --source_r of the run that is resumed."
        )
    return start, config


def require_several_classes(script: ScriptArguments, train: "datasets.Dataset", num_labels: int) -> None:
    """Refuse data that a classifier cannot be trained on, or only in part."""
    from tocom_hf.data.tasks import TASKS

    occurring = set(train["label"][:])
    names = getattr(train.features["label"], "names", None)
    if len(occurring) < 2:
        (only,) = occurring
        raise DatasetError(
            f"All {len(train)} images of the split {script.train_split!r} are of one class "
            f"({only if names is None else names[only]}), so that there is nothing to tell apart. Data sets are often "
            "sorted by class: name a split, or a slice of one, that has several."
        )
    absent = num_labels - len(occurring)
    if names is None and absent > len(occurring) and script.dataset_name not in TASKS:
        raise DatasetError(
            f"The labels of the split {script.train_split!r} go up to {max(occurring)}, but only {len(occurring)} of "
            f"these {num_labels} numbers occur, and they have no names. A head has an output for every number. Count "
            "the classes from 0 on without gaps, for example with Dataset.class_encode_column."
        )


def find_labels(
    train: "datasets.Dataset", num_labels: int, config: "PreTrainedConfig", resumed: bool
) -> dict[int, str]:
    """The name of every output of the head.

    A head that was trained for the same classes keeps its order. Else the order is that of the data set.
    """
    from tocom_hf.data.class_names import are_numbered, match_names
    from tocom_hf.data.labels import class_names_of, match_labels

    known = class_names_of(config)
    names = getattr(train.features["label"], "names", None)
    if resumed and len(known) != num_labels:
        raise DatasetError(
            f"{config.name_or_path} was trained on {len(known)} classes, and the data set has {num_labels}. Pass the "
            "data set of the run that is resumed."
        )
    if names is None:
        names = known if len(known) == num_labels else [f"LABEL_{index}" for index in range(num_labels)]
        return dict(enumerate(names))
    if len(known) == len(names):
        order = match_names(names, known).order
        places = [place for place in order if place is not None]
        if len(places) == len(names):
            return dict(sorted(zip(places, names, strict=True)))
    if resumed and not are_numbered(known):
        match_labels(train, config)
    return dict(enumerate(names))


def label_for_training(config: "PreTrainedConfig", id2label: dict[int, str]) -> None:
    """Make a configuration one of a classifier of these classes, of which each image has one."""
    from transformers.utils import logging

    # a child of transformers' logger: its verbosity holds for ours
    logger = logging.get_logger(f"transformers.{__name__}")
    problem = config.problem_type
    if problem not in (None, "single_label_classification"):
        logger.warning(
            f"{config.name_or_path} was trained with problem_type {problem!r}. Here each image has one label, so it is "
            "trained on with problem_type 'single_label_classification', which the result records."
        )
    config.id2label = id2label
    config.label2id = {name: index for index, name in id2label.items()}
    config.problem_type = "single_label_classification"


def finetune(arguments: "tuple[ScriptArguments, TrainingArguments]") -> None:
    from transformers import Trainer, set_seed

    from tocom_hf.cli.fine_tunable import classifier_config, find_classifier, load_classifier, require_mergeable
    from tocom_hf.data.colour import model_channels
    from tocom_hf.data.images import require_different_images, with_pixel_values
    from tocom_hf.data.labels import class_names_of, match_labels, match_labels_to
    from tocom_hf.model.tocom_model import TocomModel

    script, training = arguments
    training.remove_unused_columns = False  # the image column is turned into pixel_values when it is read
    training.label_names = ["labels"]  # Trainer does not look for them inside of a PEFT model
    set_seed(training.seed)

    start, config = find_start(script, training)
    classifier = find_classifier(config, start)
    require_mergeable(config, script.source_r)
    processor = load_processor(script.model_name_or_path)
    if script.eval_split:
        require_different_images(script.dataset_name, script.train_split, script.eval_split)
    train, num_labels = load_split(script, script.train_split)
    require_several_classes(script, train, num_labels)
    id2label = find_labels(train, num_labels, config, resumed=start != script.model_name_or_path)
    config = classifier_config(config, classifier)
    label_for_training(config, id2label)
    train = match_labels(train, config)
    columns: dict[str, Any] = {"label_column": "label", "num_channels": model_channels(config)}
    evaluation = load_split(script, script.eval_split)[0] if script.eval_split else None
    if evaluation is not None:
        evaluation = match_labels_to(evaluation, class_names_of(config), f"the split {script.train_split!r}")
    loaded = load_classifier(classifier, start, config)
    model = TocomModel.from_pretrained(loaded, source_r=script.source_r)

    trained: Any = with_lora(model, script.lora_rank, script.lora_target_modules) if script.lora_rank else model
    with refused_input("Trainer cannot start"):
        trainer = Trainer(
            model=trained,
            args=training,
            data_collator=collate,
            train_dataset=with_pixel_values(train, processor, **columns),
            eval_dataset=evaluation and with_pixel_values(evaluation, processor, **columns),
            processing_class=processor,
            compute_metrics=compute_accuracy,
        )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    if script.lora_rank:
        merged = trained.merge_and_unload()
        trainer.model = trainer.model_wrapped = merged
    trainer.save_model()
    if evaluation:
        trainer.save_metrics("eval", trainer.evaluate())


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(COMMAND, parse_args, finetune, argv, extra="train")


if __name__ == "__main__":
    sys.exit(main())
