# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The load-following service on the embedded model: its policy alone, and the HTTP service around it."""

import base64
import copy
import io
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.paths import ROOT
from PIL import Image
from transformers import AutoImageProcessor

from tocom_hf import DegreeCost, TocomModel
from tocom_hf.cost import calibration
from tocom_hf.serving.policy import DegreePolicy


SECONDS = {0: 0.1, 2: 0.08, 4: 0.05, 8: 0.04}
MEASURED = [DegreeCost(r, (50,), 1.0, 1e3 * SECONDS[r], 1.0, 1.0, 1) for r in (0, 8)]
CHECKPOINT, PLUGINS = ROOT / "examples/fashion_mnist/checkpoint", ROOT / "hub_cards/tocom-vit-fashion-mnist"


def policy(**arguments):
    """Full batches of ten images; the queue may take 0.5 s to drain."""
    return DegreePolicy(**{"batch_seconds": SECONDS, "max_batch_size": 10, "objective": 1.0, **arguments})


@pytest.mark.parametrize(
    ("queued", "degree"),
    [(1, 0), (50, 0), (51, 2), (62, 2), (63, 4), (100, 4), (101, 8), (10_000, 8)],
)
def test_the_smallest_degree_that_drains_the_queue_in_time(queued, degree):
    assert policy().choose(queued) == degree


def test_it_comes_back_one_degree_at_a_time_after_patience():
    subject = policy(patience=3)
    assert subject.choose(10_000) == 8
    assert [subject.choose(1) for _ in range(10)] == [8, 8, 4, 4, 4, 2, 2, 2, 0, 0]


def test_patience_starts_again_when_the_queue_is_not_calm():
    subject = policy(patience=3)
    subject.choose(10_000)
    assert [subject.choose(queued) for queued in (1, 1, 60, 1, 1, 1)] == [8, 8, 8, 8, 8, 4]


def test_a_queue_between_the_two_limits_keeps_the_degree():
    """60 images: degree 2 would drain them in time (0.48 s), yet not calmly (0.25 s)."""
    rising, falling = policy(), policy()
    falling.choose(90)
    assert {rising.choose(60) for _ in range(50)} == {2}
    assert {falling.choose(60) for _ in range(50)} == {4}


def test_a_steady_overload_does_not_flap():
    """A fluid queue at 1.3 times the dense capacity: the objective holds, and switches are rare."""
    subject, queued, waits, degrees = policy(), 0.0, [], []
    for _ in range(2000):
        degree = subject.choose(int(queued) + 1)
        degrees.append(degree)
        queued = max(0.0, queued - 10) + 130 * SECONDS[degree]
        waits.append(queued / 10 * SECONDS[degree])
    assert max(waits) < 1.0
    assert sum(one != other for one, other in itertools.pairwise(degrees)) < 2000 / 10
    assert degrees.count(8) == 0


def test_it_learns_that_the_service_is_slower_than_calibrated():
    subject = policy()
    for _ in range(200):
        subject.observe(4, 10, 0.15)  # three times the calibrated 0.05 s
    assert subject.pace == pytest.approx(3, rel=0.01)
    assert subject.choose(20) == 2
    subject.observe(4, 3, 99.0)  # less than half full
    assert subject.pace == pytest.approx(3, rel=0.01)


def test_capacity_is_what_the_largest_degree_drains_in_time():
    assert policy().capacity() == 120
    assert policy(objective=0.01).capacity() == 10


def test_degrees_that_are_slower_than_smaller_ones_are_never_chosen():
    subject = policy(batch_seconds={0: 0.1, 1: 0.12, 4: 0.05})
    assert subject.degrees == [0, 4]
    assert {subject.choose(queued) for queued in range(1, 500)} == {0, 4}


@pytest.mark.parametrize(
    "arguments",
    [{"batch_seconds": {}}, {"batch_seconds": {0: 0.0}}, {"max_batch_size": 0}, {"objective": 0}, {"headroom": 0},
     {"calm": 1}, {"patience": 0}],
)  # fmt: skip
def test_settings_without_a_meaning_are_refused(arguments):
    with pytest.raises(ValueError, match=r"Expected|batch_seconds"):
        policy(**arguments)


