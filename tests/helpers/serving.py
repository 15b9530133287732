# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The service around a tiny model, behind a real port, and what clients do to it."""

import contextlib
import http.client
import io
import json
import socket
import threading
import time

import numpy as np
from PIL import Image
from transformers import ViTImageProcessorPil

from helpers.models import make_model, make_plugins
from tocom_hf import TocomModel


PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})


def picture(seed=0, size=(32, 32), kind="PNG"):
    """The bytes of an image file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


class Service:
    """An application whose model can be held up: `gate.clear()` holds the next batch, `gate.set()` lets it go on."""

    def __init__(self, limits=None, max_queue=None, batch_seconds=None, max_batch_size=4):
        from tocom_hf.serving.limits import Limits
        from tocom_hf.serving.policy import DegreePolicy
        from tocom_hf.serving.service import create_app

        backbone = make_model()
        self.model = TocomModel.from_pretrained(backbone, plugins=make_plugins(backbone), source_r=0)
        policy = DegreePolicy(batch_seconds or {0: 1.0}, max_batch_size, 100.0)
        self.app = create_app(self.model, PROCESSOR, policy, max_queue, limits=limits or Limits())
        self.batcher = self.app.state.batcher
        self.gate, self.entered = threading.Event(), threading.Semaphore(0)
        self.gate.set()
        inner = self.batcher._forward

        def forward(*arguments):
            self.entered.release()
            assert self.gate.wait(30)
            return inner(*arguments)

        self.batcher._forward = forward

    def metric(self, name, **labels):
        return self.app.state.metrics.registry.get_sample_value(name, labels)

    def wait_until(self, condition, seconds=10):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "It has not come to that."
            time.sleep(0.002)


@contextlib.contextmanager
def listening(service):
    """Serve on a free port within the `with` block, and yield the port."""
    from tocom_hf.serving.server import bind, make_server

    listener, started = bind("127.0.0.1", 0), threading.Event()
    server = make_server(service.app, listener, lambda address: started.set())
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert started.wait(30)
        yield listener.getsockname()[1]
    finally:
        service.gate.set()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def predict(port, body, kind="image/png", timeout=30):
    """Status, headers and content of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("POST", "/predict", body, {"Content-Type": kind})
        answer = connection.getresponse()
        return answer.status, answer.headers, json.loads(answer.read())
    finally:
        connection.close()


def head(length, path="/predict"):
    """The head of a request with a body of `length` bytes."""
    return f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Length: {length}\r\n\r\n".encode()


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def read_all(connection):
    """What comes until the other side closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def read_answer(connection):
    """One answer on a connection that stays open."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    answer.read()
    return answer.status
