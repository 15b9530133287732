# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Paint merged tokens over images: a row for each image, with the image and its groups at several r.

    python examples/visualize.py --output groups.png

It is the command `tocom visualize`, by default with the embedded model and images.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from tocom_hf.cli import visualize


EMBEDDED = Path(__file__).parent / "fashion_mnist"
DEFAULTS = ["--model_name_or_path", str(EMBEDDED / "checkpoint"), "--dataset_name", str(EMBEDDED / "test.parquet")]


def main(argv: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    return visualize.main([*DEFAULTS, *given])


if __name__ == "__main__":
    sys.exit(main())