def png(seed=0, size=(28, 28)):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def loaded():
    pytest.importorskip("fastapi")
    pytest.importorskip("prometheus_client")
    pytest.importorskip("uvicorn")
    return (
        TocomModel.from_pretrained(CHECKPOINT, plugins=PLUGINS),
        AutoImageProcessor.from_pretrained(CHECKPOINT),
    )


class Service:
    """The service behind a test client, with a model that can be held up."""

    def __init__(self, loaded, **arguments):
        from fastapi.testclient import TestClient

        from tocom_hf.serving.service import create_app

        self.model, processor = loaded
        self.model.set_target_r(0)
        max_queue = arguments.pop("max_queue", None)
        self.policy = DegreePolicy(**{"batch_seconds": {0: 1.0, 4: 0.5, 8: 0.1}, "max_batch_size": 4, **arguments})
        self.app = create_app(self.model, processor, self.policy, max_queue)
        self.batcher = self.app.state.batcher
        self.client = TestClient(self.app, raise_server_exceptions=False)
        self.gate = threading.Event()
        self.gate.set()
        self.running = threading.Semaphore(0)
        self.inner = self.batcher._forward
        self.batcher._forward = self.forward

    def forward(self, images, degree):
        self.running.release()
        assert self.gate.wait(30)
        return self.inner(images, degree)

    def __enter__(self):
        self.client.__enter__()
        return self

    def __exit__(self, *error):
        self.gate.set()
        self.client.__exit__(*error)

    def predict(self, body, content_type="image/png"):
        return self.client.post("/predict", content=body, headers={"Content-Type": content_type})

    def metric(self, name, **labels):
        return self.app.state.metrics.registry.get_sample_value(name, labels)


def expected(model, image, processor, r):
    with model.at(r), torch.no_grad():
        pixel_values = processor(Image.open(io.BytesIO(image)).convert("RGB"), return_tensors="pt")["pixel_values"]
        scores = model(pixel_values=pixel_values).logits.softmax(-1)[0]
    return {model.config.id2label[i]: scores[i].item() for i in range(len(scores))}


def test_an_answer_is_the_models(loaded):
    with Service(loaded, objective=100.0) as service:
        answer = service.predict(png(1))
        assert answer.status_code == 200
        content = answer.json()
        assert content["target_r"] == 0
        (predictions,) = content["predictions"]
        scores = expected(*loaded[:1], png(1), loaded[1], 0)
        assert [row["label"] for row in predictions] == sorted(scores, key=scores.get, reverse=True)[:5]
        assert all(row["score"] == pytest.approx(scores[row["label"]], abs=2e-4) for row in predictions)


def test_several_images_in_one_request(loaded):
    with Service(loaded, objective=100.0) as service:
        images = [base64.b64encode(png(seed)).decode() for seed in range(3)]
        answer = service.client.post("/predict", json={"images": images}).json()
        singles = [service.predict(png(seed)).json()["predictions"][0] for seed in range(3)]
        assert [row[0]["label"] for row in answer["predictions"]] == [row[0]["label"] for row in singles]
        assert service.metric("tocom_images_total", target_r="0") == 6


@pytest.mark.parametrize(
    ("body", "content_type", "status", "message"),
    [
        (b"", "image/png", 400, "empty"),
        (b"not an image", "image/png", 400, "known format"),
        (b"[" * 100_000, "application/json", 400, "Expected"),
        (png()[:-300], "image/png", 400, "not an image"),
        (b"{", "application/json", 400, "Expected"),
        (b"[]", "application/json", 400, "Expected"),
        (b'{"images": 3}', "application/json", 400, "Expected"),
        (b'{"images": ["???"]}', "application/json", 400, "Expected"),
        (b'{"images": []}', "application/json", 400, "no images"),
        (b"x" * (16 * 2**20 + 1), "image/png", 413, "more than"),
        (b'{"images": [' + b",".join([b'"' + base64.b64encode(png()) + b'"'] * 5) + b"]}", "application/json", 413,
         "5 images"),
    ],
    ids=range(11),
)  # fmt: skip
def test_bad_requests_are_refused_and_do_no_harm(loaded, body, content_type, status, message):
    with Service(loaded, objective=100.0) as service:
        answer = service.predict(body, content_type)
        assert answer.status_code == status
        assert message in answer.json()["error"]
        assert service.metric("tocom_requests_total", status=str(status)) == 1
        assert service.predict(png()).status_code == 200


