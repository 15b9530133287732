# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The service on a real Ray that is started here: answers, load, updates while it serves, and replicas that die."""

import base64
import os
import signal
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from helpers.paths import ROOT

from tocom_hf import ArgumentError, MissingExtraError
from tocom_hf.serving.ray_app import app


CHECKPOINT, PLUGINS = ROOT / "examples/fashion_mnist/checkpoint", ROOT / "hub_cards/tocom-vit-fashion-mnist"
IMAGES = sorted((ROOT / "examples/space/samples").glob("*.png"))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tocom-hf\[ray\]'"):
        app({"model_name_or_path": "model"})


class Service:
    """The service on one node with two replicas, and what a client and an operator do to it."""

    def __init__(self, ray, **settings):
        from ray import serve

        self.serve = serve
        self.http, self.dashboard, self.metrics_port = free_port(), free_port(), free_port()
        self.ray = ray
        ray.init(
            num_cpus=2, include_dashboard=True, dashboard_port=self.dashboard, _metrics_export_port=self.metrics_port,
            logging_level="error", log_to_driver=False,
        )  # fmt: skip
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.http}", timeout=120)
        self.arguments = {
            "model_name_or_path": str(CHECKPOINT), "calibration_seconds": 0.2, "num_replicas": 2, "num_cpus": 0.5,
            "threads": 1, "max_batch_size": 8, "latency_ms": 300, "max_queue": 1000,
        }  # fmt: skip
        self.deploy(plugins=str(PLUGINS))

    def deploy(self, arguments=None, **user_config):
        """What `serve deploy` sends, and wait until Ray has it."""
        deployments = [{"name": "Classifier", "user_config": user_config}]
        application = {
            "name": "tocom", "route_prefix": "/", "import_path": "tocom_hf.serving.ray_app:app",
            "args": {**self.arguments, **(arguments or {})}, "deployments": deployments,
        }  # fmt: skip
        config = {"http_options": {"host": "127.0.0.1", "port": self.http}, "applications": [application]}
        httpx.put(self.api, json=config, timeout=60).raise_for_status()
        self.wait_until(lambda: self.details["status"] == "RUNNING")

    @property
    def api(self):
        return f"http://127.0.0.1:{self.dashboard}/api/serve/applications/"

    @property
    def details(self):
        return httpx.get(self.api, timeout=60).json()["applications"]["tocom"]

    @property
    def replicas(self):
        return [one for one in self.details["deployments"]["Classifier"]["replicas"] if one["state"] == "RUNNING"]

    def wait_until(self, holds, seconds=120):
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, self.details
            time.sleep(0.3)

    def predict(self, image):
        return self.client.post("/predict", content=image.read_bytes(), headers={"Content-Type": "image/png"})

    def described(self):
        """What each replica says about itself, as far as a few questions reach them."""
        return [self.client.get("/healthz").json() for _ in range(8)]

    def metrics(self):
        return httpx.get(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=60).text


@pytest.fixture(scope="module")
def service():
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # it listens on the loopback only, and for this test alone
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        try:
            yield Service(ray)
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def expected():
    """The label of each image at each degree, by the model alone."""
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor

    from tocom_hf import TocomModel

    model = TocomModel.from_pretrained(CHECKPOINT, plugins=PLUGINS)
    images = [Image.open(path).convert("RGB") for path in IMAGES]
    pixels = AutoImageProcessor.from_pretrained(CHECKPOINT)(images, return_tensors="pt")["pixel_values"]
    scores = {}
    for degree in range(9):
        with model.at(degree), torch.no_grad():
            rows = model(pixel_values=pixels).logits.softmax(-1)
        names = model.config.id2label
        for path, row in zip(IMAGES, rows, strict=True):
            scores[path, degree] = {names[index]: row[index].item() for index in range(len(row))}
    return scores


def require_right(answer, image, expected):
    assert answer.status_code == 200, answer.text
    content = answer.json()
    scores = expected[image, content["target_r"]]
    for row in content["predictions"][0]:
        assert row["score"] == pytest.approx(scores[row["label"]], abs=3e-4)
    return content["target_r"]


