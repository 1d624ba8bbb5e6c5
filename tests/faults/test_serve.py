"""The server under damaged, hostile and too many requests, and when its processes die."""

import contextlib
import itertools
import json
import random
import re
import signal
import socket
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from pictures import encode
from PIL import Image
from serving import Server, forms, serving
from tiny import tiny_run

from benchmarks.load import LOST, closed_loop, open_loop, post, quantile, run
from hf_cifar import PredictConfig
from hf_cifar.predict import Predictor

SIDE = 16
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def finished(tmp_path_factory, stripes, tiny_vit):
    folder = tmp_path_factory.mktemp("served") / "run"
    tiny_run(folder, stripes, tiny_vit)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory, finished):
    flags = ("--max_bytes", str(MEGABYTE), "--timeout", "5", "--max_queue", "256")
    with serving(tmp_path_factory.mktemp("server"), finished, *flags) as running:
        yield running


@pytest.fixture(scope="module")
def images():
    """Encoded images of noise, whose answers differ."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (100, SIDE, SIDE, 3)).astype(np.uint8)
    return [encode(Image.fromarray(each)) for each in pixels]


@pytest.fixture(scope="module")
def expected(finished, images):
    """The scores of each image alone, by label."""
    predictor = Predictor(PredictConfig(str(finished), use_cpu=True))
    found = []
    for image in images:
        record = predictor.record(predictor.scores([predictor.preprocessor.decode(image)])[0])
        found.append({each["label"]: each["score"] for each in record["top_k"]})
    return found


def is_answer(result, scores):
    """Return True if a result has these scores."""
    top_k = result.get("top_k", ())
    return {each["label"] for each in top_k} == set(scores) and all(
        abs(each["score"] - scores[each["label"]]) <= 1e-5 for each in top_k
    )


def malformed():
    """Yield body and content type of 200 requests that are no image."""
    generator = random.Random(0)
    picture = Image.fromarray(
        np.random.default_rng(1).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    )
    raw = "application/octet-stream"
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"):
        whole = encode(picture, kind)
        for _ in range(12):
            yield whole[: generator.randrange(1, len(whole) * 3 // 4)], raw
    for text in (
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        b"<html><script>alert(1)</script></html>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run",
        b"%PDF-1.4", b"PK\x03\x04", b"\x7fELF", b"GIF89a<script>alert(1)</script>",
        b"\xff\xd8\xff\xe0<?php system($_GET[0]); ?>", b"\x80\x04\x95cposix\nsystem\n", b"\0" * 4096,
    ):  # fmt: skip
        yield text, raw
        yield forms(text)
    image = encode(picture)
    body, content_type = forms(image)
    for name in ("../../etc/passwd", "/etc/passwd", "C:\\x", "\\\\host\\x", "a\0b", "." * 300):
        yield body[:300].replace(b"image.jpg", name.encode()), content_type
        yield forms(b"no image")[0].replace(b"image.jpg", name.encode()), content_type
    for number in range(20):
        yield body[: 10 + number * 7], content_type
    for change in (b"form-data", b"name=", b'"file"', b"\r\n\r\n", b"content-disposition"):
        yield body.replace(change, b"x", 1), content_type
    for kind in (
        "multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=other",
        "text/html", "application/json", "image/../../x\t", "multipart/form-data; boundary=" + "b" * 300,
    ):  # fmt: skip
        yield b'{"url": "file:///etc/passwd"}', kind
    while True:
        yield generator.randbytes(generator.randrange(1, 2000)), raw


def test_malformed_uploads(server, images, record_result):
    (worker,) = server.workers
    passed = 0
    for body, content_type in itertools.islice(malformed(), 200):
        status, headers, answer = server.call("/predict", body, content_type)
        assert headers["content-type"] == "application/json", answer
        assert "error" in json.loads(answer), (body, content_type)
        passed += 400 <= status < 500
    assert [each.pid for each in server.workers] == [worker.pid]
    assert server.call("/predict", images[0])[0] == 200
    record_result(
        23, "malformed uploads", "status 4xx with one line of JSON; no process dies", passed, 200
    )


def png_chunk(kind, content):
    checked = kind + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))


def bombs():
    """Yield small files that are large once decoded: 8 PNG, 6 GIF and 6 WebP files."""
    for side in (9_000, 12_000, 20_000, 30_000):
        rows = zlib.compress(b"\0" * 2_000_000, 9)
        head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        png = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", rows)
        yield png
    for side in (9_000, 10_000, 20_000, 30_000):
        pixel_rows = zlib.compress(b"\0" * (side // 8 + 1) * 2_000, 9)
        head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
        yield (b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", pixel_rows))
    frames = [Image.new("P", (8, 8), number % 2) for number in range(300)]
    for count in (257, 280, 300):
        yield encode(frames[0], "GIF", save_all=True, append_images=frames[1:count], optimize=False)
    yield large_gif()
    canvas = encode(Image.new("P", (8, 8)), "GIF")
    for side in (9_000, 65_535):
        yield canvas[:6] + struct.pack("<HH", side, side) + canvas[10:]
    colours = [
        Image.new("RGB", (16, 16), (number % 256, 0, number // 256)) for number in range(300)
    ]
    for count in (260, 300):
        yield encode(
            colours[0], "WEBP", save_all=True, append_images=colours[1:count], lossless=True
        )
    animated = encode(colours[0], "WEBP", save_all=True, append_images=colours[1:3], lossless=True)
    at = animated.index(b"VP8X") + 12
    for side in (9_000, 12_000, 16_383, 16_000):
        size = struct.pack("<I", side - 1)[:3]
        yield animated[:at] + size + size + animated[at + 6 :]


def peak_memory(process):
    """Return the most memory that a process has had, in bytes."""
    text = Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", text)[1])


def large_gif():
    """Return a GIF of few bytes: 300 small frames on a large canvas, which a decoder fills for each."""
    small = encode(Image.new("P", (8, 8)), "GIF")
    at = 13 + 3 * 2 ** ((small[10] & 7) + 1)
    return small[:6] + struct.pack("<HH", 8_000, 8_000) + small[10:at] + small[at:-1] * 300 + b";"


def test_bombs(server, record_result):
    (worker,) = server.workers
    before, times, passed = peak_memory(worker), [], 0
    for bomb in bombs():
        assert len(bomb) < MEGABYTE
        start = time.perf_counter()
        status, _, body = server.call("/predict", bomb)
        times.append(time.perf_counter() - start)
        passed += status == 422 and "error" in json.loads(body)
    assert peak_memory(worker) - before < 50e6
    record_result(
        24, "decompression bombs: PNG, GIF, WebP; pixels and frames",
        f"refused before decoding (slowest: {1000 * max(times):.0f} ms); no 50 MB more memory", passed, 20,
    )  # fmt: skip


def received(connection):
    """Return all that a server sends until it closes the connection."""
    connection.settimeout(30)
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(65536):
            found += chunk
    return found


def send_until_refused(connection, chunk, most):
    """Send chunks until the server answers or closes the connection; return the number of bytes."""
    connection.setblocking(False)
    sent, rest = 0, b""
    while sent < most:
        with contextlib.suppress(BlockingIOError):
            if connection.recv(1, socket.MSG_PEEK):
                break
        rest = rest or chunk
        try:
            count = connection.send(rest)
        except BlockingIOError:
            time.sleep(0.001)
            continue
        except OSError:
            break
        sent, rest = sent + count, rest[count:]
    return sent


def test_oversize_and_slow_clients(server, images, record_result):
    def connect():
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        return connection

    before, passed = server.front.memory_info().rss, 0
    head = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/octet-stream\r\n"
    with connect() as declared:
        declared.sendall(head + b"content-length: 1048577\r\n\r\n")
        passed += received(declared).startswith(b"HTTP/1.1 413")
    with connect() as chunked:
        chunked.sendall(head + b"transfer-encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        sent = send_until_refused(chunked, chunk, 64 * MEGABYTE)
        passed += received(chunked).startswith(b"HTTP/1.1 413") and sent < 8 * MEGABYTE
    with connect() as lying:  # more follows than was declared: the rest is not a request
        lying.sendall(head + b"content-length: 10\r\n\r\n" + b"x" * 10_000)
        passed += received(lying).startswith(b"HTTP/1.1 4")
    with connect() as short:
        short.sendall(head + b"content-length: 100\r\n\r\n" + b"x" * 10)
        short.shutdown(socket.SHUT_WR)
        passed += b"HTTP/1.1 200" not in received(short)
    with connect() as headers:
        headers.sendall(head + b"x-more: " + b"x" * 30_000 + b"\r\n\r\n")
        passed += received(headers).startswith(b"HTTP/1.1 431")
    assert server.front.memory_info().rss - before < 20e6
    record_result(25, "requests that are too large, or lie about it", "413, 431 or 4xx", passed, 5)

    requests = [post(image) for image in images]
    alone = run(lambda: closed_loop(server.port, requests, 4, seconds=3))
    slow = [connect() for _ in range(200)]
    for number, connection in enumerate(
        slow
    ):  # half of them within the headers, half within the body
        connection.sendall(head[:40] if number % 2 else head + b"content-length: 1000\r\n\r\nx")
    beside = run(lambda: closed_loop(server.port, requests, 4, seconds=3))
    assert {reply.status for reply in [*alone, *beside]} == {200}
    refused = sum(received(connection).startswith(b"HTTP/1.1 408") for connection in slow)
    for connection in slow:
        connection.close()
    ratio = quantile([r.seconds for r in beside], 0.99) / quantile([r.seconds for r in alone], 0.99)
    record_result(
        25, "200 clients that stop sending",
        f"status 408 after --timeout; all others are answered (p99 times {ratio:.1f})", refused, 200,
    )  # fmt: skip


def test_poisoned_images_of_a_batch(server, images, expected, record_result):
    generator, requests, chosen = random.Random(0), [], []
    for _ in range(500):
        rows = [generator.randrange(100) for _ in range(8)]
        poisoned = generator.randrange(8)
        body, content_type = forms(
            *(
                images[row][:60] if place == poisoned else images[row]
                for place, row in enumerate(rows)
            )
        )
        requests.append(post(body, content_type=content_type))
        chosen.append((rows, poisoned))
    replies = run(lambda: closed_loop(server.port, requests, 8))
    passed = 0
    for reply, (rows, poisoned) in zip(replies, chosen, strict=True):
        assert "error" in reply.results[poisoned]
        passed += sum(
            is_answer(result, expected[row])
            for place, (row, result) in enumerate(zip(rows, reply.results, strict=True))
            if place != poisoned
        )
    record_result(
        28, "500 requests of 8 images, one of them broken", "the others are right", passed, 3500
    )


def test_no_answer_is_swapped(server, images, expected, record_result):
    rows = [random.Random(0).randrange(100) for _ in range(10_000)]
    replies = run(lambda: closed_loop(server.port, [post(images[row]) for row in rows], 64))
    passed = sum(
        reply.status == 200 and is_answer(reply.results[0], expected[row])
        for reply, row in zip(replies, rows, strict=True)
    )
    record_result(
        29, "10,000 requests of 64 clients", "each gets the scores of its own image alone, to 1e-5",
        passed, 10_000,
    )  # fmt: skip


def test_soak(server, images, record_result):
    requests = [post(images[number % 100]) for number in range(20_000)]
    counter = 'hf_cifar_images_total{outcome="predicted"}'
    run(lambda: closed_loop(server.port, requests[:2000], 16))
    processes = [server.front, *server.workers]
    before, counted = [each.memory_info().rss for each in processes], server.metric(counter)
    replies = run(lambda: closed_loop(server.port, requests, 16))
    growth = [each.memory_info().rss - old for each, old in zip(processes, before, strict=True)]
    assert max(growth) < 20e6, growth
    assert server.metric(counter) - counted == len(replies)
    record_result(
        31, "20,000 requests", f"less than 20 MB more memory ({max(growth) / 1e6:.0f}), exact counters",
        sum(reply.status == 200 for reply in replies), 20_000,
    )  # fmt: skip


def test_drain(tmp_path, finished, images, record_result):
    lost = answered = 0
    statuses = set()
    for number in range(5):
        folder = tmp_path / str(number)
        folder.mkdir()
        server = Server(folder, finished, "--drain_seconds", "1").wait()
        requests = [
            post(images[row % 100], more=f"x-request-id: {number}-{row}\r\n") for row in range(2000)
        ]

        def end(server=server):
            time.sleep(1)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            statuses.add(server.call("/readyz")[0])

        ending = threading.Thread(target=end)
        ending.start()
        replies = run(lambda port=server.port, sent=requests: closed_loop(port, sent, 32))
        ending.join()
        assert server.process.wait(60) == 0
        accepted = {line["id"] for line in server.logged()}
        for row, reply in enumerate(replies):
            answered += reply.status == 200
            lost += reply.status == LOST and f"{number}-{row}" in accepted
            assert reply.status in (200, LOST, 503)
    assert statuses == {503}
    record_result(
        26, "5 times SIGTERM under load of 32 clients",
        f"every accepted request is answered ({answered:,}); /readyz says 503 meanwhile; exit status 0",
        answered, answered + lost,
    )  # fmt: skip


def test_three_times_the_capacity(tmp_path, stripes, save_vit, record_result):
    model = save_vit(64, patch_size=8, hidden_size=192, num_hidden_layers=6, intermediate_size=768)
    tiny_run(tmp_path / "run", stripes, model, "--max_steps", "1")
    generator = np.random.default_rng(0)
    image = encode(
        Image.fromarray(generator.integers(0, 256, (64, 64, 3)).astype(np.uint8)), "JPEG"
    )
    with serving(tmp_path, tmp_path / "run") as server:
        closed = run(lambda: closed_loop(server.port, [post(image)], 16, seconds=5))
        capacity = len(closed) / 5
        alive, stop = [], threading.Event()

        def watch():
            while not stop.wait(0.2):
                alive.append(server.call("/livez")[0])

        watching = threading.Thread(target=watch)
        watching.start()
        replies = run(lambda: open_loop(server.port, [post(image)], 3 * capacity, 20))
        stop.set()
        watching.join()
        goodput = sum(reply.status == 200 for reply in replies) / 20
        refused = [reply for reply in replies if reply.status != 200]
        passed = sum(r.status == 503 and b"retry-after: 1" in r.headers.lower() for r in refused)
        assert set(alive) == {200}
        assert goodput > capacity / 2
        assert len(refused) > len(replies) / 3
        assert server.call("/predict", image)[0] == 200
        late = 1000 * quantile([reply.seconds for reply in refused], 0.99)
        record_result(
            27, f"3 times the capacity of {capacity:.0f} requests/s for 20 s",
            f"503 with Retry-After above capacity (p99 {late:.0f} ms); "
            f"{goodput / capacity:.0%} of the capacity goes on; /livez always answers",
            passed, len(refused),
        )  # fmt: skip


def test_killed_worker(tmp_path, finished, images, record_result):
    requests = [post(images[number % 100]) for number in range(100)]
    passed, seconds = 0, []
    with serving(tmp_path, finished) as server:
        for _ in range(5):
            (worker,) = server.workers
            times = {}

            def kill(worker=worker, times=times):
                time.sleep(0.5)
                worker.kill()
                times["killed"] = time.monotonic()
                while server.call("/readyz")[0] == 200:
                    time.sleep(0.001)
                while server.call("/readyz")[0] != 200:
                    time.sleep(0.01)
                times["ready"] = time.monotonic()

            killing = threading.Thread(target=kill)
            killing.start()
            replies = run(lambda: closed_loop(server.port, requests, 8, seconds=2))
            killing.join()
            seconds.append(times["ready"] - times["killed"])
            statuses = {reply.status for reply in replies}
            passed += statuses == {200, 503} and server.call("/predict", images[0])[0] == 200
        assert server.metric("hf_cifar_worker_restarts") == 5
    record_result(
        30, "kill -9 of the process that runs the model, under load",
        f"its requests get 503, and another starts by itself (after {quantile(seconds, 0.5):.1f} s)",
        passed, 5,
    )  # fmt: skip
