"""The model as Triton's Python backend loads it; each version's model.py imports it from here.

It owns pipeline, engines, loop and caches. Requests that came together and agree on what a call
shares are drawn by one call; each has its answer as soon as it is finished, refused or cancelled.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils  # there is one only inside a server

from plans.errors import ArrowheadError
from trt_runtime.pipeline import Picture
from trt_runtime.triton.closing import ERROR_LINGER_SECONDS, LINGER_SECONDS, Closing
from trt_runtime.triton.interface import inputs, outputs
from trt_runtime.triton.metrics import Metrics
from trt_runtime.triton.orphan import leave_with_server, stop
from trt_runtime.triton.request import Asked, parse
from trt_runtime.triton.service import PictureService, Preview, png

# Parameters of config.pbtxt, as the repository writer sets them.
PARAMETERS = {
    "bundle": "bundle",
    "backend": "onnxruntime",
    "threads": "0",
    "weights": "shared",
    "poison": "false",
}


class _NobodyWaits(Exception):
    """All requests of a call are closed before it is over."""


class _Ticket:
    """One request until its last response is on its way."""

    def __init__(self, request: Any, closing: Closing | None) -> None:
        self.open = True
        self.wanted = frozenset(request.requested_output_names())
        self._sender = request.get_response_sender()
        self._closing = closing

    def cancelled(self) -> bool:
        return bool(self._sender.is_cancelled())

    def send(self, values: Mapping[str, Any], *, last: bool) -> None:
        """Send the outputs the client asked for."""
        tensors = [pb_utils.Tensor(name, values[name]) for name in values if name in self.wanted]
        self._send(pb_utils.InferenceResponse(tensors), last, LINGER_SECONDS)

    def fail(self, message: str, code: int) -> None:
        error = pb_utils.TritonError(message, code)
        self._send(pb_utils.InferenceResponse(error=error), True, ERROR_LINGER_SECONDS)

    def _send(self, response: Any, last: bool, linger: float) -> None:
        if self._closing is None:
            flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0
            self._sender.send(response, flags=flags)
            return
        try:
            self._sender.send(response)
        finally:
            if last:
                self._closing.add(self._sender, linger)


class TritonPythonModel:
    """Triton's hooks: load, serve, unload."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle of this version; an ArrowheadError here is what the load reports."""
        check_numpy()
        self.watch = leave_with_server()
        config = json.loads(args["model_config"])
        given = {k: v["string_value"] for k, v in config.get("parameters", {}).items()}
        parameters = PARAMETERS | given
        folder = Path(args["model_repository"]) / args["model_version"] / parameters["bundle"]
        gpu = args["model_instance_kind"] == "GPU"
        options: dict[str, Any] = {"poison": parameters["poison"] == "true"}
        threads = int(parameters["threads"])
        if threads and not gpu:  # text encoders and VAE are PyTorch's
            torch.set_num_threads(threads)
        if parameters["backend"] == "onnxruntime":
            options |= {"threads": threads, "weights": parameters["weights"]}
        self.service = PictureService(
            folder,
            backend=parameters["backend"],
            device=f"cuda:{args['model_instance_device_id']}" if gpu else "cpu",
            **options,
        )
        self.streams = bool(config.get("model_transaction_policy", {}).get("decoupled"))
        self.plan = self.service.transformer.plan
        check_config(config, self.service, "stream" if self.streams else "picture")
        self.names = [field["name"] for field in config["input"]]
        self.metrics = Metrics(pb_utils, args)
        # Last responses leave from here, while the next call already denoises. They must not leave
        # from `execute`: a client's next request would come before Triton has this instance back,
        # and its batcher may then sleep half a second over it (measured: one in ten).
        self.answers = ThreadPoolExecutor(1)
        final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        self.closing = Closing(final) if self.streams else None

    def execute(self, requests: list[Any]) -> None:
        """Answer every request through its sender; no exception leaves this."""
        calls: dict[Any, list[tuple[_Ticket, Asked]]] = {}
        for request in requests:
            ticket = _Ticket(request, self.closing)
            try:
                asked = parse(self.plan, self.names, self._arrays(request))
            except ArrowheadError as error:
                self._fail(ticket, "refused", str(error), pb_utils.TritonError.INVALID_ARG)
            except Exception as error:
                self._fail(ticket, "failed", _internal(error), pb_utils.TritonError.INTERNAL)
            else:
                calls.setdefault(asked.call, []).append((ticket, asked))
        for call in calls.values():
            self._draw(call)

    def finalize(self) -> None:
        """Release engines, weights and caches."""
        self.answers.shutdown()
        if self.closing is not None:
            self.closing.close()
        # A metric tells the server when it goes, and crashes the process if that is after this.
        del self.metrics
        self.service.close()
        stop(self.watch)

    def _arrays(self, request: Any) -> dict[str, Any]:
        tensors = [pb_utils.get_input_tensor_by_name(request, name) for name in self.names]
        return {tensor.name(): tensor.as_numpy() for tensor in tensors if tensor is not None}

    def _draw(self, call: list[tuple[_Ticket, Asked]]) -> None:
        """Draw one call's requests and answer each, however it ends."""

        def on_step(done: int, preview: Preview | None) -> None:
            self._drop_cancelled(call)
            if not any(ticket.open for ticket, _ in call):
                raise _NobodyWaits
            if self.streams:
                self._tell_progress(call, done, preview)

        failed = ""
        drawn: list[list[Picture]] = []
        self._drop_cancelled(call)
        call = [(ticket, asked) for ticket, asked in call if ticket.open]
        if not call:
            return
        try:
            drawn = self.service.draw([asked for _, asked in call], on_step)
        except _NobodyWaits:
            pass
        except Exception as error:  # the clients must hear of it, whatever it is
            failed = _internal(error)
        # Counted before the answers go out: who has an answer finds it on the metrics page.
        self.metrics.ran(self.service.buckets_run(), self.service.transformer.state.cache_bytes())
        for (ticket, _), pictures in zip(call, drawn, strict=False):
            if ticket.open:
                self._finish(ticket, pictures)
        for ticket, _ in call:
            if ticket.open:
                self._fail(ticket, "failed", failed, pb_utils.TritonError.INTERNAL)

    def _drop_cancelled(self, call: list[tuple[_Ticket, Asked]]) -> None:
        """Close requests whose client has cancelled them or gone."""
        for ticket, _ in call:
            if ticket.open and ticket.cancelled():
                self._fail(ticket, "cancelled", "cancelled", pb_utils.TritonError.CANCELLED)

    def _tell_progress(
        self, call: list[tuple[_Ticket, Asked]], done: int, preview: Preview | None
    ) -> None:
        images: list[Any] = []
        row = 0
        for ticket, asked in call:
            count = len(asked.seeds)
            if ticket.open:
                values = {"STEP": np.full((count, 1), done, np.int32)}
                due = asked.preview_every and done % asked.preview_every == 0
                if due and preview is not None and done < self.plan.steps:
                    images = images or preview()
                    values["PREVIEW"] = _column(png(image) for image in images[row : row + count])
                ticket.send(values, last=False)
            row += count

    def _finish(self, ticket: _Ticket, pictures: list[Picture]) -> None:
        ticket.open = False
        self.metrics.finished(len(pictures))
        self.answers.submit(self._answer, ticket, pictures)

    def _answer(self, ticket: _Ticket, pictures: list[Picture]) -> None:
        """Encode the pictures and send them; on the answers' own thread."""
        try:
            ticket.send(self._outputs(ticket.wanted, pictures), last=True)
        except Exception as error:
            ticket.fail(_internal(error), pb_utils.TritonError.INTERNAL)

    def _outputs(self, wanted: Collection[str], pictures: list[Picture]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        started = time.perf_counter()
        if "PICTURE" in wanted:
            values["PICTURE"] = _column(png(picture.image) for picture in pictures)
        png_seconds = time.perf_counter() - started
        if "PIXELS" in wanted:
            values["PIXELS"] = np.stack([np.asarray(picture.image) for picture in pictures])
        timings = {"png_seconds": png_seconds, "pictures_per_call": self.service.pictures_per_call}
        values["TIMINGS"] = _column(_timings(picture, timings) for picture in pictures)
        if self.streams:
            values["STEP"] = np.full((len(pictures), 1), self.plan.steps, np.int32)
        return values

    def _fail(self, ticket: _Ticket, result: str, message: str, code: int) -> None:
        ticket.open = False
        self.metrics.ended(result)
        self.answers.submit(ticket.fail, message, code)


def check_numpy() -> None:
    """Refuse a NumPy whose arrays this server misreads; Triton 24.10 with NumPy 2 is one such."""
    sent = np.arange(1, 4, dtype=np.int32)
    # Made by way of DLPack, the tensor has to make its own array, as it does of a request's bytes.
    tensor = pb_utils.Tensor.from_dlpack("probe", pb_utils.Tensor("probe", sent).to_dlpack())
    got = tensor.as_numpy()
    if not np.array_equal(got, sent):
        raise ArrowheadError(
            f"NumPy {np.__version__} in Triton's Python backend",
            got=f"{got.tolist()} read back",
            expected=f"{sent.tolist()}, as sent",
            fix="pip install 'numpy<2' in the Python environment of the server",
        )


def check_config(config: dict[str, Any], service: PictureService, kind: str) -> None:
    """Hold config.pbtxt, which the versions of a model share, against this version's bundle."""
    again = "write the model again with `arrowhead triton`; another picture size needs a --name"
    bundle, plan = service.transformer.bundle, service.transformer.plan
    for what, fields in (("input", inputs(bundle, plan, kind)), ("output", outputs(plan, kind))):
        expected = {f.name: (f"TYPE_{f.datatype}", list(f.dims)) for f in fields}
        got = {f["name"]: (f["data_type"], [int(dim) for dim in f["dims"]]) for f in config[what]}
        for name in sorted({*expected, *got}):
            if expected.get(name) != got.get(name):
                raise ArrowheadError(
                    f"{what} {name} in config.pbtxt",
                    got=got.get(name),
                    expected=f"{expected.get(name)}, as the bundle",
                    fix=again,
                )
    if config["max_batch_size"] != service.pictures_per_call:
        raise ArrowheadError(
            "max_batch_size in config.pbtxt",
            got=config["max_batch_size"],
            expected=f"{service.pictures_per_call}, the pictures of one call of the bundle",
            fix=again,
        )


def _internal(error: Exception) -> str:
    """Log a fault that is none of the client's, and name it."""
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


def _column(values: Any) -> Any:
    """Make BYTES of shape [pictures, 1]."""
    return np.array([[value] for value in values], dtype=object)


def _timings(picture: Picture, more: dict[str, Any]) -> bytes:
    told = {
        "seed": picture.seed,
        "pipeline_seconds": picture.seconds,
        "transformer_seconds": sum(spent for _, spent in picture.step_seconds),
        "steps": picture.step_seconds,
    }
    return json.dumps(told | more).encode()
