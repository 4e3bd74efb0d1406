"""Quality against saving: plans of several bounds and kinds, fewer steps, and step caches."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from plans.denoising import Denoising, check_pipeline, dense_plan_of
from plans.plan import Plan
from plans.prices import Prices
from trt_runtime.doctor import device_name, git_commit, versions
from trt_runtime.kernels import use_kernels
from trt_runtime.marks import RESAMPLES, Judge, PerCaption, Verdicts
from trt_runtime.parity import Progress
from trt_runtime.quality_curves import compare_curves
from trt_runtime.quality_draw import Artist, Drawn, work_saved
from trt_runtime.quality_peers import missing_peers
from trt_runtime.quality_report import load_captions, open_report, save_captions, save_report
from trt_runtime.quality_settings import VARIANTS, Point, Settings, points
from trt_runtime.quality_variants import Planner, Run, run_of
from trt_runtime.verify import Accuracy

UNCOMPRESSED = "uncompressed"


def measure_quality(
    pipe: Any,
    settings: Settings,
    folder: Path,
    *,
    accuracy: Accuracy | None = None,
    verdicts: Verdicts | None = None,
    resume: bool = False,
    limit_seconds: float | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Draw all captions once uncompressed and once per row; give the report.

    folder gets results.json, written anew after every row, marks per caption, and the plans.
    resume: keep the rows that are there, if they were made with the same settings. limit_seconds:
    begin no row after that time.
    """
    begin = time.perf_counter()
    check_pipeline(pipe)
    pipe.set_progress_bar_config(disable=True)
    bare = _dense_plan(pipe, settings)
    report = open_report(folder, _settings_record(pipe, settings, bare), resume)
    resumed = UNCOMPRESSED in report
    report |= {
        "batch": settings.batch,
        "attention": use_kernels(pipe.device, pipe.transformer.dtype),
        "versions": versions(),
        "git_commit": git_commit(),
        "variants": {name: VARIANTS[name]._asdict() for name in settings.variants},
        "skipped": settings.skipped
        | {k: v for k, v in missing_peers().items() if k in settings.variants},
    }
    made = {tuple(row["key"]) for row in report["rows"]}
    todo = [p for p in points(settings) if p.key not in made and p.variant not in report["skipped"]]
    by_caption = load_captions(folder) if resumed else {}
    if todo or not resumed:
        bench = _Bench(
            pipe, settings, folder, bare, progress or (lambda *_: None), len(todo), resumed
        )
        judge = bench.judge(report, by_caption, accuracy, verdicts)
        for point in todo:
            if limit_seconds is not None and time.perf_counter() - begin > limit_seconds:
                break
            row, by_caption[point.name] = bench.row(point, judge)
            report["rows"].append(row | {"git_commit": report["git_commit"]})
            save_captions(by_caption, folder)
            save_report(report, folder)
    report["comparisons"] = compare_curves(report, by_caption, seed=settings.seed)
    save_report(report, folder)
    return report


