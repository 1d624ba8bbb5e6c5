"""Training under torchrun: two nodes on loopback, of which one loses its worker, or is gone for good."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from faults.rig import digest

ROOT = Path(__file__).parents[2]
SECONDS = 240  # for two starts of torch on a busy machine


@pytest.fixture(scope="module")
def dropout_vit(save_vit):
    return save_vit(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)


class Nodes:
    """Two torchrun agents that train together in a folder. The first one hosts their rendezvous."""

    def __init__(self, folder, data, model, *flags):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.folder, self.log = folder, folder.with_suffix(".log")
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1",
            "--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}",
            "--local-addr", "127.0.0.1", "--rdzv-conf",
        ]  # fmt: skip
        training = [
            str(ROOT / "scripts/finetune.py"), "--dataset_name", str(data),
            "--model_name_or_path", str(model),
            "--output_dir", str(folder), "--per_device_train_batch_size", "4", "--learning_rate", "1e-3",
            "--precision", "fp32", "--max_steps", "300", "--eval_strategy", "no", "--save_strategy", "steps",
            "--save_steps", "10", "--logging_steps", "1", "--crop_scale", "0.6", "--mixup_alpha", "0.4",
            *flags,
        ]  # fmt: skip
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }  # fmt: skip
        with self.log.open("w") as log:
            # Otherwise both would try to host, because both are on the machine of the endpoint.
            self.agents = [
                subprocess.Popen(
                    [*command, f"last_call_timeout=5,is_host={is_host}", *training],
                    stdout=log, stderr=log, env=environment,
                )
                for is_host in (True, False)
            ]  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for agent in self.agents:
            self.kill(agent)

    def kill(self, agent):
        """Kill an agent and its worker at once, like a machine that loses its power."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(agent.pid)
            for each in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.send_signal(signal.SIGKILL)
        agent.wait()

    def kill_worker(self, agent):
        (worker,) = psutil.Process(agent.pid).children()
        worker.send_signal(signal.SIGKILL)

    def wait_for_step(self, step):
        """Wait until the folder has a checkpoint of this step or a later one."""
        deadline = time.monotonic() + SECONDS
        while not any(saved >= step for saved in self.saved_steps()):
            assert time.monotonic() < deadline, self.log.read_text()
            assert any(agent.poll() is None for agent in self.agents), self.log.read_text()
            time.sleep(0.02)

    def saved_steps(self):
        return [int(path.name.split("-")[1]) for path in self.folder.glob("checkpoint-*")]

    def finished(self):
        """Wait for all agents; return their exit statuses."""
        return [agent.wait(timeout=SECONDS) for agent in self.agents]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, stripes, dropout_vit):
    folder = tmp_path_factory.mktemp("elastic") / "undisturbed"
    with Nodes(folder, stripes, dropout_vit) as nodes:
        assert nodes.finished() == [0, 0], nodes.log.read_text()
    assert json.loads((folder / "run.json").read_text())["processes"] == 2
    return digest(folder / "model.safetensors")


def test_a_killed_worker_is_replaced_and_the_bits_are_the_same(
    tmp_path, stripes, dropout_vit, undisturbed, record_result
):
    good = 0
    for number, victim in enumerate((0, 1)):
        with Nodes(tmp_path / f"{number}", stripes, dropout_vit) as nodes:
            nodes.wait_for_step(20 + 30 * number)
            nodes.kill_worker(nodes.agents[victim])
            ends = nodes.finished()
            text = nodes.log.read_text()
        same = digest(nodes.folder / "model.safetensors") == undisturbed
        resumed = f"resuming from {nodes.folder}/checkpoint-" in text
        good += (ends, same, resumed) == ([0, 0], True, True)
        if not (same and resumed):
            print(ends, same, resumed, text[-5000:])
    record_result(
        "-",
        "kill -9 of a worker of torchrun, two nodes over gloo",
        "torchrun restarts both; the run resumes unaided and ends bit-identical",
        good,
        2,
    )


def test_a_node_that_is_gone_leaves_the_run_to_the_other_one(
    tmp_path, stripes, dropout_vit, record_result
):
    with Nodes(tmp_path / "run", stripes, dropout_vit) as nodes:
        nodes.wait_for_step(20)
        nodes.kill(nodes.agents[1])
        status = nodes.agents[0].wait(timeout=SECONDS)
        text = nodes.log.read_text()
    line = (
        "resuming with 1 process instead of 2: --gradient_accumulation_steps 2 instead of 1, so that a step "
        "still has 8 images"
    )
    assert status == 0, text
    assert line in text, text
    facts = json.loads((nodes.folder / "run.json").read_text())
    options = (nodes.folder / "config.yaml").read_text()
    good = facts["processes"] == 1 and facts["steps"] == 300
    good = good and "gradient_accumulation_steps: 1\n" in options
    record_result(
        "-",
        "one of two torchrun nodes killed for good",
        "the other one continues alone, with the same global batch, and says so",
        int(good),
        1,
    )
