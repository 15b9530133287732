# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The exceptions that tocom_hf raises for wrong input. All derive from `TocomError`."""


class TocomError(Exception):
    """Base class of every error that tocom_hf raises on purpose.

    Example:

    ```python
    >>> from tocom_hf import PluginSet, TocomError
    >>> try:
    ...     PluginSet.from_pretrained("hub_cards/tocom-vit-fashion-mnist").compose(0, 9)
    ... except TocomError as error:
    ...     print(type(error).__name__, error)
    DegreeError target_r=9 is outside the plugin set, which covers r = 0..8. ...

    ```
    """


class UnsupportedModelError(TocomError, ValueError):
    """The model's architecture, or the way that it is held (quantised, offloaded), cannot be merged or composed."""


class UnsupportedInputError(TocomError, ValueError):
    """A forward call asks for something that token merging cannot honour, such as an attention mask."""


class DegreeError(TocomError, ValueError):
    """A merging degree (`r`, `source_r`, `target_r`), schedule or scale is of the wrong type or out of range."""


class ArgumentError(TocomError, ValueError):
    """An argument of a job, such as a batch size, is out of range."""


class BudgetError(TocomError, ValueError):
    """A wanted cost (`target_speedup`, `target_latency_ms`, `target_gflops`) is malformed, or no degree meets it."""


class CalibrationError(TocomError, ValueError):
    """A calibration cannot be read, or was measured for a model of another shape."""


class BackboneMismatchError(TocomError, ValueError):
    """A plugin set was trained for another backbone than the model's."""


class PluginFileError(TocomError, OSError):
    """A file of a plugin set, a checkpoint or an export is missing, damaged, or not what its configuration promises."""


class HubError(TocomError, OSError):
    """The Hugging Face Hub refused or failed a request, or cannot be reached.

    Attributes:
        status_code: The HTTP status of its answer, or `None` where there was none.
    """

    def __init__(self, message: str, status_code: int | None = None):
        super().__init__(message)
        self.status_code = status_code


class MissingExtraError(TocomError, ImportError):
    """A function needs a package of an extra, such as `tocom-hf[train]`, which is not installed."""


class DatasetError(TocomError, ValueError):
    """A data set is empty, lacks a column that the job needs, or has an image that cannot be read."""

    def __init__(self, message: str):
        # PyTorch raises the error of a loading process anew, with that one's traceback in front of what it says.
        if message.startswith("Caught ") and "\nOriginal Traceback" in message:
            message = message.rpartition(f".{type(self).__name__}: ")[2].strip()
        super().__init__(message)


class UnreadableImageError(DatasetError):
    """An image is damaged, or missing from its sample: whoever reads it again finds the same."""


class ComposedWeightsError(TocomError, RuntimeError):
    """Weights that hold a composed plugin chain were changed from outside, for instance by training."""


class CheckpointError(TocomError, OSError):
    """A checkpoint of a distillation is damaged, or belongs to a run with other settings."""


class DistillationError(TocomError, RuntimeError):
    """A distillation cannot go on, for instance because its loss is no longer finite."""


class WorkersError(TocomError, RuntimeError):
    """A process of a service with several workers ended before it had done its part."""


class DistillationInterrupted(TocomError):  # noqa: N818, as KeyboardInterrupt
    """A distillation was told to stop (SIGTERM, SIGINT), after it had written a checkpoint.

    Attributes:
        signum: The signal.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum
