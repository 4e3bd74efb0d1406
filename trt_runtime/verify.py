"""The parity gate: a backend against PyTorch with the same plan, and both against no plan."""

from __future__ import annotations

import importlib
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import nn

from plans.bundle import Bundle
from plans.errors import ArrowheadError
from trt_runtime.attachment import attach, detach
from trt_runtime.bundles import load_torch_transformer, model_source, open_bundle
from trt_runtime.engine import DTYPES
from trt_runtime.parity import TOLERANCE, Progress, compare_graphs, max_abs_difference
from trt_runtime.pipeline import Picture, generate, load_source_pipeline

Accuracy = Callable[[list[str], list[Any]], dict[str, float]]

IDENTICAL_DB = 100.0  # stands for the infinite PSNR of equal pictures: JSON has no infinity


def compare_runs(
    folder: Path | str,
    prompts: Sequence[str],
    *,
    backend: str = "onnxruntime",
    transformer: nn.Module | None = None,
    seed: int = 0,
    device: str = "cpu",
    accuracy: Accuracy | None = None,
    progress: Progress | None = None,
    **session: Any,
) -> dict[str, Any]:
    """Make each picture three times: plan on the backend, plan in PyTorch, no plan in PyTorch.

    Gives max_abs_latent_diff between the first two, and PSNR, SSIM and accuracy of each against
    the third.
    """
    bundle, _ = open_bundle(folder)
    module = transformer if transformer is not None else load_torch_transformer(bundle, folder)
    dtype = torch.float32 if device == "cpu" else DTYPES[bundle.dtype]
    revision = bundle.model.get("revision")
    pipe = load_source_pipeline(
        model_source(bundle, folder), dtype=dtype, revision=revision, transformer=None
    ).to(device)
    pipe.set_progress_bar_config(disable=True)
    made: dict[str, list[Picture]] = {}
    total, done = 3 * len(prompts), itertools.count(1)

    def count(name: str) -> Callable[[], None] | None:
        return progress and (lambda: progress(f"pictures, {name}", next(done), total))

    of_torch = {"transformer": module} if backend == "torch-compile" else {}
    kinds: dict[str, dict[str, Any]] = {
        backend: {"backend": backend, **session} | of_torch,
        "torch": {"backend": "torch", "transformer": module},
        "dense": {"backend": "torch", "transformer": module, "dense": True},
    }
    for name, options in kinds.items():
        attach(pipe, folder, device=device, **options)
        made[name] = generate(pipe, prompts, seed=seed, on_picture=count(name))
        detach(pipe)
    difference = max(
        max_abs_difference(a.latents, b.latents)
        for a, b in zip(made[backend], made["torch"], strict=True)
    )
    tolerance = TOLERANCE[bundle.dtype]
    report: dict[str, Any] = {
        "prompts": len(prompts),
        "seed": seed,
        "max_abs_latent_diff": difference,
        "tolerance": tolerance,
        "passed": difference <= tolerance,
    }
    for name in (backend, "torch"):
        report[f"quality_{name}"] = _quality(made[name], made["dense"], accuracy)
    if accuracy is not None:
        report["accuracy_dense"] = _accuracy(made["dense"], accuracy)
    return report


def picture_quality(a: Any, b: Any) -> tuple[float, float]:
    """Give PSNR in dB (100 for equal pictures) and SSIM of two PIL pictures."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    first, second = np.asarray(a.convert("RGB")), np.asarray(b.convert("RGB"))
    ssim = structural_similarity(first, second, channel_axis=2, data_range=255)
    if np.array_equal(first, second):
        return IDENTICAL_DB, float(ssim)
    return float(peak_signal_noise_ratio(first, second, data_range=255)), float(ssim)


def _quality(
    pictures: list[Picture], dense: list[Picture], accuracy: Accuracy | None
) -> dict[str, Any]:
    pairs = [picture_quality(a.image, b.image) for a, b in zip(pictures, dense, strict=True)]
    quality: dict[str, Any] = {
        "psnr_db": fmean(psnr for psnr, _ in pairs),
        "ssim": fmean(ssim for _, ssim in pairs),
    }
    if accuracy is not None:
        quality["accuracy"] = _accuracy(pictures, accuracy)
    return quality


def _accuracy(pictures: list[Picture], accuracy: Accuracy) -> dict[str, float]:
    return accuracy([p.prompt for p in pictures], [p.image for p in pictures])


def load_accuracy(name: str) -> Accuracy:
    """Import "package.module:function", from the current folder too."""
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ArrowheadError(
            "--accuracy",
            got=f"{name} ({error})",
            expected="package.module:function, a callable (captions, pictures) -> dict of numbers",
            fix="check the spelling and run from the folder that holds the package",
        ) from error


def verify(
    folder: Path | str,
    prompts: Sequence[str] = (),
    *,
    backend: str = "onnxruntime",
    accuracy: Accuracy | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
    **session: Any,
) -> dict[str, Any]:
    """Compare graph by graph and, given prompts, over whole runs; "passed" is the verdict.

    The backend torch-compile is compared over whole runs alone.
    """
    bundle, plan = open_bundle(folder)
    module = load_torch_transformer(bundle, folder).to(device)
    options: dict[str, Any] = {
        "backend": backend,
        "transformer": module,
        "device": device,
        "progress": progress,
        **session,
    }
    # A compiled plan is no graph of the bundle, nor has it its caches: whole runs are compared.
    graphs = [] if backend == "torch-compile" else compare_graphs(folder, **options)
    if not graphs and not prompts:
        raise ArrowheadError(
            f"backend {backend}",
            got="graphs to compare and no prompts",
            expected="prompts: it runs no graph of the bundle",
            fix="pass prompts, and not --graphs-only",
        )
    report: dict[str, Any] = {
        "plan_sha256": plan.sha256,
        "backend": backend,
        "dtype": bundle.dtype,
        "tolerance": TOLERANCE[bundle.dtype],
        "graphs": [asdict(row) for row in graphs],
        "passed": all(row.passed for row in graphs),
    }
    if prompts and report["passed"]:
        report["run"] = compare_runs(folder, prompts, seed=seed, accuracy=accuracy, **options)
        report["passed"] = report["run"]["passed"]
    return report


def describe_failure(report: dict[str, Any], bundle: Bundle) -> str | None:
    """Say in one line what failed; None if nothing did."""
    for row in report["graphs"]:
        if not row["passed"]:
            graph = bundle.dense if row["bucket"] is None else bundle.graph(row["bucket"])
            name = graph.file if graph is not None else "dense"
            return f"{name}: {row['tensor']} is off by {row['max_abs']:.3g} at {row['rows']} rows"
    run = report.get("run")
    if run is not None and not run["passed"]:
        return f"final latents are off by {run['max_abs_latent_diff']:.3g}"
    return None
