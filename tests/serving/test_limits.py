# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What a client may take: too much is refused early, before it costs anything."""

import base64
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.serving import Service, picture

from tocom_hf import ArgumentError


pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("uvicorn")


@pytest.fixture
def started(request):
    """`started(**arguments)`: the service and a client of it."""
    from fastapi.testclient import TestClient

    from tocom_hf.serving.limits import Limits

    def start(max_queue=None, batch_seconds=None, **limits):
        service = Service(Limits(**limits), max_queue, batch_seconds)
        client = TestClient(service.app, raise_server_exceptions=False)
        client.__enter__()
        request.addfinalizer(lambda: (service.gate.set(), client.__exit__(None, None, None)))
        return service, client

    return start


# so large that it is decoded in a thread
LARGE = picture(size=(300, 300))


def many(*pictures):
    return {"images": [base64.b64encode(data).decode() for data in pictures]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_bytes": 0}, "max_bytes must be at least 1"),
        ({"max_images": 0}, "max_images must be at least 1"),
        ({"max_connections": -1}, "max_connections must be at least 1"),
        ({"max_pixels": 10**9}, "Pillow opens no larger"),
        ({"receive_seconds": 0}, "receive_seconds must be positive"),
        ({"answer_seconds": float("nan")}, "answer_seconds must be positive"),
    ],
)
def test_limits_without_a_meaning_are_refused(arguments, message):
    from tocom_hf.serving.limits import Limits

    with pytest.raises(ArgumentError, match=message):
        Limits(**arguments)


def test_a_body_that_is_announced_as_too_large_is_not_waited_for(started):
    _, client = started(max_bytes=1000)

    def body():
        pytest.fail("read")
        yield b""

    answer = client.post("/predict", content=body(), headers={"Content-Length": "1001", "Content-Type": "image/png"})
    assert (answer.status_code, answer.json()["error"]) == (413, "The body has more than 1000 bytes.")


def test_the_pixels_of_all_images_count_together_before_any_is_decoded(started, monkeypatch):
    from tocom_hf.serving import requests

    _, client = started(max_pixels=2500)
    assert client.post("/predict", json=many(picture(), picture(1))).status_code == 200
    monkeypatch.setattr(requests, "to_channels", lambda *arguments: pytest.fail("decoded"))
    answer = client.post("/predict", json=many(picture(), picture(1), picture(2)))
    assert answer.status_code == 413
    assert "2500 in all images of a request are the limit" in answer.json()["error"]


def test_a_service_may_take_fewer_images_than_a_batch_has(started):
    _, client = started(max_images=1)
    answer = client.post("/predict", json=many(picture(), picture(1)))
    assert (answer.status_code, answer.json()["error"]) == (413, "2 images in a request; 1 are the limit.")


@pytest.mark.parametrize("images", ["QUJD", {"QUJD": 1}, None, [1], [None], ["é"]])
def test_images_that_are_no_list_of_text_are_refused(started, images):
    _, client = started()
    answer = client.post("/predict", json={"images": images})
    assert answer.status_code == 400
    assert answer.json()["error"].startswith('Expected {"images": [<base64>, ...]}')


class Held:
    """A service with a batch in the model and others in the queue."""

    def __init__(self, service, client, waiting):
        self.pool = ThreadPoolExecutor(waiting + 2)
        service.gate.clear()
        self.answers = [self.pool.submit(client.post, "/predict", content=picture())]
        assert service.entered.acquire(timeout=30)
        self.answers += [self.pool.submit(client.post, "/predict", content=picture()) for _ in range(waiting)]
        service.wait_until(lambda: service.batcher.queued == waiting)


def test_overload_is_answered_before_the_body_is_read(started, monkeypatch):
    from tocom_hf.serving import service as module

    service, client = started(max_queue=2)
    held = Held(service, client, 2)
    monkeypatch.setattr(module, "read_body", lambda *arguments: pytest.fail("read"))
    refused = client.post("/predict", content=picture())
    assert refused.status_code == 503
    assert "2 images wait already, 2 are the limit" in refused.json()["error"]
    service.gate.set()
    assert [answer.result().status_code for answer in held.answers] == [200] * 3


def test_a_request_that_does_not_fit_is_refused_before_its_images_are_decoded(started, monkeypatch):
    from tocom_hf.serving import service as module

    service, client = started(max_queue=3)
    held = Held(service, client, 2)
    monkeypatch.setattr(module, "open_images", lambda *arguments: pytest.fail("decoded"))
    assert client.post("/predict", json=many(picture(), picture(1))).status_code == 503
    service.gate.set()
    assert [answer.result().status_code for answer in held.answers] == [200] * 3


def test_images_that_are_decoded_hold_their_places(started, monkeypatch):
    """Else all that arrive at once would be let in, and be refused after the work."""
    from tocom_hf.serving import service as module

    service, client = started(max_queue=2)
    going_on, inner = threading.Event(), module.open_images
    monkeypatch.setattr(module, "open_images", lambda *given: going_on.wait(30) and inner(*given))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.post, "/predict", json=many(LARGE, LARGE))
        service.wait_until(lambda: service.batcher.preparing == 2)
        assert client.post("/predict", content=picture()).status_code == 503
        going_on.set()
        assert first.result().status_code == 200
    assert (service.batcher.preparing, service.batcher.queued) == (0, 0)
    assert client.post("/predict", content=picture()).status_code == 200


def test_retry_after_is_the_time_that_the_queue_takes_to_drain(started):
    """Five images are two batches of four, of 3.4 s each at the largest degree."""
    service, client = started(max_queue=5, batch_seconds={0: 9.0, 2: 3.4})
    held = Held(service, client, 5)
    assert client.post("/predict", content=picture()).headers["retry-after"] == "7"
    service.gate.set()
    assert [answer.result().status_code for answer in held.answers] == [200] * 6


def test_an_answer_that_takes_too_long_is_a_503_and_leaves_the_queue(started):
    service, client = started(answer_seconds=0.2)
    service.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(client.post, "/predict", content=picture()) for _ in range(2)]
        for answer in answers:
            assert answer.result().status_code == 503
            assert answer.result().json()["error"] == "There is no answer within 0.2 s. Try again later."
            assert answer.result().headers["retry-after"] == "1"
    assert service.batcher.queued == 0
    service.gate.set()
    assert client.post("/predict", content=picture()).status_code == 200
    assert service.metric("tocom_images_total", target_r="0") == 2  # the one that ran, and the last


def test_who_stops_the_service_is_not_answered_by_it(started):
    service, client = started()
    service.app.state.stop()
    refused = client.post("/predict", content=picture())
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert client.get("/healthz").status_code == 503
    assert client.get("/healthz").json()["status"] == "stopping"
