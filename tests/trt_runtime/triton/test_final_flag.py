"""Why closing.py is there: what the server does with a final flag, shown by a model of a few lines.

A client cancels, or dies, while a response is being written to it. If that response brought the
final flag, Triton 2.51 never lets go of the model. When a later server passes the first case, the
flag may go with the last response again.
"""

from __future__ import annotations

import os
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
from tests.trt_runtime.triton.processes import stubs
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
        if not ends:  # it would wait for its --exit-timeout-secs
            os.killpg(server.pid, signal.SIGKILL)


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
