# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The service behind a real port: clients that are slow, silent, gone or too many, and the end of the service."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.serving import Service, connect, head, listening, picture, predict, read_all, read_answer

from tocom_hf import ArgumentError


pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("uvicorn")


def limits(**arguments):
    from tocom_hf.serving.limits import Limits

    return Limits(**arguments)


def test_a_body_that_comes_byte_by_byte_is_a_408_and_costs_nobody_else():
    service, body = Service(limits(receive_seconds=0.4)), picture()
    with listening(service) as port, connect(port) as slow:
        slow.sendall(head(len(body)))
        start, others = time.monotonic(), 0
        slow.settimeout(0.02)
        answer = b""
        for byte in body:
            slow.sendall(bytes([byte]))
            assert predict(port, body)[0] == 200
            others += 1
            try:
                answer = slow.recv(65536)
                answer += read_all(slow)
                break
            except TimeoutError:
                continue
        assert time.monotonic() - start > 0.3
        assert b" 408 " in answer
        assert b"The body has not arrived within 0.4 s." in answer
        assert service.metric("tocom_requests_total", status="408") == 1
        assert service.metric("tocom_requests_total", status="200") == others


@pytest.mark.parametrize("sent", [b"", b"POST /predict HT", b"POST /predict HTTP/1.1\r\nHost: te"])
def test_a_head_that_does_not_come_is_a_408(sent):
    service = Service(limits(receive_seconds=0.2))
    with listening(service) as port, connect(port) as slow:
        slow.sendall(sent)
        answer = read_all(slow)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert answer.endswith(b'{"error": "No request has arrived within 0.2 s."}')


def test_a_second_head_that_stops_on_the_way_is_a_408():
    service, body = Service(limits(receive_seconds=0.2)), picture()
    with listening(service) as port, connect(port) as slow:
        slow.sendall(head(len(body)) + body)
        assert read_answer(slow) == 200
        slow.sendall(b"POST /pre")
        assert b"HTTP/1.1 408 " in read_all(slow)


def test_connections_live_on_between_requests():
    service, body = Service(limits(receive_seconds=0.2)), picture()
    with listening(service) as port, connect(port) as client:
        for _ in range(3):
            client.sendall(head(len(body)) + body)
            assert read_answer(client) == 200
            time.sleep(0.3)


def test_a_body_that_goes_on_after_its_refusal_is_not_read_for_ever():
    service = Service(limits(receive_seconds=0.3, max_bytes=1000))
    with listening(service) as port, connect(port) as client:
        client.sendall(head(10**9))
        assert read_answer(client) == 413
        start = time.monotonic()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            while time.monotonic() < start + 5:
                client.sendall(bytes(100))
                time.sleep(0.02)


def test_more_connections_than_the_limit_are_a_503_until_one_is_closed():
    service, body = Service(limits(max_connections=2)), picture()
    with listening(service) as port:
        first, second = connect(port), connect(port)
        for connection in (first, second):
            connection.sendall(head(len(body)) + body)
            assert read_answer(connection) == 200
        status, headers, content = predict(port, body)
        assert (status, headers["Retry-After"]) == (503, "1")
        assert content["error"] == "2 connections are open already, which is the limit. Try again later."
        first.sendall(head(len(body)) + body)
        assert read_answer(first) == 200
        first.close()
        service.wait_until(lambda: predict(port, body)[0] == 200)
        second.close()
        assert service.metric("tocom_requests_total", status="503") >= 1


def test_who_goes_away_while_waiting_is_dropped_before_the_batch():
    service, body = Service(), picture()
    with listening(service) as port, ThreadPoolExecutor(2) as pool:
        service.gate.clear()
        running = pool.submit(predict, port, body)
        assert service.entered.acquire(timeout=30)
        gone = connect(port)
        gone.sendall(head(len(body)) + body)
        service.wait_until(lambda: service.batcher.queued == 1)
        staying = pool.submit(predict, port, body)
        service.wait_until(lambda: service.batcher.queued == 2)
        gone.close()
        service.wait_until(lambda: service.batcher.queued == 1)
        service.gate.set()
        assert [running.result()[0], staying.result()[0]] == [200, 200]
        assert service.metric("tocom_images_total", target_r="0") == 2
        service.wait_until(lambda: service.metric("tocom_requests_total", status="499") == 1)


