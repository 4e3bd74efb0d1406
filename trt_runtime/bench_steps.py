"""Time single transformer steps of real architectures: PyTorch as it is, and plans on backends.

Every row is measured against all baselines in rotated rounds of one run, on one set of random
weights. A picture is its steps; with the loop of all steps, text encoders and VAE are in it too.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from plans.architectures import Architecture
from plans.plan import Plan, dense_plan
from plans.synthetic import Mix, synthetic_plan
from trt_runtime.doctor import device_name, git_commit, versions
from trt_runtime.picture_parts import measure_parts, picture_ms
from trt_runtime.random_models import random_inputs, random_transformer
from trt_runtime.step_baselines import Baselines
from trt_runtime.step_memory import outside_bytes, used_bytes, weight_bytes
from trt_runtime.step_onnxruntime import GraphSettings, OnnxRuntimeSteps, check_disk
from trt_runtime.step_plans import CompiledSteps, PlannedSteps
from trt_runtime.step_profile import step_profile
from trt_runtime.step_runners import (
    BACKENDS,
    EAGER,
    ONNXRUNTIME,
    PICTURE_STEPS,
    Runner,
    Settings,
    seconds_of_picture,
    time_rounds,
)

DENSE = "dense"
_WARMUP = 2

Row = dict[str, Any]
Mixes = tuple[Mix, ...]  # of the buckets after the first, which is full; none: every step is full


def code_of(mixes: Mixes) -> str:
    """The mixes as the command takes them."""
    return "+".join(mix.code for mix in mixes) or DENSE


class Workbench:
    """One architecture at one size: weights, inputs and the baselines, compiled once."""

    def __init__(
        self,
        architecture: Architecture,
        settings: Settings,
        log: Callable[[str], None],
        graphs: GraphSettings | None = None,
    ) -> None:
        self.architecture, self.settings, self.log = architecture, settings, log
        self._graphs = graphs
        self.failures: list[dict[str, str]] = []
        self.parts = self._measure_parts()  # before the transformer is there: they need memory too
        self._any_plan = self.plan(())
        self.on_gpu = settings.device.startswith("cuda")
        where: dict[str, Any] = {"device": settings.device, "dtype": settings.dtype}
        before = used_bytes(self.on_gpu)
        self.model = random_transformer(architecture, **where)
        self._weights = weight_bytes(self.model), used_bytes(self.on_gpu) - before
        if graphs is not None:
            disk = check_disk(graphs.folder, self._weights[0])
            log(f"{ONNXRUNTIME}: {disk / 1e9:.1f} GB of disk for a row at a time")
        self.inputs = random_inputs(architecture, self._any_plan, **where)
        stock = Baselines(self.model, self.inputs, self.on_gpu)
        self.baselines: list[Runner] = []
        for name in settings.baselines:
            with self.noting(name):
                self.baselines.append(self._prepare(stock.runner(name)))
        # Eager is too slow to wait for in every row; it takes its turn among the baselines.
        self._beside = [r for r in self.baselines if r.name != EAGER] or self.baselines
        self._baseline_ms: dict[str, float] = {}
        self._full_ms: dict[str, float] = {}
        self._outside = outside_bytes() if self.on_gpu else 0  # before there is any session

    @contextmanager
    def noting(self, what: str) -> Iterator[None]:
        """Note a failure of what is inside and go on: what was measured must not be lost."""
        try:
            yield
        except Exception as error:
            self.failures.append({"row": what, "error": f"{type(error).__name__}: {error}"[:2000]})
            self.log(f"{what}: failed: {str(error)[:300]}")

    def _measure_parts(self) -> dict[str, Any] | None:
        settings = self.settings
        if settings.parts is None:
            return None
        return measure_parts(
            settings.parts, height=settings.height, width=settings.width, device=settings.device,
            dtype=settings.dtype, repeats=settings.repeats, noting=self.noting,
        )  # fmt: skip

    def _picture(self, row: Row) -> None:
        """Add what a whole picture takes: of the loop's steps, or of as many like the one timed."""
        if self.settings.parts is not None and self.parts is not None:
            steps_ms = (
                1000 * row["loop_seconds"] if "loop_seconds" in row else (self.steps * row["ms"])
            )
            row["picture_ms"] = picture_ms(self.parts, self.settings.parts, steps_ms)

    def plan(self, mixes: Mixes) -> Plan:
        """Step 0 full, then the mixes, in equal shares; without any every step is full."""
        spec_heads = self.architecture.config["num_attention_heads"]
        settings = self.settings
        plan = synthetic_plan(
            self.architecture, mixes or (Mix(spec_heads, 0, 0, 0),), height=settings.height,
            width=settings.width, block=settings.block,
        )  # fmt: skip
        return plan if mixes else dense_plan(plan)

    @property
    def steps(self) -> int:
        """Steps of a picture."""
        return self._any_plan.steps

    def row(self, backend: str, mixes: Mixes) -> Row:
        """Measure one backend under one plan, the baselines beside it."""
        before = used_bytes(self.on_gpu)
        steps = self._open(backend, mixes)
        try:
            prepared = used_bytes(self.on_gpu) - before
            if isinstance(steps, OnnxRuntimeSteps):
                with self.noting(f"{backend}, {code_of(mixes)}: its sample"):
                    steps.check(self.model)
                self.log(f"{backend}, {code_of(mixes)}: {steps.told()}")
            row = self._row(backend, mixes, steps) | steps.weights(*self._weights, prepared)
            return row | {"running_device_bytes": used_bytes(self.on_gpu) - before}
        finally:
            steps.close()
            del steps
            gc.collect()  # a second copy of the weights must not outlive its row
            if self.on_gpu:
                torch.cuda.empty_cache()

    def _open(self, backend: str, mixes: Mixes) -> PlannedSteps:
        plan = self.plan(mixes)
        if backend != ONNXRUNTIME:
            return CompiledSteps(
                self.model, plan, self.inputs, self.architecture.rows, BACKENDS[backend]
            )
        assert self._graphs is not None
        buckets = list(self._buckets(mixes))
        if mixes and (self.settings.loop or self._times_full(backend, mixes)):
            buckets.insert(0, 0)
        return OnnxRuntimeSteps(
            self.model, plan, self.inputs, buckets, self._graphs, self.settings.device,
            self._outside,
        )  # fmt: skip

    def _buckets(self, mixes: Mixes) -> range:
        """The buckets of the steps after the first."""
        return range(1, 1 + len(mixes)) if mixes else range(1)

    def _times_full(self, backend: str, mixes: Mixes) -> bool:
        return bool(mixes) and self.settings.full_step and backend not in self._full_ms

    def _row(self, backend: str, mixes: Mixes, planned: PlannedSteps) -> Row:
        settings, count, buckets = self.settings, len(self._beside), self._buckets(mixes)
        steps = [planned.plan.schedule[1:].count(bucket) for bucket in buckets]
        ours = [
            self._prepare(planned.runner(
                backend if len(buckets) == 1 else f"{backend}, bucket {bucket}", bucket
            ))
            for bucket in buckets
        ]  # fmt: skip
        runners = [*self._beside, *ours]
        full = None
        if self._times_full(backend, mixes):
            full = self._prepare(planned.runner(f"{backend}, full step", 0))
            runners.append(full)
        settled = used_bytes(self.on_gpu)
        times = time_rounds([r.run for r in runners], settings, self.on_gpu)
        grown = used_bytes(self.on_gpu) - settled
        medians = {r.name: statistics.median(t) for r, t in zip(runners, times, strict=True)}
        own = times[count : count + len(ours)]
        samples = [statistics.fmean(each, steps) for each in zip(*own, strict=True)]
        ms = statistics.median(samples)  # a step after the first: buckets by their share of them
        if full is not None:
            self._full_ms[backend] = medians[full.name]
        elif not mixes:
            self._full_ms.setdefault(backend, ms)
        row = (
            self._describe(backend, mixes, planned)
            | planned.measured
            | {
                "ms": ms,
                "samples_ms": samples,
                "grown_device_bytes": grown,
                "buckets_ms": [medians[runner.name] for runner in ours],
                "baselines_ms": self._baseline_ms | {r.name: medians[r.name] for r in self._beside},
                "full_step_ms": self._full_ms.get(backend),
                "prepare_seconds": planned.open_seconds + sum(r.prepare_seconds for r in ours),
                "host_ms": max(runner.host_ms for runner in ours),
                "peak_bytes": max(runner.peak_bytes for runner in ours),
                "finite": all(runner.finite for runner in ours),
            }
        )
        row["picture_seconds"] = {
            str(n): seconds_of_picture(n, row["ms"], row["full_step_ms"]) for n in PICTURE_STEPS
        }
        if settings.loop and mixes:
            row["loop_seconds"] = self._loop(planned)
        self._picture(row)
        if self.on_gpu or backend != ONNXRUNTIME:  # a profile of PyTorch sees its kernels alone
            self._profile(ours[0], row)  # of several buckets the first
        return row

    def _profile(self, runner: Runner, row: Row) -> None:
        if self.settings.profile:
            with self.noting(f"profile of {runner.name}"):
                ms = row.get("buckets_ms", [row["ms"]])[0]
                row |= step_profile(runner.uncaptured, self.architecture, ms)

    def baseline_rows(self) -> list[Row]:
        """What only the baselines have: memory, preparation, and where their time goes."""
        rows = []
        times = time_rounds([r.run for r in self.baselines], self.settings, self.on_gpu)
        for runner, samples in zip(self.baselines, times, strict=True):
            self._baseline_ms[runner.name] = statistics.median(samples)
            row: Row = self._describe(runner.name, (), None) | {
                "ms": self._baseline_ms[runner.name],
                "samples_ms": samples,
                "prepare_seconds": runner.prepare_seconds,
                "host_ms": runner.host_ms,
                "peak_bytes": runner.peak_bytes,
                "finite": runner.finite,
            }
            self._picture(row)
            self._profile(runner, row)
            self.log(f"{runner.name}: {row['ms']:.1f} ms")
            rows.append(row)
        return rows

    def _describe(self, backend: str, mixes: Mixes, planned: PlannedSteps | None) -> Row:
        layout = self._any_plan.modules[0].layout
        return {
            "architecture": self.architecture.name,
            "height": self.settings.height,
            "width": self.settings.width,
            "rows": self.architecture.rows,
            "backend": backend,
            "mix": code_of(mixes),
            "share_saved": statistics.fmean([mix.share_saved(layout) for mix in mixes] or [0.0]),
            "cache_bytes": 0 if planned is None else planned.cache_bytes(),
            "weight_bytes": self._weights[0],
            "attention": "PyTorch" if planned is None else planned.attention,
        }

    def _loop(self, planned: PlannedSteps) -> float:
        """Seconds of all steps of the plan in their order, the full step first."""
        planned.run_step(0)
        self._synchronise()
        begin = time.perf_counter()
        for step in range(planned.plan.steps):
            planned.run_step(step)
        self._synchronise()
        return time.perf_counter() - begin

    def _prepare(self, runner: Runner) -> Runner:
        """Compile, capture and warm up; note memory, and the time the host spends on a step."""
        begin = time.perf_counter()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        for _ in range(_WARMUP):
            runner.run()
        self._synchronise()
        runner.prepare_seconds = time.perf_counter() - begin
        begin = time.perf_counter()
        sample = runner.run()  # of a replayed graph the next run would overwrite it
        runner.host_ms = 1000 * (time.perf_counter() - begin)
        self._synchronise()
        runner.finite = bool(torch.isfinite(sample).all())
        if self.on_gpu:
            runner.peak_bytes = runner.peak()
        self.log(f"{runner.name}: ready after {runner.prepare_seconds:.0f} s")
        return runner

    def _synchronise(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def measure_steps(
    architecture: Architecture,
    rows: Sequence[tuple[str, Mixes]],
    settings: Settings,
    *,
    graphs: GraphSettings | None = None,
    log: Callable[[str], None] = lambda line: None,
    row_done: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Measure rows of a backend and a plan's mixes (none: all full) in the order given.

    row_done gets the report after each row, so that a run that is cut off leaves what it has. A
    row that fails says so in the report, and the next one runs. graphs: for rows of onnxruntime.
    """
    torch._dynamo.reset()
    bench = Workbench(architecture, settings, log, graphs)
    report: dict[str, Any] = {
        "device": device_name(settings.device),
        "dtype": str(settings.dtype).removeprefix("torch."),
        "weights": "random: no structure, so no statement about quality",
        "picture": "steps x step, without text encoders and VAE"
        if bench.parts is None
        else f"{bench.steps} steps, text encoders and VAE, uncompiled: picture_ms",
        "parts": bench.parts,
        "baseline_attention": "cuDNN" if bench.on_gpu else "SDPA",
        "rounds": settings.rounds,
        "repeats": settings.repeats,
        "versions": versions(),
        "git_commit": git_commit(),
        "baselines": bench.baseline_rows(),
        "rows": [],
        "failures": bench.failures,
    }
    row_done(report)
    for backend, mixes in rows:
        what = f"{backend}, {code_of(mixes)}"
        with bench.noting(what):
            report["rows"].append(bench.row(backend, mixes))
            log(f"{what}: {report['rows'][-1]['ms']:.1f} ms")
        row_done(report)
    return report
