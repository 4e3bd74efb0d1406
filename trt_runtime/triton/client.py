"""A client of the served model, over HTTP, gRPC, or a gRPC stream with progress; also an example.

python -m trt_runtime.triton.client --prompt "a red circle" --output circle.png
python -m trt_runtime.triton.client --stream --previews 2 --prompt "a red circle"
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from plans.errors import ArrowheadError, atomic_write

PROTOCOLS = ("grpc", "http")
ANSWER_SECONDS = 600.0
_INTEGERS = {"SEED": np.int64}
_EVERY_OUTPUT = ("PICTURE", "TIMINGS")
# (steps done, PNG files of the pictures foreseen, or none)
OnProgress = Callable[[int, list[bytes]], None]


@dataclass(frozen=True)
class Answer:
    """What one request got: an entry a picture; pixels [pictures, H, W, 3] if asked for."""

    pictures: list[bytes]
    timings: list[dict[str, Any]]
    pixels: np.ndarray[Any, Any] | None
    seconds: float


class Client:
    """A connection to one model of a Triton server; use one for one thread.

    address: host:port of the protocol. seconds: how long an answer may take, its wait in the queue
    included; a call that takes longer is given up, over gRPC on the server too, and raises
    ArrowheadError. A refused request raises tritonclient's own exception, `refusal`, with the
    server's message.
    """

    def __init__(
        self,
        address: str,
        *,
        model: str = "arrowhead",
        protocol: str = "grpc",
        seconds: float = ANSWER_SECONDS,
    ) -> None:
        self.model = model
        self.protocol = protocol
        self.seconds = seconds
        self._address = address
        self._library = _library(protocol)
        grpc = protocol == "grpc"
        limits = {} if grpc else {"network_timeout": seconds}
        self._limits = {"client_timeout": seconds} if grpc else {}
        self._client = self._library.InferenceServerClient(address, **limits)
        self.refusal: type[Exception] = self._library.InferenceServerException

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; an HTTP connection left open holds up the server's stop."""
        self._client.close()

    def draw(
        self, prompts: Sequence[str] = (), *, outputs: Sequence[str] = _EVERY_OUTPUT, **inputs: Any
    ) -> Answer:
        """Draw one picture a prompt. inputs: others by name, as seed=3 or guidance=4.0.

        A number goes for every picture; a sequence has one each; embeddings are [pictures, ...].
        """
        tensors, wanted = self._tensors(prompts, inputs, outputs)
        started = time.perf_counter()
        try:
            result = self._client.infer(self.model, tensors, outputs=wanted, **self._limits)
        except (self.refusal, TimeoutError) as error:
            if isinstance(error, self.refusal) and "DEADLINE_EXCEEDED" not in str(error):
                raise
            raise self._late() from error
        return _answer(result, time.perf_counter() - started)

    def stream(
        self,
        prompts: Sequence[str] = (),
        *,
        on_progress: OnProgress | None = None,
        outputs: Sequence[str] = (*_EVERY_OUTPUT, "STEP", "PREVIEW"),
        **inputs: Any,
    ) -> Answer:
        """Draw as `draw` does, and hear of each step; whatever on_progress raises cancels it."""
        tensors, wanted = self._tensors(prompts, inputs, outputs)
        arrived: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._client.start_stream(lambda result, error: arrived.put((result, error)))
        started = time.perf_counter()
        refused = False
        try:
            self._client.async_stream_infer(self.model, tensors, outputs=wanted)
            while True:
                left = started + self.seconds - time.perf_counter()
                try:
                    result, error = arrived.get(timeout=max(left, 0))
                except queue.Empty:
                    raise self._late() from None
                if error is not None:
                    refused = True
                    raise error
                if result.as_numpy("TIMINGS") is not None:
                    return _answer(result, time.perf_counter() - started)
                if on_progress is not None:
                    on_progress(int(result.as_numpy("STEP")[0, 0]), _bytes(result, "PREVIEW"))
        finally:
            # Also with the picture in hand: the server then need not wait for it to be read. But
            # Triton 2.51 never lets go of a request that it refused itself if that is cancelled.
            self._client.stop_stream(cancel_requests=not refused)

    def begin(self, prompts: Sequence[str] = (), **inputs: Any) -> Any:
        """Send a request and do not wait for it: what it gives has cancel(); gRPC."""
        tensors, wanted = self._tensors(prompts, inputs, _EVERY_OUTPUT)
        return self._client.async_infer(
            self.model,
            tensors,
            outputs=wanted,
            callback=lambda result, error: None,
            **self._limits,
        )

    def _late(self) -> ArrowheadError:
        return ArrowheadError(
            f"{self.model} on {self._address}",
            got="no answer",
            expected=f"one within {self.seconds:g} s",
            fix="allow more seconds, or look into the server's log and queue",
        )

    def _tensors(
        self, prompts: Sequence[str], inputs: Mapping[str, Any], outputs: Sequence[str]
    ) -> tuple[list[Any], list[Any]]:
        arrays = {"PROMPT": np.array([[p] for p in prompts], dtype=object)} if prompts else {}
        count = len(prompts) or max((np.shape(value) or (1,))[0] for value in inputs.values())
        for name, value in inputs.items():
            arrays[name.upper()] = _array(name.upper(), value, count)
        tensors = []
        for name, array in arrays.items():
            kinds = {"O": "BYTES", "f": "FP32", "i": "INT64" if array.itemsize == 8 else "INT32"}
            tensor = self._library.InferInput(name, list(array.shape), kinds[array.dtype.kind])
            tensor.set_data_from_numpy(array)
            tensors.append(tensor)
        return tensors, [self._library.InferRequestedOutput(name) for name in outputs]


