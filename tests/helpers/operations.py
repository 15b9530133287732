# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Which operations of torch a call starts."""

from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Records the names of the operations that compute something; a view of a tensor computes nothing."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        is_view = any(part.alias_info and not part.alias_info.is_write for part in function._schema.returns)
        name = function.overloadpacket.__name__
        if not is_view and name != "_unsafe_view":
            self.names.append(name)
        return function(*args, **(kwargs or {}))
