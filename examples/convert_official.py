# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Convert checkpoints of the authors' repository into a plugin set, and timm DeiT or ViT weights into transformers'.

    python examples/convert_official.py --plugins checkpoint.pth \\
        --model_name_or_path facebook/deit-base-patch16-224 --output_dir tocom-deit-base
    python examples/convert_official.py --weights deit_base_patch16_224-b5f2ef4d.pth --output_dir deit-base

A checkpoint of plugins holds, for every block, `attn.q_tocom` and `attn.v_tocom`: adapters of 16 * h rows, of which
the last r * h are active at degree r. So the rows of `P_i_i+1` are the h before the last i * h. timm is not needed.

It is the command `tocom convert`.
"""

import sys

from tocom_hf.cli.convert import main


if __name__ == "__main__":
    sys.exit(main())