def _array(name: str, value: Any, count: int) -> np.ndarray[Any, Any]:
    """Shape [count, 1], or [count, ...] for embeddings, in the input's type."""
    if name.endswith("_EMBEDS"):
        return np.asarray(value, np.float32)
    values = [value] * count if np.ndim(value) == 0 else list(value)
    if isinstance(values[0], str | bytes):
        return np.array([[each] for each in values], dtype=object)
    dtype = np.float32 if name == "GUIDANCE" else _INTEGERS.get(name, np.int32)
    return np.array([[each] for each in values], dtype=dtype)


def _answer(result: Any, seconds: float) -> Answer:
    timings = [json.loads(each) for each in _bytes(result, "TIMINGS")]
    return Answer(_bytes(result, "PICTURE"), timings, result.as_numpy("PIXELS"), seconds)


def _bytes(result: Any, name: str) -> list[bytes]:
    array = result.as_numpy(name)
    return [] if array is None else list(array.reshape(-1))


def _library(protocol: str) -> Any:
    if protocol not in PROTOCOLS:
        raise ArrowheadError(
            "protocol", got=protocol, expected=f"one of {PROTOCOLS}", fix="pass one of them"
        )
    try:
        if protocol == "grpc":
            import tritonclient.grpc as library
        else:
            import tritonclient.http as library
    except ImportError as error:
        raise ArrowheadError(
            "Triton's client",
            got=f"no module {error.name}",
            expected="tritonclient",
            fix="pip install 'arrowhead[triton]'",
        ) from error
    return library


def main() -> int:
    """Draw pictures on a running server and save them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--address", help="host:port (default 127.0.0.1:8001, HTTP: 8000)")
    parser.add_argument("--model", default="arrowhead")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="grpc")
    parser.add_argument("--stream", action="store_true", help="show steps; needs a stream model")
    parser.add_argument("--previews", type=int, default=0, metavar="N", help="one every N steps")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--seconds", type=float, default=ANSWER_SECONDS, metavar="X", help="give up after"
    )
    parser.add_argument("--output", type=Path, default=Path("picture.png"))
    arguments = parser.parse_args()
    address = arguments.address or f"127.0.0.1:{8001 if arguments.protocol == 'grpc' else 8000}"
    inputs = {} if arguments.seed is None else {"seed": arguments.seed}
    chosen = {"model": arguments.model, "protocol": arguments.protocol}
    with Client(address, seconds=arguments.seconds, **chosen) as client:
        try:
            if arguments.stream:
                answer = _stream_with_bar(client, arguments, inputs)
            else:
                answer = client.draw([arguments.prompt], **inputs)
        except client.refusal as error:
            print(f"refused: {error}", file=sys.stderr)
            return 1
        except ArrowheadError as error:
            print(error, file=sys.stderr)
            return 1
    atomic_write(arguments.output, answer.pictures[0])
    told = answer.timings[0]
    print(
        f"{arguments.output}: {answer.seconds:.3f} s, of them {told['pipeline_seconds']:.3f} in "
        f"the pipeline, seed {told['seed']}"
    )
    return 0


def _stream_with_bar(
    client: Client, arguments: argparse.Namespace, inputs: dict[str, Any]
) -> Answer:
    from rich.progress import Progress

    if arguments.previews:
        inputs = inputs | {"preview_every": arguments.previews}
    with Progress(transient=True) as bar:
        task = bar.add_task("denoising", total=None)

        def show(done: int, previews: list[bytes]) -> None:
            bar.update(task, completed=done, description=f"step {done}")
            if previews:
                path = arguments.output
                atomic_write(path.with_stem(f"{path.stem}-step{done}"), previews[0])

        return client.stream([arguments.prompt], on_progress=show, **inputs)


if __name__ == "__main__":
    sys.exit(main())
