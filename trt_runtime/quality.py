"""Quality against saving: plans of several bounds and kinds, and simply fewer steps."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from plans.denoising import Denoising, check_pipeline, dense_plan_of
from plans.errors import ArrowheadError
from plans.plan import Plan, save_plan
from plans.run import run_plan
from plans.search import search_plan
from trt_runtime.doctor import device_name, git_commit, versions
from trt_runtime.kernels import use_kernels
from trt_runtime.marks import RESAMPLES, Drawn, Judge, Verdicts
from trt_runtime.parity import Progress
from trt_runtime.quality_report import open_report, save_report
from trt_runtime.quality_settings import CANDIDATES, Point, Settings, calibration_seed, points
from trt_runtime.verify import Accuracy


def measure_quality(
    pipe: Any,
    settings: Settings,
    folder: Path,
    *,
    accuracy: Accuracy | None = None,
    verdicts: Verdicts | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Draw all captions once uncompressed and once per row; give the report.

    folder gets results.json, written anew after every row, and the plans. resume: keep the rows
    that are there, if they were made with the same settings.
    """
    check_pipeline(pipe)
    pipe.set_progress_bar_config(disable=True)
    report = open_report(folder, _settings_record(pipe, settings), resume)
    report |= {
        "batch": settings.batch,
        "attention": use_kernels(pipe.device, pipe.transformer.dtype),
        "versions": versions(),
        "git_commit": git_commit(),
    }
    made = {(row["variant"], row["delta"], row["steps"]) for row in report["rows"]}
    todo = [point for point in points(settings) if point.key not in made]
    if not todo:
        return report
    bench = _Bench(pipe, settings, folder, progress or (lambda *_: None), len(todo) + 1)
    dense = bench.draw("uncompressed", settings.steps, None)
    judge = Judge(
        settings.captions, dense, accuracy=accuracy, verdicts=verdicts, device=pipe.device,
        batch=settings.batch, seed=settings.seed,
    )  # fmt: skip
    report["uncompressed"] = judge.dense_marks | {"draw_seconds": dense.seconds}
    save_report(report, folder)
    for point in todo:
        bench.done += 1
        report["rows"].append(bench.row(point, judge) | {"git_commit": report["git_commit"]})
        save_report(report, folder)
    return report


def draw(pipe: Any, settings: Settings, steps: int, progress: Progress | None = None) -> Drawn:
    """Draw every caption with `steps` steps, in batches."""
    pictures, latents = [], []
    begin = time.perf_counter()
    for first in range(0, len(settings.captions), settings.batch):
        part = list(settings.captions[first : first + settings.batch])
        made, last = _call(pipe, settings, part, steps, settings.seed + first)
        pictures.append(made.mul(255).round().to(torch.uint8).cpu())
        latents.append(last.float().cpu())
        if not torch.isfinite(latents[-1]).all():
            raise ArrowheadError(
                f"latents of {type(pipe).__name__}",
                got=f"values that are not finite in {pipe.transformer.dtype}",
                expected="finite latents",
                fix="pass --dtype fp32 or bf16",
            )
        if progress is not None:
            progress("pictures", first + len(part), len(settings.captions))
    return Drawn(torch.cat(pictures), torch.cat(latents), time.perf_counter() - begin)


def _call(
    pipe: Any, settings: Settings, captions: list[str], steps: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    last: dict[str, torch.Tensor] = {}

    def keep(_: Any, __: int, ___: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        last.update(tensors)
        return {}

    options: dict[str, Any] = {}
    if settings.max_sequence_length is not None:
        options["max_sequence_length"] = settings.max_sequence_length
    made = pipe(
        captions,
        num_inference_steps=steps,
        guidance_scale=settings.guidance_scale,
        height=settings.height,
        width=settings.width,
        generator=[torch.Generator("cpu").manual_seed(seed + i) for i in range(len(captions))],
        output_type="pt",
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["latents"],
        **options,
    ).images
    return made, last["latents"]


class _Bench:
    """Makes rows; identical plans are drawn once."""

    def __init__(
        self, pipe: Any, settings: Settings, folder: Path, progress: Progress, total: int
    ) -> None:
        self.done, self._total = 0, total
        self._pipe, self._settings, self._folder = pipe, settings, folder
        self._progress = progress
        self._marked: dict[str, dict[str, Any]] = {}  # plan hash -> marks

    def row(self, point: Point, judge: Judge) -> dict[str, Any]:
        row: dict[str, Any] = {
            "name": point.name, "variant": point.variant, "delta": point.delta,
            "steps": point.steps,
        }  # fmt: skip
        if point.delta is None:
            saved = 1 - point.steps / self._settings.steps
            row |= {"attention_flops_saved": saved, "transformer_flops_saved": saved}
            return row | self._marks(point, None, judge)
        plan = self._search(point)
        facts, search = plan.accounting or {}, plan.search or {}
        file = Path("plans") / f"{point.variant}-{point.delta:g}.json"
        (self._folder / file).parent.mkdir(exist_ok=True)
        save_plan(plan, self._folder / file)
        row |= {
            "attention_flops_saved": facts["attention_flops_saved"],
            "paper_formula_saved": facts["paper_formula_saved"],
            "transformer_flops_saved": 1
            - facts["transformer_flops"] / facts["transformer_flops_dense"],
            "buckets": len(plan.buckets),
            "search_seconds": search["seconds"],
            "plan": str(file),
            "plan_sha256": plan.sha256,
        }
        if plan.sha256 not in self._marked:
            self._marked[plan.sha256] = self._marks(point, plan, judge)
        return row | self._marked[plan.sha256]

    def draw(self, name: str, steps: int, plan: Plan | None) -> Drawn:
        """Draw all captions, with the plan if there is one."""
        with run_plan(self._pipe, plan) if plan is not None else nullcontext():
            return draw(
                self._pipe, self._settings, steps,
                lambda what, at, of: self._progress(
                    f"{name}: {what} {at}/{of}", self.done, self._total
                ),
            )  # fmt: skip

    def _marks(self, point: Point, plan: Plan | None, judge: Judge) -> dict[str, Any]:
        drawn = self.draw(point.name, point.steps, plan)
        self._progress(f"{point.name}: marks", self.done, self._total)
        return {**judge.marks(drawn), "draw_seconds": drawn.seconds}

    def _search(self, point: Point) -> Plan:
        settings = self._settings
        assert point.delta is not None
        return search_plan(
            self._pipe,
            settings.calibration,
            steps=settings.steps,
            height=settings.height,
            width=settings.width,
            delta=point.delta,
            candidates=CANDIDATES[point.variant],
            block=settings.block,
            max_buckets=settings.max_buckets,
            guidance_scale=settings.guidance_scale,
            max_sequence_length=settings.max_sequence_length,
            seed=calibration_seed(settings),
            source=settings.source,
            revision=settings.revision,
            progress=lambda stage, at, of, _: self._progress(
                f"{point.name}: {stage} {at}/{of}", self.done, self._total
            ),
        )


def _settings_record(pipe: Any, settings: Settings) -> dict[str, Any]:
    """What two runs must share for their rows to stand in one table."""
    run = Denoising(
        settings.captions[:1], settings.steps, settings.height, settings.width,
        settings.guidance_scale, settings.max_sequence_length, settings.seed,
    )  # fmt: skip
    plan = dense_plan_of(pipe, run, settings.block, settings.source, settings.revision)
    return {
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
        "calibration_seed": calibration_seed(settings),
        "device": device_name(str(pipe.device)),
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "bootstrap_resamples": RESAMPLES,
    }


def _sha256(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
