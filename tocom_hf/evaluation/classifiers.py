# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Which models have an accuracy: those that choose one class out of several for an image or a clip."""

from transformers import PreTrainedConfig, PreTrainedModel

from tocom_hf.errors import UnsupportedModelError
from tocom_hf.model.tocom_model import TocomModel


_RIGHT = "Accuracy counts the images whose largest output is that of their one label"
_YOURSELF = "Measure it with a metric of its own: with model.at(r): model(pixel_values=...)."


def require_classifier(config: PreTrainedConfig, class_name: str, name: str) -> None:
    """Refuse a model whose outputs are not the classes of an image or a clip, one of which is right.

    Args:
        config: Of the model.
        class_name: Of its class in transformers.
        name: What to call it in a message.

    Raises:
        UnsupportedModelError: if it has no head for images or clips, or one for regression or for several labels an
            image.
    """
    if "ForImageClassification" not in class_name and "ForVideoClassification" not in class_name:
        raise UnsupportedModelError(
            f"{name} is a {class_name}, which classifies no images. Fine-tune it first, for example with "
            "`tocom finetune`, and evaluate the result."
        )
    problem = config.problem_type
    if problem == "multi_label_classification":
        raise UnsupportedModelError(
            f"{name} was trained for several labels an image (problem_type {problem!r} in its config.json). {_RIGHT}. "
            f"{_YOURSELF} If there is one label an image after all, set problem_type to 'single_label_classification'."
        )
    if problem == "regression" or config.num_labels == 1:
        outputs = "one output" if config.num_labels == 1 else f"{config.num_labels} outputs"
        raise UnsupportedModelError(
            f"{name} is a regression with {outputs} (problem_type {problem!r} in its config.json), which has no "
            f"classes. {_RIGHT}. {_YOURSELF}"
        )


def require_classifier_model(model: PreTrainedModel) -> None:
    """`require_classifier` for a model that is loaded. Classes that are not of transformers may be called anything."""
    stock = model.stock_class if isinstance(model, TocomModel) else type(model)
    ours_to_judge = stock.__module__.startswith("transformers.")
    class_name = stock.__name__ if ours_to_judge else "ForImageClassification"
    require_classifier(model.config, class_name, f"The {stock.__name__}")
