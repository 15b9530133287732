# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Serve an image classifier that merges more tokens when the load rises, to hold a latency objective.

    pip install '.[serve]'
    python examples/serve.py --latency_ms 200
    curl --data-binary @image.png -H 'Content-Type: image/png' http://127.0.0.1:8000/predict
    curl http://127.0.0.1:8000/metrics

It is the command `tocom serve`, by default with the embedded model and plugin set; `--plugins ""` is for those that a
checkpoint saved by TocomModel brings.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from tocom_hf.cli import serve


EXAMPLES = Path(__file__).parent
DEFAULTS = [
    "--model_name_or_path",
    str(EXAMPLES / "fashion_mnist" / "checkpoint"),
    "--plugins",
    str(EXAMPLES.parent / "hub_cards" / "tocom-vit-fashion-mnist"),
]


def main(argv: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    return serve.main([*DEFAULTS, *given])


if __name__ == "__main__":
    sys.exit(main())
