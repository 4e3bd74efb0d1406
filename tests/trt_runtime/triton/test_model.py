"""Triton's hooks with a stand-in for its Python backend: who gets which answer, step by step."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.trt_runtime.triton.conftest import Twin, decode
from tests.trt_runtime.triton.micro import STEPS
from trt_runtime.bundles import open_bundle
from trt_runtime.triton.interface import inputs, outputs

FINAL = 1


class Tensor:
    def __init__(self, name: str, array: Any) -> None:
        self._name, self._array = name, array

    @staticmethod
    def from_dlpack(name: str, array: Any) -> Tensor:
        return Tensor(name, array)

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._array

    to_dlpack = as_numpy


class Request:
    """A request and, in the place of its client, what it was sent."""

    def __init__(self, *, cancel_at: int | None = None, **arrays: Any) -> None:
        self.arrays = arrays
        self.cancel_at = cancel_at  # the how-manieth look finds it cancelled
        self.sent: list[tuple[Any, int]] = []

    def get_response_sender(self) -> Any:
        return self

    def requested_output_names(self) -> list[str]:
        return ["PICTURE", "TIMINGS", "STEP"]

    def is_cancelled(self) -> bool:
        if self.cancel_at is None:
            return False
        self.cancel_at -= 1
        return self.cancel_at < 0

    def send(self, response: Any = None, flags: int = 0) -> None:
        self.sent.append((response, flags))

    @property
    def responses(self) -> list[Any]:
        return [response for response, _ in self.sent if response is not None]

    @property
    def picture(self) -> Any:
        (tensor,) = (t for t in self.responses[-1].output_tensors if t.name() == "PICTURE")
        return decode(tensor.as_numpy()[0, 0])

    @property
    def error(self) -> Any:
        return self.responses[-1].error


class Family:
    COUNTER, GAUGE = "counter", "gauge"
    values: dict[Any, float] = {}

    def __init__(self, name: str, description: str, kind: str) -> None:
        self.name = name

    def Metric(self, labels: dict[str, str]) -> Any:  # noqa: N802 (Triton's name)
        key = (self.name, *labels.values())

        def increment(by: float) -> None:
            self.values[key] = self.values.get(key, 0) + by

        return SimpleNamespace(increment=increment, set=lambda value: None)


@pytest.fixture
def model(
    monkeypatch: pytest.MonkeyPatch, micro_bundle: Callable[..., Path]
) -> Iterator[Callable[[bool], Any]]:
    backend = ModuleType("triton_python_backend_utils")
    given: dict[str, Any] = {
        "Tensor": Tensor,
        "MetricFamily": Family,
        "TRITONSERVER_RESPONSE_COMPLETE_FINAL": FINAL,
        "InferenceResponse": lambda output_tensors=(), error=None: SimpleNamespace(
            output_tensors=output_tensors, error=error
        ),
        "TritonError": type("TritonError", (), {
            "INTERNAL": "internal", "INVALID_ARG": "invalid", "CANCELLED": "cancelled",
            "__init__": lambda self, message, code: self.__dict__.update(
                message=message, code=code),
        }),
        "get_input_tensor_by_name": lambda request, name: (
            Tensor(name, request.arrays[name]) if name in request.arrays else None
        ),
    }  # fmt: skip
    for name, value in given.items():
        setattr(backend, name, value)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    monkeypatch.delitem(sys.modules, "trt_runtime.triton.model", raising=False)
    module = importlib.import_module("trt_runtime.triton.model")
    Family.values = {}
    bundle = micro_bundle("sd3")
    made = []

    def load(streams: bool) -> Any:
        kind = "stream" if streams else "picture"
        opened, plan = open_bundle(bundle)
        tensors = {"input": inputs(opened, plan, kind), "output": outputs(plan, kind)}
        config: dict[str, Any] = {
            what: [{"name": f.name, "data_type": f"TYPE_{f.datatype}", "dims": list(f.dims)}
                   for f in fields]
            for what, fields in tensors.items()
        }  # fmt: skip
        config |= {"max_batch_size": 2, "model_transaction_policy": {"decoupled": streams}}
        values = {"bundle": str(bundle), "threads": "1", "poison": "true"}
        config["parameters"] = {k: {"string_value": v} for k, v in values.items()}
        hooks = module.TritonPythonModel()
        hooks.initialize({
            "model_config": json.dumps(config), "model_repository": "/", "model_version": "1",
            "model_instance_kind": "CPU", "model_instance_device_id": "0", "model_name": "m",
            "model_instance_name": "m_0",
        })  # fmt: skip
        made.append(hooks)
        return hooks

    yield load
    for hooks in made:
        hooks.finalize()
    # Imported around a stand-in: nobody else may find it.
    sys.modules.pop("trt_runtime.triton.model", None)


def request(prompt: str, seed: int, **more: Any) -> Request:
    arrays = {"PROMPT": np.array([[prompt.encode()]], object), "SEED": np.array([[seed]])}
    return Request(**(arrays | more))


def answer(hooks: Any, *requests: Request) -> None:
    """Execute, and wait for the last answers."""
    hooks.execute(list(requests))
    hooks.answers.submit(lambda: None).result()
    if hooks.closing is not None:
        for each in requests:  # a stream's final flag comes alone, and later
            assert each.responses and all(flags != FINAL for _, flags in each.sent)
        hooks.closing.close()
    for each in requests:
        assert [flags for _, flags in each.sent].count(FINAL) == 1
        assert each.sent[-1][1] == FINAL


def results(name: str) -> dict[str, float]:
    return {key[-1]: value for key, value in Family.values.items() if key[0] == name}


def test_one_cancels_and_its_neighbour_gets_its_picture(
    model: Callable[[bool], Any], twin: Callable[..., Twin]
) -> None:
    hooks = model(True)
    leaves, stays = request("a star", 1, cancel_at=4), request("a red circle", 2)
    answer(hooks, leaves, stays)
    assert leaves.error.code == "cancelled"
    # It is asked before the first step, then after each: the fourth look after that finds it gone.
    assert len(leaves.responses) == 4 and len(stays.responses) == STEPS + 1
    together = twin("sd3")(["a star", "a red circle"], [1, 2])
    assert np.array_equal(stays.picture, together[1])
    assert results("arrowhead_requests_total") == {"cancelled": 1, "finished": 1}


def test_a_call_nobody_waits_for_stops_at_once(model: Callable[[bool], Any]) -> None:
    hooks = model(False)
    answer(hooks, request("a star", 1, cancel_at=3), request("a star", 2, cancel_at=2))
    assert sum(results("arrowhead_steps_total").values()) == 3
    answer(hooks, request("a star", 1, cancel_at=0))
    assert sum(results("arrowhead_steps_total").values()) == 3
    assert results("arrowhead_requests_total") == {"cancelled": 3}


def test_a_fault_while_drawing_reaches_every_client_and_is_over(
    model: Callable[[bool], Any], twin: Callable[..., Twin], monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = model(False)
    vae = hooks.service.pipe.vae
    with monkeypatch.context() as broken:
        broken.setattr(vae, "decode", lambda *_, **__: 1 / 0)
        failed = [request("a star", 1), request("a star", 2)]
        answer(hooks, *failed)
    for each in failed:
        assert each.error.code == "internal"
        assert each.error.message == "ZeroDivisionError: division by zero"
    works = request("a red circle", 3)
    answer(hooks, works)
    assert np.array_equal(works.picture, twin("sd3")(["a red circle"], [3])[0])
    assert results("arrowhead_requests_total") == {"failed": 2, "finished": 1}


def test_a_fault_while_encoding_reaches_the_client(
    model: Callable[[bool], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = model(False)
    monkeypatch.setitem(hooks._outputs.__globals__, "png", lambda image: 1 / 0)
    failed = request("a star", 1)
    answer(hooks, failed)
    assert failed.error.message == "ZeroDivisionError: division by zero"


def test_other_guidance_is_another_call(
    model: Callable[[bool], Any], twin: Callable[..., Twin]
) -> None:
    hooks = model(False)
    first = request("a star", 1)
    second = request("a star", 1, GUIDANCE=np.array([[7.0]], np.float32))
    answer(hooks, first, second)
    assert np.array_equal(first.picture, twin("sd3")(["a star"], [1])[0])
    assert np.array_equal(second.picture, twin("sd3")(["a star"], [1], guidance_scale=7.0)[0])
    assert sum(results("arrowhead_steps_total").values()) == 2 * STEPS
