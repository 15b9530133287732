# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Calls at once, and the copies of a model that they may run on."""

import threading


def run_in_threads(calls):
    """The results of several calls that run at once, three times over."""
    found = [None] * len(calls)

    def run(index):
        for _ in range(3):
            found[index] = calls[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def replicate(module):
    """What `DataParallel` makes of a module for each device."""
    replica = module._replicate_for_data_parallel()
    replica._parameters = dict(module._parameters)
    replica._modules = {name: child and replicate(child) for name, child in module._modules.items()}
    return replica
