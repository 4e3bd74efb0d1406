"""Requests that Triton 2.51 never lets go of, by a model of a few lines, and ours, which goes.

A stream that is cancelled, or whose client dies, while the response that brought the final flag is
being written to it: closing.py sends the flag alone, later. A stream whose request the server
itself refused, before any model saw it: clients should not cancel those. A single answer that is
cancelled as it is written: no model can prevent that, only bound what it costs. Where a later
server lets go of them, what is done about it here may be taken out.
"""

from __future__ import annotations

import os
import queue
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trt_runtime.triton.micro import PICTURES, STEPS
from tests.trt_runtime.triton.processes import stubs, wait_for
from trt_runtime.triton.client import Client
from trt_runtime.triton.repository import Settings, write_model
from trt_runtime.triton.server import Installation, Server

grpc = pytest.importorskip(
    "tritonclient.grpc", reason="no tritonclient: pip install 'arrowhead[triton]'"
)
TOGETHER = "sender.send(response, flags=1)"
APART = "sender.send(response); threading.Timer(2, sender.send, (None, 1)).start()"
_MODEL = """
import threading
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            numbers = pb_utils.Tensor("NUMBERS", np.zeros(4_000_000, np.int32))
            response = pb_utils.InferenceResponse([numbers])
            {send}
"""
_SINGLE = """
import time
import numpy as np
import triton_python_backend_utils as pb_utils
from trt_runtime.triton.orphan import leave_with_server

class TritonPythonModel:
    def initialize(self, args):
        self.watch = leave_with_server()

    def execute(self, requests):
        time.sleep(0.0003)
        numbers = pb_utils.Tensor("NUMBERS", np.zeros(1, np.int32))
        return [pb_utils.InferenceResponse([numbers]) for _ in requests]
"""
_CONFIG = """
backend: "python"
input [{ name: "SEED" data_type: TYPE_INT64 dims: [1] }]
output [{ name: "NUMBERS" data_type: TYPE_INT32 dims: [-1] }]
model_transaction_policy { decoupled: true }
"""


class Enough(Exception):
    """What a client raises to hang up on its stream."""


def tensor(name: str, array: Any, kind: str) -> Any:
    made = grpc.InferInput(name, list(array.shape), kind)
    made.set_data_from_numpy(array)
    return made


def goes(server: Server, model: str, seconds: float) -> bool:
    """Unload a model; say whether its process ends in time."""
    control = grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}")
    control.unload_model(model)
    control.close()
    deadline = time.monotonic() + seconds
    while stubs(server) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not stubs(server)


def comes_back(client: Any, server: Server, model: str) -> bool:
    """Unload a model and load it again; no if its process stays or the server is gone meanwhile."""
    try:
        if not goes(server, model, 3):
            return False
        client.load_model(model)
    except grpc.InferenceServerException:
        return False
    return True


def kill(server: Server) -> None:
    """What an orchestrator does at its deadline: the server would wait for --exit-timeout-secs."""
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    wait_for("the end of its processes", lambda: not stubs(server))


@pytest.mark.parametrize(("send", "ends"), [(TOGETHER, False), (APART, True)])
def test_a_flag_on_a_response_that_is_cancelled_keeps_the_model(
    send: str, ends: bool, installation: Installation, tmp_path: Path
) -> None:
    (tmp_path / "numbers" / "1").mkdir(parents=True)
    (tmp_path / "numbers" / "config.pbtxt").write_text(_CONFIG)
    (tmp_path / "numbers" / "1" / "model.py").write_text(_MODEL.format(send=send))
    seed = tensor("SEED", np.zeros(1, np.int64), "INT64")
    chance = random.Random(0)
    with Server(tmp_path, installation, explicit=True, load=["numbers"]) as server:
        for _ in range(40):  # with the flag, about ten of them are kept
            client = grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}")
            client.start_stream(lambda result, error: None)
            client.async_stream_infer("numbers", [seed])
            time.sleep(chance.uniform(0, 0.05))
            client.stop_stream(cancel_requests=True)
            client.close()
        assert goes(server, "numbers", 8) == ends
        if not ends:
            kill(server)


