# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Model cards for the Hub, rendered from the templates in `hub_cards/` and from recorded facts only."""

import re
from collections.abc import Iterable
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from tocom_hf.errors import ArgumentError, DegreeError
from tocom_hf.merging.architectures import ARCHITECTURES, supported_parts
from tocom_hf.merging.recipes import TOME_RECIPE, MergeRecipe
from tocom_hf.plugins.agreement import AgreementGrid
from tocom_hf.plugins.config import PluginSetConfig


CARD_NAME = "README.md"
AGREEMENT_FIGURE = "agreement.png"
_TAGS = ["tocom", "token-merging", "vision-transformer", "peft", "lora"]
_HUB_ID = r"[\w-][\w.-]*(/[\w-][\w.-]*)?"
# their heads sit on a part of a model of images and text, which is not what transformers calls the base model
_VISION_PARTS = ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model", "metaclip_2_vision_model")
# they have no heads, and what transformers calls their base model is the encoder within the backbone
_BASE_IS_ENCODER = ("dinov3_vit",)
# entries of `training` that have a place of their own in the card, or are not part of the recipe
_NOT_RECIPE = ("agreement", "test_accuracy", "hardware", "dataset_id")


def plugin_set_card(
    config: PluginSetConfig, repo_id: str, *, checkpoint: str | None = None, figure: str | None = None
) -> ModelCard:
    """The card of a plugin set.

    Args:
        config: The set's configuration. What it does not record is left out.
        repo_id: Hub id of the set, for the usage block.
        checkpoint: Hub id or path of the checkpoint in the usage block; the backbone itself by default.
        figure: Name of a picture of the agreement grid in the repository, if there is one.
    """
    facts, title = config.backbone, repo_id.rpartition("/")[2]
    entries = [entry for entry in config.evaluation if _is_complete(entry)]
    training = config.training
    # a configuration of somebody else may hold anything
    listed = training.get("train_degrees")
    trained_degrees = sorted(listed) if isinstance(listed, list) and all(isinstance(r, int) for r in listed) else []
    names = (training.get("dataset_id"), training.get("dataset"))
    datasets = [str(name) for name in names if _is_hub_id(name, namespace=True)]
    data = ModelCardData(
        base_model=config.base_model if _is_hub_id(config.base_model) else None,
        base_model_relation="adapter" if _is_hub_id(config.base_model) else None,
        library_name="tocom-hf",
        license=config.license,
        datasets=datasets[:1] or None,
        tags=_TAGS,
        model_name=title,
        eval_results=[result for entry in entries for result in _eval_results(entry)] or None,
    )
    return _render(
        "plugin_set.md",
        data,
        title=title,
        repo_id=repo_id,
        checkpoint=checkpoint or config.base_model or "path/to/a/checkpoint",
        count=config.max_r - config.min_r,
        layers=_layers(config),
        source_r=config.source_r,
        use_source_r=config.min_r if config.source_r is None else config.source_r,
        use_target_r=config.min_r if config.source_r == config.max_r else config.max_r,
        min_r=config.min_r,
        max_r=config.max_r,
        middle_r=_middle(config.min_r, config.max_r, trained_degrees),
        trained_degrees=trained_degrees,
        backbone=_backbone_of("model", facts.model_type),
        **_inputs(facts.model_type, facts.image_size, facts.patch_size),
        facts=[
            ("backbone", config.base_model),
            *([("its commit", config.base_model_revision)] if config.base_model_revision else []),
            ("model type", facts.model_type),
            ("layers", facts.num_hidden_layers),
            ("hidden size", facts.hidden_size),
            ("degrees", f"{config.min_r} to {config.max_r}"),
            *([] if config.source_r is None else [("degree of the weights", config.source_r)]),
            ("rank of a plugin", config.rank),
            ("scale in training", config.trained_scale),
            ("recommended scale", config.recommended_scale),
        ],
        evaluation=_groups(entries),
        **_agreement(training.get("agreement")),
        figure=figure,
        objective=training.get("objective"),
        recipe=[(key, value) for key, value in _training(training) if key not in _NOT_RECIPE and value is not None],
        hardware=training.get("hardware"),
    )


