# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Measure fine-tuned checkpoints over a grid of degrees: plain merging, ToCom, and training at the target degree.

Checkpoints of the same source degree count as seeds of one experiment, those of other source degrees as what training
at the target reaches. The scale is picked on the validation split, by its labels and, apart from that, without them.

    accelerate launch examples/evaluate.py --checkpoints cub-r0 cub-r8 cub-r16 --plugins tocom-deit-base \\
        --dataset_name cub-200 --target_r 0 8 16 --output_dir results/cub-200

`--dataset_name` takes a name of `tocom_hf.data.tasks.TASKS` (cifar-100, cub-200, cars, dogs, flowers,
vtab-1k/svhn, ...), a Hub name, a folder of images or of parquet files, or a parquet file.

It is the command `tocom evaluate`.
"""

import sys

from tocom_hf.cli.evaluate import main


if __name__ == "__main__":
    sys.exit(main())
