# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Distil a ToCom plugin set for a pre-trained ViT from unlabelled images.

    accelerate launch examples/distill.py --preset paper --model_name_or_path facebook/deit-base-patch16-224 \\
        --dataset_name ILSVRC/imagenet-1k --output_dir tocom-deit-base --resume_from_checkpoint latest

It may be stopped or killed at any time: the same command goes on from the newest checkpoint.

It is the command `tocom distill`.
"""

import sys

from tocom_hf.cli.distill import main


if __name__ == "__main__":
    sys.exit(main())
