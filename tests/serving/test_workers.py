# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Processes that serve one address: they start, one is killed, they are told to stop, or their parent is gone."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import workers as targets
from helpers.paths import ROOT
from helpers.serving import picture, predict

from tocom_hf import ArgumentError
from tocom_hf.errors import WorkersError
from tocom_hf.serving import workers
from tocom_hf.serving.workers import Workers


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="several workers need Linux")


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "It has not come to that."
        time.sleep(0.02)


def pids(folder):
    return {int(path.name) for path in folder.iterdir() if path.name.isdecimal()}


def runs(pid):
    """Whether a process is there and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Run:
    """`Workers.run` in this thread, with what happens meanwhile in another, which tells it to stop at its end."""

    def __init__(self, target, folder, meanwhile=lambda run: None, count=2, stop_seconds=30):
        self.folder, self.calls, self.ended = folder, 0, []
        self.failure = None

        def act():
            try:
                meanwhile(self)
            except BaseException as error:
                self.failure = error
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

        def started():
            self.calls += 1
            threading.Thread(target=act).start()

        handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        subject = Workers(target, (str(folder),), count, stop_seconds)
        try:
            self.code = subject.run(started, lambda pid, code: self.ended.append((pid, code)))
        finally:
            assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
        if self.failure:
            raise self.failure
        assert not any(map(runs, pids(folder)))


def test_they_serve_until_they_are_told_to_stop(tmp_path):
    run = Run(targets.serve, tmp_path, count=3)
    assert (run.code, run.calls, run.ended) == (0, 1, [])
    assert len(pids(tmp_path)) == 3


def test_another_is_started_where_one_is_killed(tmp_path):
    killed = []

    def meanwhile(run):
        killed.append(min(pids(tmp_path)))
        os.kill(killed[0], signal.SIGKILL)
        wait_until(lambda: len(pids(tmp_path)) == 3)

    run = Run(targets.serve, tmp_path, meanwhile)
    assert run.code == 0
    assert run.calls == 1
    assert run.ended == [(killed[0], -signal.SIGKILL)]


def test_one_that_ends_before_it_serves_ends_all(tmp_path):
    with pytest.raises(WorkersError, match=r"Worker \d+ ended with the code 3 before all of them served"):
        Run(targets.fail_second, tmp_path)
    assert not any(map(runs, pids(tmp_path)))


def test_where_others_serve_it_is_tried_again_after_a_pause(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_PAUSE_SECONDS", 0.3)

    def meanwhile(run):
        os.kill(min(pids(tmp_path)), signal.SIGKILL)
        wait_until(lambda: len(list(tmp_path.glob("failed-*"))) == 3)

    start = time.monotonic()
    run = Run(targets.serve_first_two, tmp_path, meanwhile)
    assert run.code == 0
    assert [code for _, code in run.ended][:3] == [-signal.SIGKILL, 4, 4]
    assert time.monotonic() - start > 2 * 0.3


def test_where_one_cannot_be_started_the_others_serve_on(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_PAUSE_SECONDS", 0.2)
    start, failures = Workers._start, []

    def fail_twice(self):
        if len(pids(tmp_path)) == 2 and len(failures) < 2:
            failures.append(time.monotonic())
            raise OSError("no more processes")
        return start(self)

    monkeypatch.setattr(Workers, "_start", fail_twice)

    def meanwhile(run):
        os.kill(min(pids(tmp_path)), signal.SIGKILL)
        wait_until(lambda: len(pids(tmp_path)) == 3)
        assert runs(sorted(pids(tmp_path))[1])

    assert Run(targets.serve, tmp_path, meanwhile).code == 0
    assert len(failures) == 2


def test_where_the_second_cannot_be_started_the_first_is_stopped(tmp_path, monkeypatch):
    start = Workers._start

    def fail(self):
        if self._workers:
            wait_until(lambda: len(pids(tmp_path)) == 1)
            raise OSError("no more processes")
        return start(self)

    monkeypatch.setattr(Workers, "_start", fail)
    with pytest.raises(OSError, match="no more processes"):
        Run(targets.serve, tmp_path)
    assert not any(map(runs, pids(tmp_path)))


def test_ctrl_c_is_for_the_parent(tmp_path):
    """It reaches all processes of a terminal."""

    def meanwhile(run):
        for pid in pids(tmp_path):
            os.kill(pid, signal.SIGINT)
        time.sleep(0.2)
        assert all(map(runs, pids(tmp_path)))
        os.kill(os.getpid(), signal.SIGINT)

    run = Run(targets.serve, tmp_path, meanwhile)
    assert (run.code, run.ended) == (0, [])


def test_one_that_does_not_stop_is_killed(tmp_path):
    run = Run(targets.serve_for_ever, tmp_path, stop_seconds=0.3)
    assert run.code == 1


@pytest.mark.parametrize(
    ("what", "count"),
    [
        ("Workers(workers.serve, (FOLDER,), 2, 30).run(lambda: None, print)", 2),
        ("call_apart(workers.sleep, FOLDER)", 1),
    ],
)
def test_they_end_where_their_parent_is_killed(tmp_path, what, count):
    """And leave no figures behind."""
    program = (
        "from helpers import workers\n"
        "from tocom_hf.serving.workers import Workers, call_apart, shared_metrics\n"
        "if __name__ == '__main__':\n"
        f"    FOLDER = {str(tmp_path)!r}\n"
        "    with shared_metrics():\n"
        f"        {what}\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(program)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    parent = subprocess.Popen([sys.executable, str(script)], env=environment)
    wait_until(lambda: len(pids(tmp_path)) == count)
    variables = Path(f"/proc/{min(pids(tmp_path))}/environ").read_bytes().split(b"\0")
    (folder,) = [value.partition(b"=")[2] for value in variables if value.startswith(workers.METRICS_FOLDER.encode())]
    assert Path(os.fsdecode(folder)).is_dir()
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(map(runs, pids(tmp_path))))
    assert not Path(os.fsdecode(folder)).exists()


def test_a_folder_that_the_user_named_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv(workers.METRICS_FOLDER, str(tmp_path / "mine"))
    (tmp_path / "mine").mkdir()
    told = []
    monkeypatch.setattr(workers, "wait", lambda objects: None)
    monkeypatch.setattr(workers.multiprocessing, "parent_process", lambda: SimpleNamespace(sentinel=0))
    monkeypatch.setattr(workers.os, "kill", lambda pid, number: told.append(number))
    workers._end_with_the_parent()
    assert told == [signal.SIGTERM]
    assert (tmp_path / "mine").is_dir()


def test_a_call_apart_returns_raises_and_notices_its_end():
    assert workers.call_apart(targets.double, 21) == 42
    with pytest.raises(ArgumentError, match="no number"):
        workers.call_apart(targets.double, None)
    with pytest.raises(WorkersError, match="The process for leave ended with the code 5"):
        workers.call_apart(targets.leave, 5)


def test_figures_in_files_end_with_the_block(monkeypatch):
    pytest.importorskip("prometheus_client")
    monkeypatch.setenv(workers.METRICS_FOLDER, "mine")
    with workers.shared_metrics() as forget:
        folder = Path(os.environ[workers.METRICS_FOLDER])
        alive, dead = folder / "gauge_livesum_1.db", folder / "gauge_livesum_2.db"
        alive.touch()
        dead.touch()
        forget(2)
        assert (alive.exists(), dead.exists()) == (True, False)
    assert not folder.exists()
    assert os.environ[workers.METRICS_FOLDER] == "mine"


def test_other_systems_than_linux_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ArgumentError, match="Several workers need Linux"):
        workers.require_shared_ports()


@pytest.mark.slow
def test_the_command_with_two_workers_answers_through_the_end_of_one():
    for package in ("fastapi", "prometheus_client", "uvicorn"):
        pytest.importorskip(package)
    command = [
        sys.executable, "-m", "tocom_hf.cli.main", "serve", "--workers", "2", "--port", "0", "--degrees", "0", "8",
        "--model_name_or_path", ROOT / "examples/fashion_mnist/checkpoint",
        "--plugins", ROOT / "hub_cards/tocom-vit-fashion-mnist",
    ]  # fmt: skip
    with subprocess.Popen(list(map(str, command)), text=True, stdout=subprocess.PIPE, cwd=ROOT) as service:
        line = next(line for line in service.stdout if line.startswith("Serving on "))
        assert line.endswith(" with 2 workers\n")
        port, body = int(re.search(r":(\d+) with", line)[1]), picture()
        children = Path(f"/proc/{service.pid}/task/{service.pid}/children").read_text().split()
        mine = [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(mine) == 2

        answered = 0
        for number in range(60):  # each over a connection of its own, so both get some
            if number == 30:
                os.kill(mine[0], signal.SIGKILL)
                time.sleep(0.5)
            with contextlib.suppress(ConnectionError):
                answered += predict(port, body)[0] == 200
        assert answered >= 59
        assert f'tocom_requests_total{{status="200"}} {answered:.1f}' in figures(port)
        assert "tocom_queued_images 0.0" in figures(port)

        service.send_signal(signal.SIGTERM)
        assert service.wait(60) == 0
    assert not any(map(runs, mine))


def figures(port):
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        return answer.read().decode().splitlines()