def test_too_many_images_are_counted_before_they_are_decoded(loaded, monkeypatch):
    """A body of a few megabytes can hold images of many gigabytes."""
    from tocom_hf.serving import service as module

    monkeypatch.setattr(module, "open_images", lambda *arguments: pytest.fail("decoded"))
    with Service(loaded, objective=100.0) as service:
        answer = service.client.post("/predict", json={"images": [base64.b64encode(png()).decode()] * 5})
        assert (answer.status_code, answer.json()["error"]) == (413, "5 images in a request; 4 are the limit.")


def test_formats_that_pillow_hands_to_other_programs_are_not_opened(loaded):
    with Service(loaded, objective=100.0) as service:
        answer = service.predict(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 28 28\n%%EndComments\nshowpage\n")
        assert answer.status_code == 400
        assert "known format (PNG, JPEG" in answer.json()["error"]


def test_photographs_stand_as_their_camera_was_held(loaded):
    from tocom_hf.serving.requests import decode, open_images

    image, exif = Image.new("RGB", (40, 20)), Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert decode(*open_images([buffer.getvalue()])).size == (20, 40)


def test_requests_that_wait_become_batches_at_a_higher_degree(loaded):
    """While the first request runs, nine more arrive: they are served in batches of four, at degree 8."""
    with Service(loaded, objective=1.0) as service, ThreadPoolExecutor(10) as pool:
        weights = service.model.vit.layers[0].attention.q_proj.weight
        service.gate.clear()
        first = pool.submit(service.predict, png(0))
        assert service.running.acquire(timeout=30)
        rest = [pool.submit(service.predict, png(seed)) for seed in range(1, 10)]
        while service.batcher.queued < 9:
            assert not first.done()
        service.gate.set()
        answers = [future.result().json() for future in [first, *rest]]
        assert [answer["target_r"] for answer in answers[1:]] == [8] * 9
        assert service.metric("tocom_batch_images_count") == 1 + 3
        assert service.metric("tocom_images_total", target_r="8") == 9
        # the same parameter object in the same memory: switching copies no model
        assert service.model.vit.layers[0].attention.q_proj.weight is weights
        for seed, answer in enumerate(answers):
            scores = expected(loaded[0], png(seed), loaded[1], answer["target_r"])
            assert answer["predictions"][0][0]["label"] == max(scores, key=scores.get)


def test_overload_is_refused_with_503(loaded):
    with Service(loaded, objective=100.0, max_queue=2) as service, ThreadPoolExecutor(3) as pool:
        service.gate.clear()
        running = [pool.submit(service.predict, png())]
        assert service.running.acquire(timeout=30)
        running += [pool.submit(service.predict, png()) for _ in range(2)]
        while service.batcher.queued < 2:
            pass
        refused = service.predict(png())
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert "2 are the limit" in refused.json()["error"]
        service.gate.set()
        assert [future.result().status_code for future in running] == [200] * 3
        assert service.predict(png()).status_code == 200


def test_a_failure_of_the_model_is_a_500_and_the_service_goes_on(loaded):
    with Service(loaded, objective=100.0) as service:
        inner, service.inner = service.inner, lambda images, degree: 1 / 0
        answer = service.predict(png())
        assert answer.status_code == 500
        assert "ZeroDivisionError" in answer.json()["error"]
        service.inner = inner
        assert service.predict(png()).status_code == 200
        assert service.client.get("/healthz").status_code == 200


def test_images_that_a_processor_leaves_at_several_sizes(loaded):
    """Those of one size form batches of their own, and the size that the model does not take is the client's error."""
    model, processor = loaded
    processor = copy.deepcopy(processor)
    processor.do_resize = False
    with Service((model, processor), objective=100.0) as service, ThreadPoolExecutor(4) as pool:
        service.gate.clear()
        first = pool.submit(service.predict, png())
        assert service.running.acquire(timeout=30)
        rest = [pool.submit(service.predict, png(size=size)) for size in ((28, 28), (40, 40), (28, 28))]
        while service.batcher.queued < 3:
            assert not first.done()
        service.gate.set()
        assert sorted(future.result().status_code for future in [first, *rest]) == [200, 200, 200, 400]
        assert [future.result().status_code for future in rest][1] == 400
        assert "28*28" in rest[1].result().json()["error"]
        mixed = [base64.b64encode(png(size=size)).decode() for size in ((28, 28), (40, 40))]
        assert service.client.post("/predict", json={"images": mixed}).status_code == 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--degrees", "0", "12"], "target_r=12 is outside"), (["--plugins", ""], "Pass --plugins")],
)
def test_degrees_that_cannot_run_are_found_before_the_service_starts(arguments, message, monkeypatch, refused):
    pytest.importorskip("uvicorn")
    monkeypatch.setattr(calibration, "calibrate", lambda *args, **kwargs: pytest.fail("went on"))
    common = ("--model_name_or_path", CHECKPOINT, "--plugins", PLUGINS)
    assert message in refused("serve", *common, *arguments)


