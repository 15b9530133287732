# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Fine-tune a ViT for image classification while it merges `source_r` tokens in every layer.

The checkpoint records its `source_r`, so that `TocomModel.from_pretrained` can run it at another degree later.

    accelerate launch examples/finetune.py --model_name_or_path google/vit-base-patch16-224-in21k \\
        --dataset_name food101 --source_r 4 --output_dir vit-food101 --num_train_epochs 5 --learning_rate 1e-4

With `--lora_rank 8` only LoRA adapters and the head are trained. They are merged into the weights at the end, so the
result is an ordinary checkpoint as well.

It is the command `tocom finetune`.
"""

import sys

from tocom_hf.cli.finetune import main


if __name__ == "__main__":
    sys.exit(main())
