# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The service on a Ray of one node that is started here, for the benchmarks of the service."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator

import httpx
from http_load import CHECKPOINT, PLUGINS, ROOT


class RayService:
    """Ray Serve with the embedded model: what `serve run tocom_hf.serving.ray_app:app` starts, and its operator.

    Args:
        port: Where it serves, over loopback.
        replicas: How many there are, half a CPU each in Ray's books, with one thread each.
        settings: Of the deployment, as in `tocom_hf.serving.settings.DeploymentSettings`.
    """

    def __init__(self, port: int, replicas: int, **settings: object):
        self.port = port
        self.arguments = {
            "model_name_or_path": str(CHECKPOINT), "plugins": str(PLUGINS), "num_replicas": replicas, "num_cpus": 0.5,
            "threads": 1, **settings,
        }  # fmt: skip
        self._api = f"http://127.0.0.1:{_free_port()}/api/serve/applications/"

    def start(self) -> None:
        import ray

        # read when Ray starts its processes, which listen on the loopback alone
        os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", HF_HUB_OFFLINE="1")
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        ray.init(
            num_cpus=max(2, os.cpu_count() or 2), include_dashboard=True, dashboard_port=httpx.URL(self._api).port,
            logging_level="error", log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}},
        )  # fmt: skip
        self.deploy()

    def deploy(self, **changes: object) -> None:
        """Send the application with some settings changed, as `serve deploy` does, and wait until Ray has it."""
        self.arguments.update(changes)
        application = {
            "name": "tocom", "route_prefix": "/", "import_path": "tocom_hf.serving.ray_app:app",
            "args": self.arguments,
        }  # fmt: skip
        config = {"http_options": {"host": "127.0.0.1", "port": self.port}, "applications": [application]}
        answer = httpx.put(self._api, json=config, timeout=60)
        if answer.is_error:
            raise SystemExit(f"Ray Serve refused the application: {answer.text}")
        self.wait()

    def wait(self, seconds: float = 180) -> None:
        """Until all replicas of what was deployed last run."""
        end = time.monotonic() + seconds
        while not self._is_ready():
            if time.monotonic() > end:
                raise SystemExit(f"Ray Serve did not start within {seconds:g} s: {self._details()}")
            time.sleep(0.1)

    def kill_a_replica(self) -> None:
        """SIGKILL to the process of one of the replicas."""
        os.kill(self._replicas()[0]["pid"], signal.SIGKILL)

    def stop(self) -> None:
        import ray
        from ray import serve

        serve.shutdown()
        ray.shutdown()

    def _details(self) -> dict:
        return httpx.get(self._api, timeout=60).json()["applications"]["tocom"]

    def _replicas(self) -> list[dict]:
        replicas = self._details()["deployments"]["Classifier"]["replicas"]
        return [replica for replica in replicas if replica["state"] == "RUNNING"]

    def _is_ready(self) -> bool:
        return self._details()["status"] == "RUNNING" and len(self._replicas()) == self.arguments["num_replicas"]


@contextlib.contextmanager
def ray_serving(service: RayService) -> Iterator[None]:
    """Run it within the `with` block."""
    try:
        service.start()
        yield
    finally:
        service.stop()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