def _training(training: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    """What was recorded of the training, the merging recipe in few words."""
    for name, value in training.items():
        if name != "merge_recipe":
            yield name, value
            continue
        try:
            yield name, _in_words(MergeRecipe.from_dict(value))
        except (ArgumentError, DegreeError):  # of somebody else
            yield name, value


def _in_words(recipe: MergeRecipe) -> str:
    """What a merging recipe says that ToMe's rule does not, without its schedules."""
    parts = []
    for name in ("match_by", "size_penalty", "attention_penalty"):
        value = getattr(recipe, name)
        if value != getattr(TOME_RECIPE, name):
            parts.append(f"{name} {_by_layer(value) if isinstance(value, tuple) else value}")
    if recipe.schedules:
        parts.append("schedules by degree in tocom_config.json")
    return "; ".join(parts) or "ToMe's rule"


def _by_layer(values: tuple) -> str:
    parts, first = [], 0
    for value, group in groupby(values):
        last = first + len(list(group)) - 1
        layers = f"layer {first}" if first == last else f"layers {first} to {last}"
        parts.append(f"{value} in {layers}")
        first = last + 1
    return ", ".join(parts)


def _middle(min_r: int, max_r: int, trained_degrees: list[int]) -> int:
    """The degree in the middle of a set, or the trained one that is nearest to it."""
    middle = (min_r + max_r) // 2
    return min(trained_degrees or [middle], key=lambda degree: abs(degree - middle))


def checkpoint_card(config: PreTrainedConfig, plugins: PluginSetConfig | None, repo_id: str) -> ModelCard:
    """The card of a checkpoint saved by `TocomModel`.

    Args:
        config: The model's configuration, with its `tocom` entry.
        plugins: The configuration of its plugin set, if it has one.
        repo_id: Hub id of the checkpoint.
    """
    title, recorded = repo_id.rpartition("/")[2], config.tocom
    base_model = None if plugins is None or not _is_hub_id(plugins.base_model) else plugins.base_model
    vision: Any = supported_parts(config)[0]
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        library_name="tocom-hf",
        tags=_TAGS[:3],
        pipeline_tag="image-classification" if "ForImageClassification" in str(config.architectures) else None,
    )
    return _render(
        "checkpoint.md",
        data,
        title=title,
        repo_id=repo_id,
        architecture=(config.architectures or ["transformers"])[0],
        source_r=recorded["source_r"],
        target_r=recorded["target_r"],
        plugins=plugins,
        **_inputs(
            vision.model_type,
            getattr(vision, "image_size", None),
            getattr(vision, "patch_size", None),
            getattr(vision, "num_channels", 3),
        ),
    )


def _backbone_of(model: str, model_type: str) -> str:
    """Code for the backbone of a model with or without a head, which is what PEFT must be given."""
    if model_type in _VISION_PARTS:
        return f'getattr({model}, "vision_model", {model})'
    if model_type in _BASE_IS_ENCODER:
        return model
    return f"{model}.base_model"


def _layers(config: PluginSetConfig) -> str:
    """What the plugins apply to, in words."""
    if config.target_modules is None:
        return "the query and value projections"
    *others, last = [f"`{name}`" for name in config.target_modules]
    return f"the linear layers {', '.join(others)} and {last}" if others else f"the linear layer {last}"


def _render(template: str, data: ModelCardData, **values: Any) -> ModelCard:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"cell": _cell, "percent": _percent}
    text = environment.from_string(_template(template)).render(card_data=data.to_yaml(), **values)
    return ModelCard(re.sub(r"\n{3,}", "\n\n", text), ignore_metadata_errors=False)


def _template(name: str) -> str:
    """A template's text: within the package once it is installed, beside it in a clone that is not."""
    try:
        folder = resources.files("tocom_hf.hub_cards")
    except ModuleNotFoundError:
        folder = Path(__file__).parents[2] / "hub_cards"
    return (folder / name).read_text(encoding="utf-8")


