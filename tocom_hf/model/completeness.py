# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Whether a checkpoint held all weights of the backbone: transformers starts those at random that it lacks."""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel

from tocom_hf.errors import PluginFileError
from tocom_hf.merging.backbones import backbones_in


# parts of a backbone that serve a head, or pre-training alone, and that published checkpoints may lack
_OPTIONAL = {"pooler", "mask_token"}
_WRAPPERS = {
    "_orig_mod.": "torch.compile(model)",
    "module.": "DistributedDataParallel or DataParallel",
    "base_model.model.": "a PeftModel",
}


def require_whole_backbone(model: PreTrainedModel, name: str, report: dict[str, Any]) -> None:
    """Refuse a model that has a backbone with weights which are not the checkpoint's.

    A head may be new: transformers warns of it, and it is trained or merged in afterwards.

    Args:
        model: The loaded model.
        name: The checkpoint, for the message.
        report: What transformers returns for `output_loading_info=True`.

    Raises:
        PluginFileError: if the checkpoint lacked some, or had some of another shape.
    """
    missing = set(report["missing_keys"]) | {entry[0] for entry in report["mismatched_keys"]}
    paths = [backbone.path for backbone in backbones_in(model)]
    prefixes = tuple(f"{path}." if path else "" for path in paths)
    lost = sorted(key for key in missing if key.startswith(prefixes) and not _OPTIONAL & {*key.split(".")})
    if not lost:
        return
    wrapper = _find_wrapper(missing, report["unexpected_keys"])
    if wrapper:
        origin = f", as those of {_WRAPPERS[wrapper]} do" if wrapper in _WRAPPERS else ""
        reason = (
            f"the names in its file begin with {wrapper!r}{origin}. Strip it: "
            f"save_file({{name.removeprefix({wrapper!r}): weight for name, weight in load_file(path).items()}}, path, "
            "metadata={'format': 'pt'}), both of safetensors.torch; or save the model inside with save_pretrained"
        )
    else:
        reason = "its file lacks them, or has them in other names or shapes. Save it anew, or correct its config.json"
    raise PluginFileError(
        f"The checkpoint {name} does not fit {type(model).__name__}: weights of the backbone would be random "
        f"({len(lost)} of them, such as {lost[0]}), because {reason}."
    )


def _find_wrapper(missing: set[str], unexpected: Iterable[str]) -> str | None:
    """What stands in front of names of the file, so that they are not found."""
    for name in sorted(unexpected):
        for wrapper in _WRAPPERS:
            if name.startswith(wrapper):
                return wrapper
        parts = name.split(".")
        for index in range(1, len(parts)):
            if ".".join(parts[index:]) in missing:
                return ".".join(parts[:index]) + "."
    return None
