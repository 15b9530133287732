# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Fit a scale for every layer and plugin to one checkpoint, on a few hundred unlabelled images of its task.

    python examples/fit_scales.py --model_name_or_path deit-food101 --plugins tocom-deit-base --dataset_name food101 \\
        --output_dir tocom-deit-food101

The result is a plugin set for this checkpoint:
`TocomModel.from_pretrained("deit-food101", plugins="tocom-deit-food101", target_r=16)`.

It is the command `tocom fit-scales`.
"""

import sys

from tocom_hf.cli.fit_scales import main


if __name__ == "__main__":
    sys.exit(main())