class _Bench:
    """Makes rows; identical plans are drawn once."""

    def __init__(
        self, pipe: Any, settings: Settings, folder: Path, bare: Plan, progress: Progress,
        rows: int, resumed: bool,
    ) -> None:  # fmt: skip
        self._pipe, self._settings, self._folder, self._bare = pipe, settings, folder, bare
        self._progress, self._done, self._total = progress, 0, rows + 1
        self._name = ""
        modules = [module.name for module in bare.modules]
        self._artist = Artist(pipe, settings, modules)
        self._planner = Planner(
            pipe, settings, folder, self._report, resumed=resumed, modules=modules
        )
        self._marked: dict[str, tuple[dict[str, Any], PerCaption]] = {}

    def judge(
        self, report: dict[str, Any], by_caption: dict[str, PerCaption],
        accuracy: Accuracy | None, verdicts: Verdicts | None,
    ) -> Judge:  # fmt: skip
        """Draw the uncompressed pictures and enter their marks; give the judge of the others."""
        settings = self._settings
        dense = self.draw(UNCOMPRESSED, settings.steps, Run(None, nullcontext))
        judge = Judge(
            settings.captions, dense, accuracy=accuracy, verdicts=verdicts,
            device=self._pipe.device, batch=settings.batch, seed=settings.seed,
        )  # fmt: skip
        report[UNCOMPRESSED] = judge.dense_marks | _times(dense)
        by_caption[UNCOMPRESSED] = judge.dense_by_caption
        save_captions(by_caption, self._folder)
        save_report(report, self._folder)
        return judge

    def row(self, point: Point, judge: Judge) -> tuple[dict[str, Any], PerCaption]:
        """Make a row and its marks per caption."""
        self._done += 1
        self._name = point.name
        row: dict[str, Any] = {
            "name": point.name, "key": list(point.key), "variant": point.variant,
            "steps": point.steps, "delta": point.delta, "threshold": point.threshold,
            "search": point.search,
        }  # fmt: skip
        run = run_of(self._planner, point)
        if run.share is None or run.share not in self._marked:
            marks, by_caption = self._marks(point, run, judge)
            self._marked[run.share or point.name] = marks, by_caption
        marks, by_caption = self._marked[run.share or point.name]
        return row | dict(run.facts or {}) | marks, by_caption

    def draw(self, name: str, steps: int, run: Run) -> Drawn:
        """Draw all captions with what the run installs."""
        self._name = name
        with run.installed():
            return self._artist.draw(steps, self._report)

    def _marks(self, point: Point, run: Run, judge: Judge) -> tuple[dict[str, Any], PerCaption]:
        drawn = self.draw(point.name, point.steps, run)
        self._report("marks", 0, 1)
        marks, by_caption = judge.marks(drawn)
        plan = run.plan or self._bare
        share = plan.steps / self._settings.steps  # of a plan of fewer steps
        work = {k: 1 - share * (1 - v) for k, v in work_saved(plan, drawn.ran).items()}
        return work | _times(drawn) | marks, by_caption

    def _report(self, what: str, at: int, of: int) -> None:
        self._progress(f"{self._name}: {what} {at}/{of}", self._done, self._total)


def _times(drawn: Drawn) -> dict[str, Any]:
    return {
        "transformer_ms_per_picture": sum(drawn.step_ms),
        "transformer_ms_per_step": drawn.step_ms,
        "draw_seconds": drawn.seconds,
    }


def _dense_plan(pipe: Any, settings: Settings) -> Plan:
    run = Denoising(
        settings.captions[:1], settings.steps, settings.height, settings.width,
        settings.guidance_scale, settings.max_sequence_length, settings.seed,
    )  # fmt: skip
    return dense_plan_of(pipe, run, settings.block, settings.source, settings.revision)


def _settings_record(pipe: Any, settings: Settings, plan: Plan) -> dict[str, Any]:
    """What two runs must share for their rows to stand in one table."""
    record = {} if settings.prices is None else {"prices": _prices_record(settings.prices, plan)}
    return record | {
        "model": settings.source,
        "architecture": plan.model.architecture,
        "config_sha256": plan.model.config_sha256,
        "weights_sha256": plan.model.weights_sha256,
        "captions": len(settings.captions),
        "captions_sha256": _sha256(settings.captions),
        "calibration_prompts": len(settings.calibration),
        "calibration_prompts_sha256": _sha256(settings.calibration),
        "num_inference_steps": settings.steps,
        "sigmas_sha256": plan.sampler.sigmas_sha256,
        "guidance_scale": settings.guidance_scale,
        "height": settings.height,
        "width": settings.width,
        "text_tokens": plan.text_tokens,
        "block": settings.block,
        "max_buckets": settings.max_buckets,
        "seed": settings.seed,
        "seeds": settings.seeds,
        "calibration_seed": settings.calibration_seed,
        "device": device_name(str(pipe.device)),
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "bootstrap_resamples": RESAMPLES,
    }


def _prices_record(prices: Prices, plan: Plan) -> dict[str, Any]:
    """What a head costs in each mode, in milliseconds, by shape; where it was measured."""
    rows = 2 if plan.sampler.cfg else 1
    own = list(
        {id(price): price for price in (prices.find(m, rows) for m in plan.modules)}.values()
    )
    costs = [{str(mode): price.of(mode) for mode in sorted(price.attention)} for price in own]
    return {"device": prices.device, "kernel": prices.kernel, "batch": prices.batch, "ms": costs}


def _sha256(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
