# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Loading models and processors for a command: whatever transformers makes of a wrong name becomes one clear error."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tocom_hf.errors import ArgumentError, TocomError, UnsupportedModelError


if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def refused_input(what: str) -> Iterator[None]:
    """Turn what a library raises about a user's input into an `ArgumentError`.

    Libraries raise many types for wrong input, ValueError and OSError most of all. So the block must hold nothing but
    the call of the library: a mistake of this package within it would look like one of the user.

    Args:
        what: What could not be done, for the message: "The model 'x' cannot be loaded".
    """
    try:
        yield
    except (TocomError, ModuleNotFoundError):
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ArgumentError(f"{what}: {reason}") from error


def load_config(name: str | Path, **arguments: Any) -> Any:
    """The configuration of a checkpoint, as AutoConfig loads it."""
    from transformers import AutoConfig

    _require_transformers_checkpoint(name, arguments)
    with refused_input(f"The model {str(name)!r} cannot be loaded"):
        return AutoConfig.from_pretrained(name, **arguments)


def load_model(model_class: Any, name: str | Path, **arguments: Any) -> Any:
    """A model of a class of transformers, which may be an Auto class."""
    _require_transformers_checkpoint(name, arguments)
    with refused_input(f"The model {str(name)!r} cannot be loaded"):
        return model_class.from_pretrained(name, **arguments)


def unmasked(config: Any) -> dict[str, Any]:
    """What to load a model with so that it sees all patches, which a masked autoencoder drops at random."""
    return {"mask_ratio": 0.0} if hasattr(config, "mask_ratio") else {}


def require_images(config: Any, name: str | Path) -> None:
    """Refuse a model of clips or spectrograms where a command reads images, before any are loaded.

    Args:
        config: Of the model.
        name: What to call it in the message.

    Raises:
        UnsupportedModelError: if the model takes no images.
    """
    from tocom_hf.merging.architectures import ARCHITECTURES, supported_types

    kinds = {ARCHITECTURES[model_type].inputs for model_type in supported_types(config)}
    if kinds and "images" not in kinds:
        raise UnsupportedModelError(
            f"{name} takes {' and '.join(sorted(kinds))} ({config.model_type}), and this command reads images only. "
            "From Python, apply_tome, calibrate and distill take such models, with samples of finished pixel_values."
        )


def load_processor(name: str | Path, **arguments: Any) -> Any:
    """The image processor of a checkpoint; that of timm as one of transformers that gives the same pixels."""
    from transformers import AutoImageProcessor

    from tocom_hf.data.timm_processor import as_image_processor

    with refused_input(f"The image processor of {str(name)!r} cannot be loaded"):
        return as_image_processor(AutoImageProcessor.from_pretrained(name, **arguments))


def make_accelerator(**arguments: Any) -> Any:
    """An `Accelerator`, which may refuse a precision or a tracker."""
    from accelerate import Accelerator

    with refused_input("Accelerate cannot start"):
        return Accelerator(**arguments)


def find_device(name: str | None) -> "torch.device | None":
    """A device by its name, tried out; `None` without one."""
    import torch

    if name is None:
        return None
    with refused_input(f"The device {name!r} cannot be used"):
        device = torch.device(name)
        torch.zeros(1, device=device)
    return device


def _require_transformers_checkpoint(name: str | Path, arguments: dict[str, Any]) -> None:
    """Refuse a checkpoint of another library, before transformers asks for that library or for code."""
    from transformers import PreTrainedConfig

    from tocom_hf.model.checkpoint import is_of_timm, reason_for_foreign

    with refused_input(f"The model {str(name)!r} cannot be loaded"):
        content, _ = PreTrainedConfig.get_config_dict(name, revision=arguments.get("revision"))
    if "model_type" not in content and not is_of_timm(content):
        return  # transformers goes by the name
    reason = reason_for_foreign(content)
    if reason is not None:
        raise UnsupportedModelError(f"The model {str(name)!r} cannot be loaded. {reason}")
