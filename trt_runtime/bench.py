"""Time pictures with the plan and without, on the same backend, in turns, in one run."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from plans.bundle import Bundle
from trt_runtime.attachment import attach
from trt_runtime.bundles import (
    TORCH_BACKENDS,
    load_torch_transformer,
    load_transformer,
    model_source,
    open_bundle,
)
from trt_runtime.doctor import device_name, git_commit, versions
from trt_runtime.engine import DTYPES
from trt_runtime.kernels import use_kernels
from trt_runtime.onnxruntime_engine import OnnxRuntimeEngine
from trt_runtime.onnxruntime_operators import operators_for
from trt_runtime.parity import Progress
from trt_runtime.pipeline import Picture, generate, load_source_pipeline, pictures_per_call
from trt_runtime.transformer import ArrowheadTransformer

_DENSE, _PLAN = "dense", "plan"


def end_to_end(
    folder: Path | str,
    prompts: Sequence[str],
    *,
    backend: str = "onnxruntime",
    device: str = "cpu",
    repeats: int = 3,
    warmup: int = 1,
    seed: int = 0,
    profile: bool = False,
    progress: Progress | None = None,
    **session: Any,
) -> dict[str, Any]:
    """Time whole pictures and single steps: stock dense graph against the plan.

    Dense and plan take turns, so that a machine that slows down slows both. Medians over
    `repeats` rounds after `warmup`. profile: seconds per operator type too, from one more round.
    """
    bundle, plan = open_bundle(folder)
    dtype = torch.float32 if device == "cpu" else DTYPES[bundle.dtype]
    pipe = load_source_pipeline(
        model_source(bundle, folder),
        dtype=dtype,
        revision=bundle.model.get("revision"),
        transformer=None,
    ).to(device)
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"backend": backend, "device": device}
    options |= session if backend == "onnxruntime" else {}
    if backend in TORCH_BACKENDS:  # one copy of the weights for both
        options["transformer"] = load_torch_transformer(bundle, folder)
    transformers = {
        name: load_transformer(folder, dense=name == _DENSE, **options) for name in (_DENSE, _PLAN)
    }
    per_call = pictures_per_call(transformers[_PLAN])
    try:
        made = _take_turns(pipe, transformers, prompts, repeats, warmup, seed, progress)
    finally:
        for transformer in transformers.values():
            transformer.close()
    report = _report(made, per_call)
    report |= {
        "backend": backend,
        "attention": _attention(bundle, backend, device),
        "device": device_name(device),
        "session": session,
        "dtype": bundle.dtype,
        "repeats": repeats,
        "steps": plan.steps,
        "plan_sha256": plan.sha256,
        "versions": versions(),
        "git_commit": git_commit(),
    }
    if profile and backend == "onnxruntime":
        report["operators"] = {
            name: profile_run(pipe, folder, [prompts[0]] * per_call, name == _DENSE, options, seed)
            for name in (_DENSE, _PLAN)
        }
    return report


def _attention(bundle: Bundle, backend: str, device: str) -> str:
    """Say what computes attention under the plan."""
    if backend in TORCH_BACKENDS:
        return use_kernels(device, DTYPES[bundle.dtype])
    if backend == "onnxruntime":
        library = operators_for(bundle.graphs[0], device)
        return "operator library" if library else "function bodies"
    return "plugins"


def _take_turns(
    pipe: Any,
    transformers: dict[str, ArrowheadTransformer],
    prompts: Sequence[str],
    repeats: int,
    warmup: int,
    seed: int,
    progress: Progress | None,
) -> dict[str, list[Picture]]:
    """Make one call's pictures with each transformer in each round; keep one of each call."""
    made: dict[str, list[Picture]] = {name: [] for name in transformers}
    rounds = warmup + repeats
    per_call = pictures_per_call(transformers[_PLAN])
    for turn in range(rounds):
        chunk = [prompts[(turn * per_call + i) % len(prompts)] for i in range(per_call)]
        for name, transformer in transformers.items():
            if progress is not None:
                progress(f"round {turn + 1}, {name}", turn, rounds)
            attach(pipe, transformer)
            pictures = generate(pipe, chunk, seed=seed)
            if turn >= warmup:
                made[name].append(pictures[0])
    if progress is not None:
        progress("timed", rounds, rounds)
    return made


def profile_run(
    pipe: Any,
    folder: Path | str,
    prompts: Sequence[str],
    dense: bool,
    options: dict[str, Any],
    seed: int = 0,
) -> dict[str, float]:
    """Make one call's pictures under ONNX Runtime's profiler; seconds per operator type."""
    seconds: dict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as traces:
        transformer = load_transformer(folder, dense=dense, profile=Path(traces), **options)
        attach(pipe, transformer)
        try:
            generate(pipe, prompts, seed=seed)
            for engine in transformer.engines.values():
                assert isinstance(engine, OnnxRuntimeEngine)
                for kind, spent in engine.end_profile().items():
                    seconds[kind] += spent
        finally:
            transformer.close()
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _report(made: dict[str, list[Picture]], per_call: int) -> dict[str, Any]:
    """Medians per picture, per transformer call and per bucket."""
    report: dict[str, Any] = {"pictures_per_call": per_call}
    for name, pictures in made.items():
        by_bucket: dict[int, list[float]] = defaultdict(list)
        for picture in pictures:
            for bucket, spent in picture.step_seconds:
                by_bucket[bucket].append(spent)
        report[name] = {
            "seconds": median(p.seconds for p in pictures) / per_call,
            "transformer_seconds": median(
                sum(spent for _, spent in p.step_seconds) for p in pictures
            )
            / per_call,
            "step_seconds": {str(b): median(spent) for b, spent in sorted(by_bucket.items())},
            "step_counts": {
                str(b): len(spent) // len(pictures) for b, spent in sorted(by_bucket.items())
            },
        }
    dense, plan = report[_DENSE], report[_PLAN]
    report["speedup"] = dense["seconds"] / plan["seconds"]
    report["transformer_speedup"] = dense["transformer_seconds"] / plan["transformer_seconds"]
    return report
