"""Runs of a search, a group of prompts at a time; what is done is kept for a restart."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from plans.accounting import account
from plans.denoising import Denoising, denoise
from plans.effort import AGES, Effort
from plans.errors import atomic_write
from plans.gradients import Gradients
from plans.importance import GRADIENT, HEAD, Energies
from plans.plan import Plan
from plans.recorder import Recorder, pooled_errors
from plans.strategies import MeasureHeads

Floats = NDArray[np.float64]
Moments = dict[str, Floats]
Progress = Callable[[str, int, int, float], None]  # stage, steps done, steps, saving so far


class Run(NamedTuple):
    """What one group's run showed: of its plan's heads, and of every mode (None: not recorded).

    energies: what weights of errors are told from, where they were asked for (plans.importance).
    """

    measured: Moments
    recorded: Moments | None
    energies: Moments | None = None


class Scratch:
    """Folder of finished runs, so that a search that was cut off does not repeat them.

    A run is found again by its number, stage and plan: runs and choices are deterministic, so the
    search comes to the same plans.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any], resume: bool) -> None:
        text = json.dumps(settings, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.folder = None if folder is None else folder / name
        self.resumed = 0
        self._runs = 0
        if not resume:
            self.clear()

    def run(self, plan: Plan, stage: str, group: int, compute: Callable[[], Run]) -> Run:
        """Give the run that is on file, or compute and file it."""
        self._runs += 1
        if self.folder is None:
            return compute()
        key = f"{plan.sha256}{stage}{group}".encode()
        path = self.folder / f"{self._runs:03d}-{hashlib.sha256(key).hexdigest()[:16]}.npz"
        with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):
            with np.load(path) as arrays:
                run = _unflatten(dict(arrays))
            self.resumed += 1
            return run
        run = compute()
        data = io.BytesIO()
        np.savez(data, **_flatten(run))  # type: ignore[arg-type]
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write(path, data.getvalue())
        return run

    def clear(self) -> None:
        """Forget all runs of these settings."""
        if self.folder is None or not self.folder.is_dir():
            return
        for path in self.folder.glob("*.npz"):
            path.unlink()
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def _flatten(run: Run) -> Moments:
    parts = zip(Run._fields, run, strict=True)
    return {f"{part}.{k}": v for part, arrays in parts if arrays for k, v in arrays.items()}


def _unflatten(arrays: Moments) -> Run:
    parts: dict[str, Moments] = {part: {} for part in Run._fields}
    for name, array in arrays.items():
        part, _, key = name.partition(".")
        parts[part][key] = array
    return Run(parts["measured"], parts["recorded"] or None, parts["energies"] or None)


class Runs:
    """Runs a pipeline with plans on groups of prompts."""

    def __init__(
        self,
        pipe: Any,
        settings: Denoising,
        effort: Effort,
        candidates: Mapping[str, Sequence[int]],
        report: Progress,
        scratch: Scratch,
    ) -> None:
        self.groups = list(settings.groups(effort.pictures_per_run))
        self._pipe = pipe
        self._effort = effort
        self._candidates = candidates
        self._report = report
        self._scratch = scratch

    def recorder(self, plan: Plan) -> Recorder:
        return Recorder(
            plan.modules, self._candidates, plan.steps, AGES, self._effort.sample_tokens
        )

    def run(self, plan: Plan, stage: str, group: int, record: bool, weighing: str = HEAD) -> Run:
        """Run one group with the plan and measure it; record what every other mode would err.

        weighing: take down what these weights of errors are told from; the plan is all full then.
        """
        return self._scratch.run(
            plan,
            f"{stage} {record}",
            group,
            lambda: self._run(plan, stage, group, record, weighing),
        )

    def errors(self, plan: Plan, stage: str) -> Floats:
        """Run all groups with the plan: errors [N, R] over all prompts."""
        runs = [self.run(plan, stage, i, False).measured for i in range(len(self.groups))]
        return pooled_errors(runs)[:, :, 0]

    def _run(self, plan: Plan, stage: str, group: int, record: bool, weighing: str) -> Run:
        recorder = self.recorder(plan) if record else None
        watcher = self._watcher(plan, weighing)
        energies = watcher if isinstance(watcher, Energies) else None
        strategy = MeasureHeads(plan, recorder, self._effort.sample_tokens, energies)
        saved = account(plan, 1)["per_step"]

        def step_done(step: int) -> None:
            self._report(stage, step + 1, plan.steps, sum(saved[: step + 1]) / (step + 1))

        settings = self.groups[group]
        with nullcontext() if watcher is None else watcher.attached():
            denoise(self._pipe, settings, plan.modules, strategy, step_done)
        pictures = np.array(float(settings.pictures))
        recorded = None if recorder is None else {**recorder.moments(), "pictures": pictures}
        told = None if watcher is None else watcher.energies()
        return Run({**strategy.measured(), "pictures": pictures}, recorded, told)

    def _watcher(self, plan: Plan, weighing: str) -> Energies | Gradients | None:
        transformer, modules, sampler = self._pipe.transformer, plan.modules, plan.sampler
        if weighing == HEAD:
            return None
        if weighing == GRADIENT:
            return Gradients(transformer, modules, sampler.guidance_scale if sampler.cfg else None)
        return Energies(transformer, modules, plan.steps)


def fingerprint(settings: Denoising) -> dict[str, Any]:
    """Say what a run's prompts and noise are, in JSON."""
    prompts: Any = settings.prompts
    if isinstance(prompts, Mapping):
        prompts = {
            name: hashlib.sha256(value.cpu().float().numpy().tobytes()).hexdigest()
            if hasattr(value, "cpu")
            else value
            for name, value in prompts.items()
        }
    else:
        prompts = list(prompts)
    whole = replace(settings, prompts=()).__dict__
    return {**whole, "prompts": prompts}
