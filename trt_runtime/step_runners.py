"""Ways to run a transformer step, and how they are timed against each other."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trt_runtime.picture_parts import Parts

EAGER = "eager"
BASELINES = (EAGER, "torch.compile", "torch.compile-blocks", "torch.compile-max-autotune")
BACKENDS: dict[str, dict[str, Any]] = {
    "torch": {"compile": "none", "cuda_graph": False},
    "torch-compile": {"compile": "blocks"},
    "torch-compile-no-graph": {"compile": "blocks", "cuda_graph": False},
    "torch-compile-whole": {"compile": "model"},
    "torch-compile-unpruned": {"compile": "blocks", "prune": False},  # modes are an input
    "torch-compile-copies": {"compile": "blocks", "move_heads": False},  # of weights, by bucket
    "torch-compile-plain-gelu": {"compile": "blocks", "fuse_gelu": False},
}
ONNXRUNTIME = "onnxruntime"
VARIANTS = (*BACKENDS, ONNXRUNTIME)
PICTURE_STEPS = (28, 50)


@dataclass(frozen=True)
class Settings:
    """What is measured, and how long."""

    height: int
    width: int
    baselines: Sequence[str] = ("eager", "torch.compile")
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    block: int = 128
    rounds: int = 3
    repeats: int = 3
    full_step: bool = True
    loop: bool = False
    parts: Parts | None = None  # of the picture, measured beside the loop
    profile: bool = False


@dataclass
class Runner:
    """One way to run a step."""

    name: str
    run: Callable[[], Tensor]
    uncaptured: Callable[[], Tensor]  # the same kernels, with PyTorch's calls around them to see
    peak: Callable[[], int] = torch.cuda.max_memory_allocated
    prepare_seconds: float = 0.0
    peak_bytes: int = 0
    host_ms: float = 0.0
    finite: bool = True


def cudnn_attention(on_gpu: bool) -> AbstractContextManager[None]:
    """Have PyTorch's own attention be cuDNN's, which is the fastest it has on Hopper."""
    return sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if on_gpu else contextlib.nullcontext()


def seconds_of_picture(steps: int, ms: float, full_ms: float | None) -> float | None:
    """Step 0 full, all others as measured; None where no full step was."""
    return None if full_ms is None else (full_ms + (steps - 1) * ms) / 1000


def time_rounds(
    runs: Sequence[Callable[[], Any]], settings: Settings, on_gpu: bool
) -> list[list[float]]:
    """Milliseconds a step, by runner and round; each round starts with another runner."""
    times: list[list[float]] = [[] for _ in runs]
    for i in range(settings.rounds):
        for j in [(j + i) % len(runs) for j in range(len(runs))]:
            runs[j]()  # the first after another runner meets cold caches
            times[j].append(_time(runs[j], settings.repeats, on_gpu))
    return times


def _time(run: Callable[[], Any], repeats: int, on_gpu: bool) -> float:
    if not on_gpu:
        started = time.perf_counter()
        for _ in range(repeats):
            run()
        return 1000 * (time.perf_counter() - started) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats
