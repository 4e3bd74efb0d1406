"""How long each step of a run took, without waiting for a device within the run."""

from __future__ import annotations

import time
from typing import Any

import torch


class StepClock:
    """Seconds of each step, on the host's clock or on a GPU's.

    A GPU's steps are queued: events mark their ends on the stream, made once and used by every run,
    and are read where the seconds are asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._buckets: list[int] = []
        self._host: list[float] = []
        self._events: list[tuple[Any, Any]] = []
        self._started = 0.0

    def clear(self) -> None:
        """Forget all steps."""
        self._buckets, self._host = [], []

    def start(self) -> None:
        if not self._on_gpu:
            self._started = time.perf_counter()
            return
        if len(self._events) == len(self._buckets):
            self._events.append(
                (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            )
        self._events[len(self._buckets)][0].record(torch.cuda.current_stream(self._device))

    def stop(self, bucket: int) -> None:
        """Note that the step that was started ran this bucket."""
        if self._on_gpu:
            self._events[len(self._buckets)][1].record(torch.cuda.current_stream(self._device))
        else:
            self._host.append(time.perf_counter() - self._started)
        self._buckets.append(bucket)

    @property
    def buckets(self) -> list[int]:
        """The bucket of each step."""
        return list(self._buckets)

    @property
    def seconds(self) -> list[tuple[int, float]]:
        """(bucket, seconds) of each step; waits until the last one is done."""
        if not self._on_gpu:
            return list(zip(self._buckets, self._host, strict=True))
        if self._buckets:
            self._events[len(self._buckets) - 1][1].synchronize()
        return [
            (bucket, begin.elapsed_time(end) / 1000)
            for bucket, (begin, end) in zip(self._buckets, self._events, strict=False)
        ]