def _inputs(model_type: str, image_size: Any, patch_size: Any, num_channels: int = 3) -> dict[str, str]:
    """Code that makes random inputs, and the arguments by which a model is called with them."""
    architecture = ARCHITECTURES[model_type]
    name = architecture.input_name
    if architecture.inputs == "patch sequences":
        grid = 16
        lines = [
            f"{name} = torch.randn(1, {grid * grid}, {num_channels * patch_size**2})",
            f"pixel_attention_mask = torch.ones(1, {grid * grid}, dtype=torch.int64)",
            f"spatial_shapes = torch.tensor([[{grid}, {grid}]])",
        ]
        return {"inputs": "\n".join(lines), "arguments": _by_name(name, "pixel_attention_mask", "spatial_shapes")}
    if architecture.inputs == "images":
        height, width = image_size if isinstance(image_size, list | tuple) else (image_size or 224,) * 2
        shape = f"{num_channels}, {height}, {width}"
    else:
        frames, channels, size = architecture.clip_sizes
        sizes = (frames, channels, size, size) if architecture.inputs == "clips" else ("max_length", "num_mel_bins")
        shape = ", ".join(f"model.config.{setting}" for setting in sizes)
    return {"inputs": f"{name} = torch.randn(1, {shape})", "arguments": _by_name(name)}


def _by_name(*names: str) -> str:
    return ", ".join(f"{name}={name}" for name in names)


def _is_complete(entry: dict[str, Any]) -> bool:
    return all(key in entry for key in ("dataset", "source_r", "target_r", "plain", "tocom")) and all(
        isinstance(entry[key], int | float) for key in ("source_r", "target_r", "plain", "tocom")
    )


def _eval_results(entry: dict[str, Any]) -> Iterable[EvalResult]:
    for key, way in (("plain", "token merging alone"), ("tocom", "with ToCom")):
        yield EvalResult(
            task_type="image-classification",
            dataset_type=str(entry.get("dataset_id", entry["dataset"])),
            dataset_name=str(entry["dataset"]),
            dataset_split=entry.get("split"),
            metric_type="accuracy",
            metric_name=f"accuracy, source_r={entry['source_r']}, target_r={entry['target_r']}, {way}",
            metric_value=entry[key],
        )


def _groups(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries that differ in `target_r` only, as one table each."""

    def common(entry: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(entry.get(key, "")) for key in ("dataset", "split", "source_r", "scale", "checkpoint"))

    groups = []
    for (dataset, split, source_r, scale, checkpoint), members in groupby(sorted(entries, key=common), key=common):
        found = sorted(members, key=lambda entry: entry["target_r"])
        title = f"{checkpoint + ' on ' if checkpoint else ''}{dataset}{f' ({split})' if split else ''}"
        errors = [entry["standard_error"] for entry in found if isinstance(entry.get("standard_error"), int | float)]
        groups.append(
            {
                "title": f"{title}, trained at r = {source_r}",
                "entries": found,
                "scale": f", scale {scale}" if scale else "",
                "error": max(errors, default=None),
            }
        )
    return groups


def _agreement(content: Any) -> dict[str, Any]:
    """A recorded grid as tables; one of another form is left out."""
    try:
        grid = AgreementGrid.from_dict(content)
    except ValueError:
        return {"agreement": [], "degrees": []}
    tables = []
    for title, rows in (("Token merging alone", grid.plain), ("With ToCom", grid.tocom)):
        tables.append({"title": title, "rows": list(zip(grid.sources, rows, strict=True))})
    return {"agreement": tables, "degrees": grid.degrees}


def _is_hub_id(name: Any, *, namespace: bool = False) -> bool:
    return isinstance(name, str) and re.fullmatch(_HUB_ID, name) is not None and ("/" in name or not namespace)


def _cell(value: Any) -> str:
    """A value in one cell of a Markdown table."""
    if isinstance(value, dict):
        text = ", ".join(f"{key}: {_text(entry)}" for key, entry in value.items())
    else:
        text = _text(value)
    return re.sub(r"\s+", " ", text).replace("|", r"\|").replace("<", "&lt;")


def _text(value: Any) -> str:
    return "not recorded" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _percent(value: float, digits: int = 2) -> str:
    return f"{100 * value:.{digits}f}"
