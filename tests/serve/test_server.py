"""hf_cifar.serve: the server as its clients see it, in a process of its own."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from pictures import encode
from PIL import Image
from safetensors.torch import load_file, save_file
from serving import COMMAND, forms, serving
from test_preprocessor import files
from tiny import tiny_run

from benchmarks.load import closed_loop, post, run
from hf_cifar import PredictConfig, predict_files
from hf_cifar.cli import main
from hf_cifar.serve.worker import gif_frames

KEY = "0123456789abcdef0123"


@pytest.fixture(scope="module")
def server(tmp_path_factory, finished_vit):
    with serving(tmp_path_factory.mktemp("server"), finished_vit, "--max_images", "8") as running:
        yield running


@pytest.fixture(scope="module")
def pictures(stripes):
    return sorted((stripes / "test").rglob("*.png"))[:6]


def test_answers_are_those_of_predict(server, finished_vit, pictures):
    expected = list(
        predict_files(PredictConfig(str(finished_vit), use_cpu=True), map(str, pictures))
    )
    status, headers, body = server.call(
        "/predict", *forms(*(path.read_bytes() for path in pictures))
    )
    answer = json.loads(body)
    assert status == 200
    assert answer["model"] == headers["x-model"] == server.get("/model")["model"]
    assert answer["version"].startswith("run, 20")
    for result, record in zip(answer["results"], expected, strict=True):
        assert result["label"] == record["label"]
        assert result["score"] == pytest.approx(record["score"], abs=1e-5)
        assert [each["label"] for each in result["top_k"]] == [
            each["label"] for each in record["top_k"]
        ]


def test_every_kind_of_image_is_answered_as_by_predict(server, finished_vit, tmp_path):
    kinds = files()
    for number, content in enumerate(kinds.values()):
        (tmp_path / f"{number:02}").write_bytes(content)
    paths = sorted(map(str, tmp_path.iterdir()))
    expected = predict_files(PredictConfig(str(finished_vit), use_cpu=True), paths)
    for kind, content, record in zip(kinds, kinds.values(), expected, strict=True):
        (result,) = json.loads(server.call("/predict", content)[2])["results"]
        assert result["label"] == record["label"], kind
        assert result["score"] == pytest.approx(record["score"], abs=1e-5), kind


def test_unreadable_image_of_several_has_an_error_in_its_place(server, pictures):
    image = pictures[0].read_bytes()
    status, _, body = server.call("/predict", *forms(image, b"text", image))
    first, broken, last = json.loads(body)["results"]
    assert status == 200
    assert first == last
    assert broken == {"error": "cannot read image: not a known image format"}


def test_unreadable_image_alone_is_an_error(server):
    assert server.call("/predict", b"text")[::2] == (
        422, b'{"error": "cannot read image: not a known image format"}',
    )  # fmt: skip


def test_the_name_of_a_file_is_not_looked_at(server, pictures):
    image = pictures[0].read_bytes()
    body, content_type = forms(image)
    named = body.replace(b'filename="image.jpg"', b'filename="../../etc/passwd"')
    assert b"passwd" in named
    assert server.call("/predict", named, content_type)[0] == 200


BOUNDARY = "multipart/form-data; boundary=b"


@pytest.mark.parametrize(
    ("body", "content_type", "status", "words"),
    [
        (b"", "application/octet-stream", 400, "no image"),
        (b"x=1", "application/x-www-form-urlencoded", 415, "x-www-form-urlencoded"),
        (b"x", "", 415, "missing"),
        (b"x", "multipart/form-data", 400, "no boundary"),
        (b"x", BOUNDARY, 400, "damaged"),
        (b"--b--\r\n", BOUNDARY, 400, "no image"),
        (b'--b\r\ncontent-disposition: form-data; name="file"\r\n\r\nx', BOUNDARY, 400, "its end"),
        (b'--b\r\ncontent-disposition: form-data; name="f"\r\n\r\nx\r\n--b--', BOUNDARY, 400, "'file'"),
        (b'--b\r\ncontent-disposition: form-data; name="file"\r\n\r\n\r\n--b--', BOUNDARY, 400, "no image"),
    ],
)  # fmt: skip
def test_damaged_request_is_a_line_of_json(server, body, content_type, status, words):
    found, headers, answer = server.call("/predict", body, content_type)
    assert (found, headers["content-type"]) == (status, "application/json")
    assert words in json.loads(answer)["error"]


def test_too_many_images_are_refused(server, pictures):
    status, _, body = server.call("/predict", *forms(*[pictures[0].read_bytes()] * 9))
    assert (status, json.loads(body)) == (
        413, {"error": "the request has more than 8 images, the limit of this server"},
    )  # fmt: skip


def test_unknown_path_and_method(server):
    assert server.call("/nothing")[0] == 404
    assert server.call("/predict")[0] == 405
    assert server.call("/livez")[0] == server.call("/readyz")[0] == 200


def test_probes_may_use_head_and_the_url_has_no_parameters(server, pictures):
    for path in ("/livez", "/readyz", "/"):
        url = f"http://127.0.0.1:{server.port}{path}"
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD")) as answer:
            assert (answer.status, answer.read()) == (200, b"")
    status, _, body = server.call("/predict?top_k=2", pictures[0].read_bytes())
    assert status == 400 and "the URL has the parameter 'top_k'" in json.loads(body)["error"]


def test_model_page_describes_model_and_limits(server, finished_vit):
    about = server.get("/model")
    metrics = json.loads((finished_vit / "metrics.json").read_text())
    assert about["labels"] == ["across", "down"]
    assert about["metrics"]["validation"]["accuracy"] == metrics["validation"]["accuracy"]
    assert about["preprocessing"]["preprocessing"]["resize"] == [16, 16]
    assert about["limits"]["max_images"] == 8
    assert f"in batches of up to {about['batch_size']} images" in server.log.read_text()
    assert str(finished_vit) not in json.dumps(about)


def test_prometheus_accepts_the_metrics_and_they_count(server, pictures):
    name = 'hf_cifar_images_total{outcome="predicted"}'
    before = server.metric(name)
    server.call("/predict", *forms(*(path.read_bytes() for path in pictures)))
    assert server.metric(name) == before + len(pictures)
    assert server.metric("hf_cifar_workers") == 1
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool; it is in Debian's package prometheus")
    text = server.call("/metrics")[2]
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def test_request_id_is_logged_and_contents_are_not(server, pictures):
    image = pictures[0].read_bytes()
    _, headers, _ = server.call("/predict", image, X_Request_Id="mine-1")
    assert headers["x-request-id"] == "mine-1"
    _, headers, _ = server.call("/predict", image, X_Request_Id='"bad id"')
    assert re.fullmatch("[0-9a-f]{32}", headers["x-request-id"])
    line = next(each for each in server.logged() if each["id"] == "mine-1")
    assert (line["path"], line["status"], line["images"]) == ("/predict", 200, 1)
    assert line["model"] == server.get("/model")["model"]


def test_openapi_names_every_route(server):
    schema = server.get("/openapi.json")
    assert {"/predict", "/explain", "/model", "/metrics", "/livez", "/readyz"} <= set(
        schema["paths"]
    )
    page = server.call("/docs")[2].decode()
    assert all(path in page for path in schema["paths"])
    assert f"curl -F file=@cat.jpg http://127.0.0.1:{server.port}/predict" in page


def test_python_in_the_docs_works(server, pictures, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    shutil.copy(pictures[0], "cat.jpg")
    exec(code.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}"))
    assert capsys.readouterr().out.split()[0] in ("across", "down")


def test_heat_map_is_a_picture(server, pictures):
    status, headers, body = server.call("/explain", pictures[0].read_bytes())
    assert (status, headers["content-type"]) == (200, "image/png")
    assert Image.open(io.BytesIO(body)).size[0] >= 16
    assert server.call("/explain", b"text")[0] == 422


def test_reloading_by_http_needs_a_key(server):
    assert server.call("/admin/reload", b"")[0] == 403


def test_key_is_required_and_never_logged(tmp_path, finished_vit, pictures):
    image = pictures[0].read_bytes()
    with serving(tmp_path, finished_vit, env={"HF_CIFAR_API_KEY": KEY}) as server:
        for path in ("/livez", "/readyz", "/docs", "/openapi.json", "/"):
            assert server.call(path)[0] == 200
        for path in ("/metrics", "/model"):
            assert server.call(path)[0] == 401
        wrong = server.call("/predict", image, Authorization="Bearer " + "x" * 20)
        assert wrong[0] == 401 and "Bearer KEY" in json.loads(wrong[2])["error"]
        assert server.call("/predict", image, Authorization=f"Bearer {KEY}")[0] == 200
        assert server.call("/admin/reload", b"", Authorization="Bearer x")[0] == 401
    assert KEY not in server.log.read_text() + server.requests.read_text()


def test_model_is_replaced_without_losing_a_request(tmp_path, finished_vit, pictures):
    copy = tmp_path / "run"
    shutil.copytree(finished_vit, copy)
    image, headers = pictures[0].read_bytes(), {"Authorization": f"Bearer {KEY}"}
    with serving(tmp_path, copy, env={"HF_CIFAR_API_KEY": KEY}) as server:
        old = server.get("/model", **headers)["model"]
        weights = load_file(copy / "model.safetensors")
        save_file(
            {k: v * 0.5 for k, v in weights.items()}, copy / "model.safetensors", {"format": "pt"}
        )
        server.process.send_signal(signal.SIGHUP)
        requests = [post(image, more=f"authorization: Bearer {KEY}\r\n")]
        replies = run(lambda: closed_loop(server.port, requests, clients=4, seconds=1))
        while server.get("/model", **headers)["model"] == old:
            replies += run(lambda: closed_loop(server.port, requests, clients=4, seconds=1))
        replies += run(lambda: closed_loop(server.port, requests, clients=4, seconds=1))
        assert {reply.status for reply in replies} == {200}
        assert len({json.loads(reply.body)["model"] for reply in replies}) == 2
        new = server.get("/model", **headers)["model"]

        (copy / "model.safetensors").write_bytes(b"damaged")
        status, _, body = server.call("/admin/reload", b"", **headers)
        assert status == 409 and "the old one stays in use" in json.loads(body)["error"]
        assert server.get("/model", **headers)["model"] == new
        assert server.call("/predict", image, **headers)[0] == 200


def test_images_that_waited_too_long_are_not_computed(tmp_path, finished_vit, pictures):
    with serving(tmp_path, finished_vit, "--timeout", "1") as server:
        (worker,) = server.workers
        worker.suspend()
        requests = [post(pictures[0].read_bytes())] * 3

        def resume():
            time.sleep(2)
            worker.resume()

        threading.Thread(target=resume).start()
        replies = run(lambda: closed_loop(server.port, requests, clients=3))
        assert [reply.status for reply in replies] == [504] * 3
        assert server.metric('hf_cifar_images_total{outcome="predicted"}') == 0
        assert server.call("/predict", pictures[0].read_bytes())[0] == 200


def test_exported_file_of_multiple_labels_is_served(tmp_path, lights, tiny_vit):
    tiny_run(tmp_path / "run", lights, tiny_vit)
    file = tmp_path / "model.onnx"
    assert (
        main(["export", str(tmp_path / "run"), "--output", str(file), "--parity_images", "0"]) == 0
    )
    image = encode(Image.new("RGB", (16, 16), (255, 255, 255)))
    (expected,) = predict_files(PredictConfig(str(file)), [_saved(tmp_path / "image.png", image)])
    with serving(tmp_path, file, "--workers", "2", "--top_k", "2") as server:
        (result,) = json.loads(server.call("/predict", image)[2])["results"]
        assert result == {name: value for name, value in expected.items() if name != "path"} | {
            "top_k": expected["top_k"][:2]
        }
        assert len(server.workers) == 2
        status, _, body = server.call("/explain", image)
        assert status == 422 and "an exported file has none" in json.loads(body)["error"]
        assert not server.get("/model")["heat_map"]


def _saved(path, content):
    path.write_bytes(content)
    return str(path)


def test_a_large_upload_gets_its_refusal(tmp_path, finished_vit):
    """The server closes the connection, but not before the client has read the answer."""
    with serving(tmp_path, finished_vit, env={"HF_CIFAR_API_KEY": KEY}) as server:
        body = b"x" * 5_000_000
        for headers in ({}, {"Connection": "close"}):
            status, found, answer = server.call("/predict", body, **headers)
            assert status == 401 and b"key" in answer
            assert found["connection"] == "close"
        (worker,) = server.workers
        worker.kill()
        while server.call("/readyz")[0] == 200:
            time.sleep(0.001)
        allowed = {"Authorization": f"Bearer {KEY}"}
        status, found, answer = server.call("/predict", body, **allowed)
        assert (status, found["retry-after"]) == (503, "1")
        assert server.call("/")[0] == 200  # with what is known of the model
        assert server.get("/model", **allowed)["labels"] == ["across", "down"]


def test_every_worker_is_replaced(tmp_path, finished_vit, pictures):
    with serving(tmp_path, finished_vit, "--workers", "2") as server:
        before = {worker.pid for worker in server.workers}
        server.workers[0].kill()
        server.process.send_signal(signal.SIGHUP)
        while before & {worker.pid for worker in server.workers} or len(server.workers) != 2:
            assert server.call("/predict", pictures[0].read_bytes())[0] in (200, 503)
            time.sleep(0.1)
        time.sleep(3)
        assert len(server.workers) == 2
        assert server.call("/predict", pictures[0].read_bytes())[0] == 200
        assert server.stop() == 0


@pytest.mark.parametrize("frames", [1, 2, 40])
def test_frames_of_a_gif_are_counted_from_its_blocks(frames):
    colours = [Image.new("RGB", (30, 20), (number * 5, 0, 99)) for number in range(frames)]
    content = encode(colours[0], "GIF", save_all=True, append_images=colours[1:], loop=0)
    assert gif_frames(content, 100) == frames
    assert gif_frames(content, 3) == min(3, frames)
    for end in range(0, len(content), 7):
        assert gif_frames(content[:end], 100) <= frames


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--host", "0.0.0.0"], "--no_auth to serve anyone"),
        (["--host", "0.0.0.0", "--api_key", "short"], "at least 16"),
        (["--no_auth", "true", "--api_key", KEY], "cannot be combined"),
        (["--max_images", "65"], "--max_queue 64"),
        (["--port", "70000"], "0..65535"),
        (["other"], "serve takes one model"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(flags, words, finished_vit, capsys):
    assert main(["serve", str(finished_vit), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_port_in_use_and_missing_model(server, finished_vit, tmp_path, capsys):
    assert main(["serve", str(finished_vit), "--port", str(server.port)]) == 2
    assert f"cannot listen on 127.0.0.1:{server.port}" in capsys.readouterr().err
    assert main(["serve", str(tmp_path / "nothing")]) == 2
    assert main(["serve"]) == 2


def test_the_process_that_answers_http_imports_no_torch(finished_vit):
    code = "import sys, hf_cifar.serve.server; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert COMMAND[-1] == "serve" and Path(finished_vit).is_dir()
