# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Packages that only a part of the library needs: what to install where one of them is missing."""

import contextlib
from collections.abc import Iterator

from tocom_hf.errors import MissingExtraError


# the extra of pyproject.toml that brings a package, by the name that it is imported by
EXTRAS = {
    "accelerate": "train",
    "datasets": "train",
    "kornia": "train",
    "PIL": "vis",
    "matplotlib": "vis",
    "fastapi": "serve",
    "prometheus_client": "serve",
    "uvicorn": "serve",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "openvino": "openvino",
    "ray": "ray",
}


@contextlib.contextmanager
def require_extras(what: str, extra: str | None = None) -> Iterator[None]:
    """Name the extra to install where an import in the `with` block fails for want of it.

    Args:
        what: What needs the package, for the message: the name of a function.
        extra: The extra that brings all that it needs; by default one that brings the package.

    Raises:
        MissingExtraError: if a package of an extra is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise MissingExtraError(
            f"{what} needs {package}, which is not installed. Run: pip install 'tocom-hf[{extra or EXTRAS[package]}]'"
        ) from error
