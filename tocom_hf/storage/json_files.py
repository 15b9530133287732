# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""JSON files of strangers. What an export needs to run imports this, so it needs nothing but Python itself."""

import json
from pathlib import Path
from typing import Any

from tocom_hf.errors import PluginFileError


MAX_JSON_BYTES = 16 * 2**20


def read_json(path: Path, advice: str = "Download or copy the plugin set again.") -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: The file.
        advice: What to do where it is damaged, a sentence for the message.

    Raises:
        PluginFileError: if the file does not hold one, or is larger than any that this package writes.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise PluginFileError(f"{path} has {size} bytes, expected at most {MAX_JSON_BYTES}. {advice}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise PluginFileError(f"{path} is not valid JSON: {error}. {advice}") from error
    if not isinstance(content, dict):
        raise PluginFileError(f"{path} must hold a JSON object, found {type(content).__name__}. {advice}")
    return content
