# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What several tests need: small models and plugin sets, slow references, a Hub on this machine."""

import os


# what is compared was computed on the CPU; an Accelerator or Trainer would take a GPU where there is one
os.environ["CUDA_VISIBLE_DEVICES"] = ""
