"""Load a served bundle, on the loopback and bounded, and hold it against the runtime in process."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from plans.errors import ArrowheadError
from trt_runtime.doctor import device_name, git_commit, versions
from trt_runtime.parity import Progress
from trt_runtime.pipeline import draw, fill, load_pipeline
from trt_runtime.triton.client import Client
from trt_runtime.triton.repository import Settings, write_model
from trt_runtime.triton.server import Installation, Server
from trt_runtime.triton.service import png

MAX_REQUESTS, MAX_CLIENTS = 100_000, 64  # past these it is a load test of a cluster, not of this
_OPEN_SHARE = 0.7  # of the closed loop's throughput: an open loop beyond it only grows a queue


@dataclass(frozen=True)
class Sample:
    """One request as its client saw it; the server's seconds are those TIMINGS tells."""

    seconds: float
    pipeline_seconds: float
    png_seconds: float
    error: str = ""


Send = Callable[[int], Sample]


def closed_loop(send: Send, requests: int, concurrency: int) -> tuple[list[Sample], float]:
    """Let `concurrency` clients send one request after the other; samples and seconds in all."""
    started = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        samples = list(pool.map(send, range(requests)))
    return samples, time.perf_counter() - started


def open_loop(send: Send, requests: int, rate: float, limit: int) -> tuple[list[Sample], float]:
    """Send `rate` requests a second, evenly, whether or not earlier ones are answered.

    A request's seconds count from when it was due, so a client that falls behind shows. limit:
    requests in flight at most; past it the loop waits, and the wait counts too.
    """
    started = time.perf_counter()

    def at(index: int) -> Sample:
        due = started + index / rate
        time.sleep(max(0.0, due - time.perf_counter()))
        behind = time.perf_counter() - due
        sample = send(index)
        return Sample(sample.seconds + behind, sample.pipeline_seconds, sample.png_seconds,
                      sample.error)  # fmt: skip

    with ThreadPoolExecutor(limit) as pool:
        samples = list(pool.map(at, range(requests)))
    return samples, time.perf_counter() - started


def summary(samples: Sequence[Sample], seconds: float) -> dict[str, Any]:
    """Percentiles of latency, throughput, and what serving added to each picture."""
    good = [sample for sample in samples if not sample.error]
    report: dict[str, Any] = {
        "requests": len(samples),
        "errors": len(samples) - len(good),
        "first_error": next((sample.error for sample in samples if sample.error), None),
        "pictures_per_second": len(good) / seconds,
    }
    if good:
        latencies = [sample.seconds for sample in good]
        report |= {f"p{q}_seconds": float(np.percentile(latencies, q)) for q in (50, 90, 99)}
        report["pipeline_seconds"] = median(sample.pipeline_seconds for sample in good)
        report["png_seconds"] = median(sample.png_seconds for sample in good)
        # Beside other requests a latency holds their time too; alone it is all the server's.
        added = [s.seconds - s.pipeline_seconds - s.png_seconds for s in good]
        report |= {f"overhead_p{q}_ms": 1e3 * float(np.percentile(added, q)) for q in (50, 99)}
    return report


def bench_serve(
    bundle: Path | str,
    installation: Installation,
    prompts: Sequence[str],
    *,
    requests: int = 20,
    concurrency: int = 4,
    rate: float | None = None,
    protocol: str = "grpc",
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time one picture a request: in process, one client, several in a closed loop, an open loop.

    The overhead is what one client's request takes beyond the pipeline call and the encoding of
    the picture, both timed in the server. rate: requests a second of the open loop; None takes 70 %
    of what the closed loop reached.
    """
    settings = settings or Settings()
    if not (1 <= requests <= MAX_REQUESTS and 1 <= concurrency <= MAX_CLIENTS and (rate or 1) > 0):
        raise ArrowheadError(
            "bench serve",
            got=f"{requests} requests, {concurrency} clients, rate {rate}",
            expected=f"1 to {MAX_REQUESTS} requests, 1 to {MAX_CLIENTS} clients, a rate above 0",
            fix="change --requests, --concurrency or --rate",
        )
    report: dict[str, Any] = {"protocol": protocol, "concurrency": concurrency}

    def tell(what: str, done: int) -> None:
        if progress is not None:
            progress(what, done, 4)

    tell("in process", 0)
    report["in_process"] = in_process(bundle, prompts, requests, settings)
    with tempfile.TemporaryDirectory() as repository:
        tell("starting the server", 1)
        write_model(bundle, repository, settings=settings)
        with Server(repository, installation) as server:
            address = f"127.0.0.1:{server.grpc if protocol == 'grpc' else server.http}"
            with _Senders(address, protocol, prompts) as send:
                tell("one client", 1)
                report["one_client"] = summary(*closed_loop(send, requests, 1))
                tell(f"{concurrency} clients", 2)
                report["closed_loop"] = summary(*closed_loop(send, requests, concurrency))
                tell("open loop", 3)
                reached = report["closed_loop"]["pictures_per_second"]
                report["rate"] = rate or _OPEN_SHARE * reached
                report["open_loop"] = summary(
                    *open_loop(send, requests, report["rate"], limit=4 * concurrency)
                )
    tell("done", 4)
    return report | {
        "device": device_name(settings.device),
        "versions": versions(),
        "git_commit": git_commit(),
    }


def in_process(
    bundle: Path | str, prompts: Sequence[str], requests: int, settings: Settings
) -> dict[str, Any]:
    """Time the runtime alone on the same requests, one picture a call as one client asks for."""
    options: dict[str, Any] = {"backend": settings.backend, "device": settings.device}
    if settings.backend == "onnxruntime":
        options |= {"threads": settings.threads, "weights": settings.weights}
    pipe = load_pipeline(bundle, **options)
    pipe.set_progress_bar_config(disable=True)
    samples = []
    try:
        for index in range(-1, requests):  # the first warms up
            started = time.perf_counter()
            prompt = prompts[index % len(prompts)]
            prompts_of_call, seeds = (fill(pipe.transformer, [x]) for x in (prompt, abs(index)))
            picture = draw(pipe, prompts_of_call, seeds)[0]
            encoding = time.perf_counter()
            png(picture.image)
            now = time.perf_counter()
            if index >= 0:
                samples.append(Sample(now - started, picture.seconds, now - encoding))
    finally:
        pipe.transformer.close()
    return summary(samples, sum(sample.seconds for sample in samples))


class _Senders:
    """Requests over one connection a thread, all closed at the end."""

    def __init__(self, address: str, protocol: str, prompts: Sequence[str]) -> None:
        self._address, self._protocol, self._prompts = address, protocol, prompts
        self._own = threading.local()
        self._clients: list[Client] = []

    def __enter__(self) -> Send:
        return self._send

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            client.close()

    def _send(self, index: int) -> Sample:
        client = getattr(self._own, "client", None)
        if client is None:
            client = self._own.client = Client(self._address, protocol=self._protocol)
            self._clients.append(client)
        started = time.perf_counter()
        try:
            answer = client.draw([self._prompts[index % len(self._prompts)]], seed=index)
        except client.refusal as error:
            return Sample(time.perf_counter() - started, 0.0, 0.0, str(error))
        told = answer.timings[0]
        return Sample(answer.seconds, told["pipeline_seconds"], told["png_seconds"])
