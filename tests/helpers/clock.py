# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""A clock by which a model takes a known time, so that measured figures can be compared with exact ones."""

import time

from tocom_hf.merging.backbones import find_backbone


class TokenClock:
    """Stands still, but for one second for each token of an image that enters the last layer of a model."""

    def __init__(self, monkeypatch, model):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        find_backbone(model).layers[-1].register_forward_pre_hook(self._pass)

    def _pass(self, module, arguments):
        tokens = arguments[0]
        self.now += tokens.shape[1]