class Clients:
    """Four clients that ask without a pause while the `with` block runs; every answer must be the model's."""

    def __init__(self, service, expected):
        self.service, self.expected = service, expected
        self.statuses, self.wrong, self.stopped = Counter(), [], threading.Event()
        self.pool = ThreadPoolExecutor(4)

    def ask(self, number):
        while not self.stopped.is_set():
            image = IMAGES[number % len(IMAGES)]
            answer = self.service.predict(image)
            self.statuses[answer.status_code] += 1
            if answer.status_code == 200:
                try:
                    require_right(answer, image, self.expected)
                except AssertionError as error:
                    self.wrong.append(str(error))
            number += 1

    def __enter__(self):
        self.running = [self.pool.submit(self.ask, number) for number in range(4)]
        time.sleep(1)
        return self

    def __exit__(self, *error):
        self.stopped.set()
        for one in self.running:
            one.result()
        print("requests by status:", dict(self.statuses))


@pytest.mark.slow
def test_an_answer_is_the_models(service, expected):
    for image in IMAGES:
        assert require_right(service.predict(image), image, expected) == 0
    refused = service.client.post("/predict", content=b"no image")
    assert (refused.status_code, refused.json()["error"][:24]) == (400, "The body is not an image")


@pytest.mark.slow
def test_the_degree_rises_with_the_queue_of_a_replica(service, expected):
    """Requests of eight images at once, far more than the smallest degree serves in 300 ms."""
    encoded = base64.b64encode(IMAGES[0].read_bytes()).decode()
    with ThreadPoolExecutor(48) as pool:
        sent = [pool.submit(service.client.post, "/predict", json={"images": [encoded] * 8}) for _ in range(96)]
        degrees = Counter(require_right(one.result(), IMAGES[0], expected) for one in sent)
    print("requests by degree:", dict(degrees))
    assert max(degrees) > 0


@pytest.mark.slow
def test_metrics_have_the_degree_and_the_replica(service):
    def lines():
        return [line for line in service.metrics().splitlines() if line.startswith("ray_tocom_images_total{")]

    service.wait_until(lines, 60)
    assert all('degree="' in line and 'replica="' in line for line in lines())


@pytest.mark.slow
def test_an_update_while_requests_come_drops_none(service, expected):
    with Clients(service, expected) as clients:
        service.deploy(plugins=str(PLUGINS), degrees=[2, 8])
        service.wait_until(lambda: all(one["degrees"][0] == 2 for one in service.described()))
        assert require_right(service.predict(IMAGES[0]), IMAGES[0], expected) in (2, 8)
        service.deploy(plugins=str(PLUGINS))
        service.wait_until(lambda: all(one["degrees"][0] == 0 for one in service.described()))
    assert clients.wrong == []
    assert {*clients.statuses} == {200}


@pytest.mark.slow
def test_an_update_that_cannot_be_loaded_leaves_what_serves(service, expected):
    with Clients(service, expected) as clients:
        service.deploy(plugins=str(ROOT / "nothing"))
        service.wait_until(lambda: all(one["failed_update"] for one in service.described()))
        assert all(one["plugins"] == str(PLUGINS) for one in service.described())
        service.deploy(plugins=str(PLUGINS))
        service.wait_until(lambda: not any(one["failed_update"] for one in service.described()))
    assert clients.wrong == []
    assert {*clients.statuses} == {200}


@pytest.mark.slow
def test_a_replica_that_is_killed_loses_no_request(service, expected):
    with Clients(service, expected) as clients:
        killed = service.replicas[0]
        os.kill(killed["pid"], signal.SIGKILL)
        start = time.monotonic()
        service.wait_until(
            lambda: len(service.replicas) == 2 and killed["pid"] not in [one["pid"] for one in service.replicas]
        )
        print(f"two replicas again after {time.monotonic() - start:.1f} s")
    assert clients.wrong == []
    assert {*clients.statuses} == {200}


@pytest.mark.slow
def test_overload_is_refused_with_503_and_when_to_come_back(service):
    service.deploy(plugins=str(PLUGINS), max_queue=1)
    service.wait_until(lambda: not any(one["updating"] for one in service.described()))
    with ThreadPoolExecutor(48) as pool:
        answers = [one.result() for one in [pool.submit(service.predict, IMAGES[0]) for _ in range(200)]]
    refused = [answer for answer in answers if answer.status_code != 200]
    print("refused:", len(refused), "of", len(answers))
    assert refused
    assert {answer.status_code for answer in refused} == {503}
    assert {answer.headers.get("retry-after") for answer in refused} == {"1"}
    service.deploy(plugins=str(PLUGINS))


@pytest.mark.slow
def test_settings_that_do_not_fit_are_found_when_the_application_is_built(service):
    with pytest.raises(ArgumentError, match="There is no setting 'latency'"):
        app({"model_name_or_path": "model", "latency": 3})
