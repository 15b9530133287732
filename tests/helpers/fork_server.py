# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Processes that begin with everything imported, for tests that need processes of their own.

torch, transformers and datasets take seconds to import. The server imports them once and runs nothing itself, so that
it has no threads: each process is forked from it, as a new interpreter would be right after its imports.
"""

import importlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from helpers.paths import ROOT


# what the processes need, also what a distillation would import only when it begins
PRELOADED = ["helpers.distill_worker", "peft", "torch.profiler"]


class Finished(NamedTuple):
    """What is left of a process: its exit code, negative for a signal, and what it printed."""

    code: int
    output: str


class ForkServer:
    """Starts processes; it belongs to one test session and is closed at its end."""

    def __init__(self):
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        # the number of threads is read when the libraries are loaded, which the processes do not do again
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "helpers.fork_server"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        function: str,
        argument: Any,
        folder: Path,
        environments: list[dict[str, str]] | None = None,
        timeout: float = 240,
    ) -> list[Finished]:
        """Call a function in one or several processes at once, and wait for all of them.

        Args:
            function: `module:name`.
            argument: Its argument, anything that JSON can hold.
            folder: Where the processes run, and where what they print is kept.
            environments: For each process, what its environment has besides the server's. One process by default.
            timeout: Seconds after which they are killed and the test fails.
        """
        environments = [{}] if environments is None else environments
        outputs = [folder / f"process-{time.monotonic_ns()}-{index}.txt" for index in range(len(environments))]
        processes = []
        for environment, output in zip(environments, outputs, strict=True):
            processes.append({"environment": environment, "output": str(output)})
        job = {
            "function": function,
            "argument": argument,
            "folder": str(folder),
            "timeout": timeout,
            "processes": processes,
        }
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "The fork server has died."
        codes = json.loads(answer)
        finished = []
        for code, output in zip(codes, outputs, strict=True):
            assert code is not None, f"A process took more than {timeout} s: {output.read_text()}"
            finished.append(Finished(code, output.read_text()))
        return finished

    def close(self):
        # an end of file would not come while processes that the session has forked are left, which hold the pipe too
        self.process.stdin.write("\n")
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


def ranks(count: int, machines: int = 1) -> list[dict[str, str]]:
    """The environments that `torchrun` gives to `count` processes, which are as many on each machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environments = []
    for rank in range(count):
        local = count // machines
        environments.append(
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank % local),
                "GROUP_RANK": str(rank // local),
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(local),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        )
    return environments


def serve() -> None:
    """Read jobs from the standard input, one a line, and answer each with the exit codes of its processes.

    An empty line ends it.
    """
    for module in PRELOADED:
        importlib.import_module(module)
    # the answers go where only this process writes: what is imported may print
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    context = multiprocessing.get_context("fork")
    for line in sys.stdin:
        if not line.strip():
            break
        job = json.loads(line)
        children = [context.Process(target=_run, args=(job, process)) for process in job["processes"]]
        for child in children:
            child.start()
        codes = _wait(children, time.monotonic() + job["timeout"])
        answers.write(json.dumps(codes) + "\n")
        answers.flush()


def _run(job: dict, process: dict) -> None:
    """What a process does; multiprocessing prints the traceback of an exception and exits with 1."""
    written = os.open(process["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(written, 1)
    os.dup2(written, 2)
    os.chdir(job["folder"])
    os.environ.update(process["environment"])
    module, name = job["function"].split(":")
    function = getattr(importlib.import_module(module), name)
    function(job["argument"])


def _wait(children: list, deadline: float) -> list[int | None]:
    """The exit codes of processes, negative for a signal, and `None` for those that had to be killed."""
    codes: list[int | None] = []
    for child in children:
        child.join(max(0, deadline - time.monotonic()))
        codes.append(child.exitcode)
        if child.exitcode is None:
            child.kill()
            child.join()
    return codes


if __name__ == "__main__":
    serve()