@pytest.mark.parametrize("cancel", [True, False])
def test_a_refused_request_that_is_cancelled_keeps_the_model(
    cancel: bool, installation: Installation, tmp_path: Path
) -> None:
    (tmp_path / "numbers" / "1").mkdir(parents=True)
    (tmp_path / "numbers" / "config.pbtxt").write_text(_CONFIG)
    (tmp_path / "numbers" / "1" / "model.py").write_text(_MODEL.format(send=APART))
    refused: queue.Queue[Any] = queue.Queue()
    with Server(tmp_path, installation, explicit=True, load=["numbers"]) as server:
        client = grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}")
        for _ in range(40):  # with a cancellation, some of them are kept
            client.start_stream(lambda result, error: refused.put(error))
            client.async_stream_infer("numbers", [tensor("SEED", np.zeros(2, np.int64), "INT64")])
            assert "unexpected shape" in str(refused.get(timeout=10))
            client.stop_stream(cancel_requests=cancel)
            with suppress(queue.Empty):  # the word that it is cancelled
                refused.get_nowait()
        client.close()
        assert goes(server, "numbers", 8) == (not cancel)
        if cancel:
            kill(server)
    assert not server.shared_memory()


@pytest.mark.slow
def test_cancelling_single_answers_as_they_come_costs_the_stop_and_no_more(
    installation: Installation, tmp_path: Path
) -> None:
    """Two races in Triton's unary gRPC handler; 25.04 has the fixes (server #7840, #8078).

    Two threads take its events, and one notes a cancellation before it has the request's lock. If
    the answer is written by then, nobody frees the request: the model is kept, and the server ends
    at its --exit-timeout-secs, with status 1. If it is just about to be, the request is freed
    twice: the server crashes. About one in some thousand cancellations here; of pictures, where
    answers are seconds apart, far fewer. A final flag that comes apart changes nothing: Triton
    writes a single answer only when it has the flag, and frees twice if it is cancelled before.
    """
    (tmp_path / "numbers" / "1").mkdir(parents=True)
    single = _CONFIG.replace("decoupled: true", "decoupled: false").replace("[-1]", "[1]")
    (tmp_path / "numbers" / "config.pbtxt").write_text(single)
    (tmp_path / "numbers" / "1" / "model.py").write_text(_SINGLE)
    chance = random.Random(0)
    seed = tensor("SEED", np.zeros(1, np.int64), "INT64")
    deadline = ["--exit-timeout-secs=3"]
    broken = False
    with Server(
        tmp_path, installation, explicit=True, load=["numbers"], arguments=deadline
    ) as server:
        client = grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}")
        for _ in range(30):
            for _ in range(300):
                # Answers some 0.5 ms apart, so that one of them is always about to be written.
                calls = [client.async_infer("numbers", [seed], _ignore) for _ in range(8)]
                time.sleep(chance.uniform(0, 0.006))
                for call in calls:
                    call.cancel()
                time.sleep(0.003)
            broken = not comes_back(client, server, "numbers")
            if broken:
                break
        client.close()
    assert broken and server.exit_status in (1, -signal.SIGSEGV)
    assert not server.killed and not server.left


def _ignore(result: Any, error: Any) -> None:
    """Do nothing with an answer."""


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_a_served_stream_goes_when_clients_leave_as_the_picture_comes(
    kind: str, installation: Installation, micro_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    write_model(micro_bundle(kind), tmp_path, kind="stream", settings=Settings(threads=1))
    chance = random.Random(0)

    def leave(done: int, _: list[bytes]) -> None:
        if done == STEPS - 1:
            time.sleep(chance.uniform(0, 0.01))
            raise Enough

    with Server(tmp_path, installation, explicit=True, load=["arrowhead"]) as server:
        with Client(f"127.0.0.1:{server.grpc}") as client:
            for seed in range(60):
                with suppress(Enough):  # some have their picture before they leave
                    client.stream(["a star"] * PICTURES[kind], seed=seed, on_progress=leave)
        assert goes(server, "arrowhead", 20)
    assert server.clean_stop and not server.left