def test_who_goes_away_before_the_body_is_there_leaves_no_traceback(caplog):
    service, body = Service(), picture()
    with listening(service) as port:
        gone = connect(port)
        gone.sendall(head(len(body)) + body[:10])
        time.sleep(0.1)
        gone.close()
        service.wait_until(lambda: service.metric("tocom_requests_total", status="499") == 1)
        assert predict(port, body)[0] == 200
    assert not caplog.records


def test_sigterm_answers_what_waits_and_refuses_the_rest():
    from tocom_hf.serving.server import bind, serve_until_stopped

    service, body, found = Service(limits(answer_seconds=20)), picture(), {}
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    started = threading.Event()

    def clients():
        assert started.wait(30)
        with ThreadPoolExecutor(4) as pool, connect(port) as unfinished:
            service.gate.clear()
            waiting = [pool.submit(predict, port, body)]
            assert service.entered.acquire(timeout=30)
            waiting += [pool.submit(predict, port, body) for _ in range(3)]
            service.wait_until(lambda: service.batcher.queued == 3)
            unfinished.sendall(head(len(body)) + body[:10])
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)
            found["unfinished"] = read_all(unfinished)
            with pytest.raises(ConnectionRefusedError):
                connect(port)
            service.gate.set()
            found["waiting"] = [answer.result()[0] for answer in waiting]

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=clients)
    thread.start()
    serve_until_stopped(service.app, listener, lambda address: started.set())  # returns: the process would end with 0
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert found["waiting"] == [200] * 4
    assert b" 503 " in found["unfinished"]
    assert b"retry-after: 1" in found["unfinished"].lower()


def test_a_model_that_does_not_come_back_does_not_keep_the_process(monkeypatch, capsys):
    from tocom_hf.serving import server as module

    monkeypatch.setattr(module.os, "_exit", lambda code: ended.append(code))
    service, ended, statuses = Service(limits(answer_seconds=0.3)), [], []
    listener = module.bind("127.0.0.1", 0)
    started = threading.Event()

    def client():
        assert started.wait(30)
        service.gate.clear()
        statuses.append(predict(listener.getsockname()[1], picture())[0])

    def stop():
        assert service.entered.acquire(timeout=30)
        os.kill(os.getpid(), signal.SIGTERM)

    threads = [threading.Thread(target=client), threading.Thread(target=stop)]
    for thread in threads:
        thread.start()
    module.serve_until_stopped(service.app, listener, lambda address: started.set())
    service.gate.set()
    for thread in threads:
        thread.join()
    assert (statuses, ended) == ([503], [1])
    assert "The model is still busy" in capsys.readouterr().err


def test_a_port_is_served_by_two_only_if_both_ask_for_it():
    from tocom_hf.serving.server import bind

    with bind("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        for reuse in (False, True):
            with pytest.raises(ArgumentError, match=rf"cannot listen on 127\.0\.0\.1, port {port}: "):
                bind("127.0.0.1", port, reuse)
    with bind("127.0.0.1", 0, reuse_port=True) as first:
        first.listen()
        with bind("127.0.0.1", first.getsockname()[1], reuse_port=True) as second:
            second.listen()


def test_an_address_that_is_none_is_refused():
    from tocom_hf.serving.server import bind

    with pytest.raises(ArgumentError, match="cannot listen on no such host"):
        bind("no such host", 0)


def test_there_are_no_more_connections_than_open_files(monkeypatch):
    from tocom_hf.serving.server import find_max_connections

    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda number: (256, 4096))
    assert [find_max_connections(wanted) for wanted in (None, 5, 192)] == [192, 5, 192]
    with pytest.raises(ArgumentError, match=r"193 connections .* may have 192 of them.*\(ulimit -n\)"):
        find_max_connections(193)
    monkeypatch.setattr(resource, "getrlimit", lambda number: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert [find_max_connections(wanted) for wanted in (None, 10**6)] == [512, 10**6]