def test_health_and_metrics(loaded):
    with Service(loaded, objective=100.0) as service:
        assert service.client.get("/healthz").json() == {"status": "ok", "target_r": 0}
        service.predict(png())
        metrics = service.client.get("/metrics")
        assert metrics.headers["content-type"].startswith("text/plain")
        for line in (
            'tocom_requests_total{status="200"} 1.0',
            'tocom_images_total{target_r="0"} 1.0',
            "tocom_request_seconds_count 1.0",
            "tocom_queued_images 0.0",
            "tocom_target_r 0.0",
        ):
            assert line in metrics.text
        assert service.client.get("/nothing").status_code == 404
    assert service.app.state.worker.done()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--latency_ms", "nan"], "--latency_ms must be positive and finite, got nan"),
        (["--max_megabytes", "0"], "--max_megabytes must be positive and finite, got 0"),
        (["--max_megapixels", "1e6"], "Pillow opens no larger image"),
        (["--receive_seconds", "-1"], "--receive_seconds must be positive and finite, got -1"),
        (["--answer_seconds", "inf"], "--answer_seconds must be positive and finite, got inf"),
        (["--workers", "0"], "expected a positive integer, got '0'"),
        (["--workers", "2", "--host", "no such host"], "The service cannot listen on no such host, port 8000: "),
        (["--max_connections", "0"], "expected a positive integer, got '0'"),
        (["--max_connections", "1" + "0" * 9], "Raise that (ulimit -n), or allow fewer connections"),
        (["--port", "65536"], "--port must be 0 to 65535, got 65536"),
        (["--host", "no such host"], "The service cannot listen on no such host, port 8000: "),
    ],
)
def test_limits_that_cannot_hold_are_found_before_the_model_is_loaded(arguments, message, monkeypatch, refused):
    pytest.importorskip("uvicorn")
    monkeypatch.setattr("tocom_hf.cli.serve.load_classifier", lambda args: pytest.fail("went on"))
    assert message in refused("serve", "--model_name_or_path", CHECKPOINT, *arguments)


def test_the_command_says_where_it_serves_and_ends_when_it_is_told_to(monkeypatch, run):
    pytest.importorskip("uvicorn")
    from tocom_hf.serving import server

    def tell(app, listener, started):
        assert app.state.limits.max_bytes == 2**19
        started("http://127.0.0.1:1")

    monkeypatch.setattr(server, "serve_until_stopped", tell)
    monkeypatch.setattr(calibration, "measure_costs", lambda *args, **kwargs: MEASURED)
    ended = run("serve", "--model_name_or_path", CHECKPOINT, "--plugins", PLUGINS, "--degrees", "0", "8", "--port", "0",
                "--max_megabytes", "0.5")  # fmt: skip
    assert ended.code == 0
    assert ended.output.endswith("Serving on http://127.0.0.1:1\n")


@pytest.mark.parametrize("more", [[], ["--workers", "2"]])
@pytest.mark.parametrize("reuse_port", [False, True])
@pytest.mark.parametrize("listens", [False, True])
def test_a_port_is_not_shared_with_somebody_else(more, reuse_port, listens, monkeypatch, refused):
    """Nor is that of a service which shares its own, nor of one that is loading its model: whoever wants that says
    `--reuse_port`."""
    pytest.importorskip("uvicorn")
    from tocom_hf.serving.server import bind

    monkeypatch.setattr("tocom_hf.cli.serve.load_classifier", lambda args: pytest.fail("went on"))
    with bind("127.0.0.1", 0, reuse_port) as other:
        if listens:
            other.listen()
        port = other.getsockname()[1]
        message = refused("serve", "--model_name_or_path", CHECKPOINT, *more, "--port", port)
    assert f"The service cannot listen on 127.0.0.1, port {port}: " in message
