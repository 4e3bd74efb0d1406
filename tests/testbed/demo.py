"""The whole chain on this machine: search, export, build, run, compare, and a page that shows it.

    python -m tests.testbed.demo --output build/demo

Takes each trained pipeline of the testbed from checkpoint to pictures on ONNX Runtime's CPU
provider, with its plan and without, and writes index.html and report.json.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from rich.console import Console

from exporter import export_bundle
from plans.errors import atomic_write
from plans.picture import plan_picture
from plans.plan import load_plan, save_plan
from plans.search import search_plan
from tests.testbed import demo_page, reader
from tests.testbed.evaluate import held_out_captions
from tests.testbed.models import T5_LENGTH, TESTBED, missing
from tests.testbed.scenes import SIDE
from trt_runtime.attachment import attach, detach
from trt_runtime.build import build
from trt_runtime.bundles import load_transformer
from trt_runtime.doctor import device_name, git_commit, versions
from trt_runtime.parity import compare_graphs
from trt_runtime.pipeline import Picture, generate, load_source_pipeline
from trt_runtime.verify import picture_quality


@dataclass(frozen=True)
class Setup:
    """How a pipeline of the testbed is sampled, and the bound its plan is searched with."""

    name: str
    steps: int
    guidance_scale: float
    delta: float
    prompts: int  # of the calibration run


# The fewest steps within one point of caption accuracy of fifty: none is idle.
SETUPS = (
    Setup("tiny-sd3", steps=6, guidance_scale=3.0, delta=0.2, prompts=2),
    Setup("tiny-flux", steps=8, guidance_scale=3.5, delta=0.2, prompts=2),
)

console = Console()


class Stages:
    """Print each stage with its seconds, and keep them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seconds: dict[str, float] = {}

    def run(self, stage: str, work: Any) -> Any:
        started = time.perf_counter()
        with console.status(f"{self.name}: {stage}"):
            result = work()
        self.seconds[stage] = time.perf_counter() - started
        console.print(f"{self.name}: {stage:<44} {self.seconds[stage]:6.1f} s")
        return result


def _search(setup: Setup, source: Path, folder: Path) -> Path:
    pipe = load_source_pipeline(str(source), dtype=torch.float32)
    prompts = (source / "calibration_prompts.txt").read_text().splitlines()[: setup.prompts]
    plan = search_plan(
        pipe,
        prompts,
        steps=setup.steps,
        height=SIDE,
        width=SIDE,
        delta=setup.delta,
        block=16,  # gives 1024 image tokens the geometry of a 2K picture
        max_buckets=6,
        guidance_scale=setup.guidance_scale,
        max_sequence_length=T5_LENGTH,
        source=source,
    )
    save_plan(plan, folder / "plan.json")
    plan_picture(plan, folder / "plan.png")
    return folder / "plan.json"


def _export(plan_file: Path, source: Path, bundle: Path) -> None:
    plan = load_plan(plan_file)
    pipe = load_source_pipeline(str(source), dtype=torch.float32)
    rows = 2 if plan.sampler.cfg else 1
    export_bundle(pipe.transformer, plan, bundle, dtype="float32", batch=rows, source=str(source))


def _pictures(
    source: Path, bundle: Path, captions: Sequence[str]
) -> tuple[dict[str, list[Picture]], float]:
    """Draw every caption without and with the plan, in turns; and one with it in PyTorch.

    Returns the pictures and the largest difference of ONNX Runtime's final latents from PyTorch's.
    """
    pipe = load_source_pipeline(str(source), dtype=torch.float32, transformer=None)
    pipe.set_progress_bar_config(disable=True)
    kinds = {"dense": load_transformer(bundle, dense=True), "plan": load_transformer(bundle)}
    made: dict[str, list[Picture]] = {name: [] for name in kinds}
    for seed, caption in enumerate(captions):
        for name, transformer in kinds.items():
            attach(pipe, transformer)
            made[name] += generate(pipe, [caption], seed=seed)
    detach(pipe)
    for transformer in kinds.values():
        transformer.close()
    attach(pipe, bundle, backend="torch")
    (truth,) = generate(pipe, captions[:1], seed=0)
    detach(pipe)
    return made, (truth.latents - made["plan"][0].latents).abs().max().item()


def run_one(setup: Setup, folder: Path, captions: Sequence[str]) -> dict[str, Any]:
    """Take one pipeline through the chain; everything it makes lies in `folder`."""
    source, bundle, stages = TESTBED / setup.name, folder / "bundle", Stages(setup.name)
    folder.mkdir(parents=True, exist_ok=True)
    plan_file = stages.run("search a plan", lambda: _search(setup, source, folder))
    stages.run("export one graph per bucket", lambda: _export(plan_file, source, bundle))
    stages.run("build the engines", lambda: build(bundle))
    graphs = stages.run("verify: each graph against PyTorch", lambda: compare_graphs(bundle))
    made, difference = stages.run(
        "draw with the plan and without", lambda: _pictures(source, bundle, captions)
    )
    quality = [
        picture_quality(a.image, b.image) for a, b in zip(made["plan"], made["dense"], strict=True)
    ]
    plan = load_plan(plan_file)
    assert plan.accounting is not None and plan.search is not None
    marks = {name: reader.score(captions, [p.image for p in pics]) for name, pics in made.items()}
    seconds = {name: median(p.seconds for p in pics) for name, pics in made.items()}
    for name, pictures in made.items():
        for i, picture in enumerate(pictures):
            picture.image.save(folder / f"{name}-{i}.png")
    return {
        "pipeline": setup.name,
        "captions": list(captions),
        "steps": setup.steps,
        "delta": setup.delta,
        "attention_flops_saved": plan.accounting["attention_flops_saved"],
        "transformer_flops_saved": 1
        - plan.accounting["transformer_flops"] / plan.accounting["transformer_flops_dense"],
        "caption_accuracy": marks["plan"]["accuracy"],
        "caption_accuracy_dense": marks["dense"]["accuracy"],
        "psnr_db": fmean(psnr for psnr, _ in quality),
        "ssim": fmean(ssim for _, ssim in quality),
        "seconds": seconds["plan"],
        "seconds_dense": seconds["dense"],
        "max_abs_latent_diff": difference,
        "graphs_agree": all(graph.passed for graph in graphs),
        "buckets": len(plan.buckets),
        "search_seconds": plan.search["seconds"],
        "stage_seconds": stages.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/demo"))
    parser.add_argument("--captions", type=int, default=4)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    captions = held_out_captions(args.captions)
    started = time.perf_counter()
    setups = [setup for setup in SETUPS if not missing(setup.name)]
    for setup in SETUPS:
        if why := missing(setup.name):
            console.print(f"left out: {why}")
    rows = [run_one(setup, args.output / setup.name, captions) for setup in setups]
    report = {
        "pipelines": rows,
        "seconds": time.perf_counter() - started,
        "device": device_name("cpu"),
        "versions": versions(),
        "git_commit": git_commit(),
    }
    atomic_write(args.output / "report.json", json.dumps(report, indent=2) + "\n")
    atomic_write(args.output / "index.html", demo_page.page(report, args.output))
    console.print(demo_page.table(rows))
    console.print(f"page: {args.output / 'index.html'}   numbers: {args.output / 'report.json'}")


if __name__ == "__main__":
    main()
