# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Fine-tune a ViT for image classification while it merges `source_r` tokens in every layer.

The checkpoint records its `source_r`, so that `TocomModel.from_pretrained` can run it at another degree later.

    accelerate launch examples/finetune.py --model_name_or_path google/vit-base-patch16-224-in21k \\
        --dataset_name food101 --source_r 4 --output_dir vit-food101 --num_train_epochs 5 --learning_rate 1e-4

With `--lora_rank 8` only LoRA adapters and the head are trained. They are merged into the weights at the end, so the
result is an ordinary checkpoint as well.
"""

from dataclasses import dataclass, field

import datasets
import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from tocom_hf import ArgumentError, TocomModel
from tocom_hf.data.images import require_different_images, with_pixel_values
from tocom_hf.data.tasks import load_labelled


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


def load_split(script: ScriptArguments, split: str) -> tuple[datasets.Dataset, int]:
    return load_labelled(
        script.dataset_name,
        split,
        config_name=script.dataset_config_name,
        image_column=script.image_column,
        label_column=script.label_column,
    )


def collate(samples: list[dict]) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": torch.tensor([sample["labels"] for sample in samples]),
    }


def with_lora(model: PreTrainedModel, rank: int, target_modules: list[str] | None) -> PeftModel:
    """Freeze the model but for its head, and put LoRA adapters beside other layers."""
    heads = [name for name, _ in model.named_children() if "classifier" in name]
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


def compute_accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((np.argmax(prediction.predictions, axis=-1) == prediction.label_ids).mean())}


def main() -> None:
    script, training = HfArgumentParser((ScriptArguments, TrainingArguments)).parse_args_into_dataclasses()
    training.remove_unused_columns = False  # the image column is turned into pixel_values when it is read
    training.label_names = ["labels"]  # Trainer does not look for them inside of a PEFT model
    set_seed(training.seed)

    if script.eval_split:
        require_different_images(script.dataset_name, script.train_split, script.eval_split)
    train, num_labels = load_split(script, script.train_split)
    feature = train.features["label"]
    if hasattr(feature, "names"):
        labels = {"id2label": dict(enumerate(feature.names)), "label2id": {n: i for i, n in enumerate(feature.names)}}
    else:
        labels = {"num_labels": num_labels}

    # Trainer does not convert the key names that transformers writes, so the weights to resume from are loaded here,
    # and the best ones at the end; checkpoints of LoRA hold adapters alone, which it does load
    start = (
        script.model_name_or_path if script.lora_rank else training.resume_from_checkpoint or script.model_name_or_path
    )
    config = AutoConfig.from_pretrained(start, **labels)
    # the degree that the checkpoint was trained at; this run makes a new one
    recorded = config.__dict__.pop("tocom", None)
    if start == training.resume_from_checkpoint and recorded and recorded.get("source_r") != script.source_r:
        raise ArgumentError(
            f"{start} was trained at source_r={recorded.get('source_r')}, and shall go on at --source_r "
            f"{script.source_r}. Pass the --source_r of the run that is resumed."
        )
    model = AutoModelForImageClassification.from_pretrained(
        start, config=config, ignore_mismatched_sizes=True, dtype=torch.float32
    )
    model = TocomModel.from_pretrained(model, source_r=script.source_r)
    processor = AutoImageProcessor.from_pretrained(script.model_name_or_path)

    evaluation = load_split(script, script.eval_split)[0] if script.eval_split else None
    trainer = Trainer(
        model=with_lora(model, script.lora_rank, script.lora_target_modules) if script.lora_rank else model,
        args=training,
        data_collator=collate,
        train_dataset=with_pixel_values(train, processor, label_column="label"),
        eval_dataset=evaluation and with_pixel_values(evaluation, processor, label_column="label"),
        processing_class=processor,
        compute_metrics=compute_accuracy,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    best = trainer.state.best_model_checkpoint
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled  # these load weights in names of their own
    if training.load_best_model_at_end and best and not script.lora_rank and not sharded:
        model.load_state_dict(AutoModelForImageClassification.from_pretrained(best, dtype=torch.float32).state_dict())
    if script.lora_rank:
        trainer.model = trainer.model_wrapped = trainer.model.merge_and_unload()
    trainer.save_model()
    if evaluation:
        trainer.save_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main()
