"""Verbs that run a bundle: run, bench, verify."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from plans.accounting import account
from trt_runtime.cli_attention import add_attention
from trt_runtime.cli_common import (
    Verbs,
    add_backend,
    add_json,
    add_prompts,
    add_verb,
    make_parent,
    percent,
    progress_bar,
    prompts_of,
    session_of,
    show_table,
    write_json,
)
from trt_runtime.cli_e2e import add_e2e, e2e
from trt_runtime.cli_quality import add_quality
from trt_runtime.cli_triton import add_serve


def add_verbs(verbs: Verbs) -> None:
    _add_run(verbs)
    _add_bench(verbs)
    _add_verify(verbs)


def _add_run(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "run",
        run,
        "make pictures from a bundle, or from a plan in PyTorch",
        '  arrowhead run bundle --prompt "a red circle above a blue square" --output circle.png\n'
        "  arrowhead run bundle --prompts prompts.txt --seed 7 --output pictures/p.png\n"
        '  arrowhead run --plan plan.json --device cuda --prompt "a red circle"',
    )
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE")
    parser.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="a plan in place of BUNDLE, run in PyTorch: torch-compile with --device cuda, else "
        "torch, unless --backend says",
    )
    parser.add_argument("--model", metavar="MODEL", help="checkpoint; default: the plan's own")
    add_prompts(parser)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("picture.png"),
        metavar="FILE",
        help="picture file; several pictures get -0, -1, ... before the suffix",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; then +1 each")
    parser.add_argument(
        "--num-inference-steps",
        type=int,
        metavar="N",
        help="other than the plan's: only with --on-mismatch dense",
    )
    parser.add_argument("--guidance-scale", type=float, metavar="X", help="default: the plan's")
    parser.add_argument(
        "--on-mismatch",
        choices=("error", "dense"),
        default="error",
        help="another sampler than the plan's: refuse (default), or run all heads in full "
        "(a plan of --first-step arrow cannot)",
    )
    add_backend(parser)
    parser.set_defaults(backend=None)  # a plan has another default than a bundle


def _add_bench(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "bench",
        e2e,
        "time pictures, steps or attention alone, or hold quality against what is saved",
        "  arrowhead bench e2e bundle\n"
        "  arrowhead bench e2e --architecture flux.1-dev --cut 0.3 0.5 0.68\n"
        "  arrowhead bench attention --json attention.json\n"
        "  arrowhead bench quality --model my-model --prompts captions.txt --output quality",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for add in (add_attention, add_e2e, add_quality, add_serve):
        add(actions)


def _add_verify(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "verify",
        verify,
        "compare a bundle with PyTorch, graph by graph and over whole runs",
        "  arrowhead verify bundle\n"
        "  arrowhead verify bundle --prompts held_out.txt --num-prompts 8 \\\n"
        "      --accuracy tests.testbed.reader:accuracy --json verify.json",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    add_prompts(parser)
    parser.add_argument("--graphs-only", action="store_true", help="make no pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--accuracy",
        metavar="PACKAGE.MODULE:FUNCTION",
        help="(captions, pictures) -> dict of numbers, for each kind of picture",
    )
    add_backend(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Make pictures and say what a step took and what the plan saved."""
    from trt_runtime.pipeline import generate, load_pipeline

    pipe = load_pipeline(
        arguments.bundle,
        plan=arguments.plan,
        model=arguments.model,
        backend=arguments.backend,
        on_mismatch=arguments.on_mismatch,
        device=arguments.device,
        **session_of(arguments),
    )
    pipe.set_progress_bar_config(disable=True)
    started = time.perf_counter()
    pipe.transformer.prepare()
    if time.perf_counter() - started > 1:
        print(f"prepared in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    prompts = prompts_of(arguments)
    overrides: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in ("num_inference_steps", "guidance_scale")
        if getattr(arguments, name) is not None
    }
    with progress_bar() as progress:
        progress("pictures", 0, len(prompts))
        done = iter(range(1, len(prompts) + 1))
        pictures = generate(
            pipe,
            prompts,
            seed=arguments.seed,
            **overrides,
            on_picture=lambda: progress("pictures", next(done), len(prompts)),
        )
    make_parent(arguments.output)
    for i, picture in enumerate(pictures):
        path = arguments.output
        if len(pictures) > 1:
            path = path.with_stem(f"{path.stem}-{i}")
        picture.image.save(path)
        steps = [spent for _, spent in picture.step_seconds]
        print(f"{path}: {picture.seconds:.2f} s, {sum(steps) / len(steps):.3f} s a step")
    plan = pipe.transformer.plan
    by_bucket = dict(zip(plan.schedule, account(plan, 1)["per_step"], strict=True))
    ran = [bucket for bucket, _ in pictures[0].step_seconds]
    saved = sum(by_bucket[bucket] for bucket in ran) / len(ran)
    print(f"attention saved by the plan: {percent(saved)} over {len(ran)} steps")
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Run the parity gate; 1 if it fails, with the layer that departs first."""
    from trt_runtime.bundles import model_source, open_bundle
    from trt_runtime.verify import load_accuracy
    from trt_runtime.verify import verify as run_gate

    bundle, _ = open_bundle(arguments.bundle)
    accuracy = load_accuracy(arguments.accuracy) if arguments.accuracy else None
    prompts: list[str] = []
    if not arguments.graphs_only:
        prompts = prompts_of(arguments, model_source(bundle, arguments.bundle))
        if not (arguments.prompt or arguments.prompts):
            prompts = prompts[: arguments.num_prompts or 2]
    with progress_bar() as progress:
        report = run_gate(
            arguments.bundle,
            prompts,
            backend=arguments.backend,
            accuracy=accuracy,
            seed=arguments.seed,
            device=arguments.device,
            **session_of(arguments),
            progress=progress,
        )
    return report_parity(arguments.bundle, report, arguments.json)


def report_parity(folder: Path, report: dict[str, Any], json: str | None = None) -> int:
    """Print or write a verify report, with the layer that departs first; 1 if it failed."""
    from trt_runtime.bundles import open_bundle
    from trt_runtime.verify import describe_failure

    report["departs_first"] = _departs_first(folder, report)
    if json:
        write_json(report, json)
    if json != "-":
        _show_parity(report)
    failure = describe_failure(report, open_bundle(folder)[0])
    if failure is not None:
        print(f"failed: {failure}", file=sys.stderr)
        if report["departs_first"]:
            print(f"departs first: {report['departs_first']}", file=sys.stderr)
    return 0 if report["passed"] else 1


def _departs_first(folder: Path, report: dict[str, Any]) -> str | None:
    """Name the first attention module that departs in the first bucket graph that failed."""
    failed = next((row for row in report["graphs"] if not row["passed"]), None)
    if failed is None or failed["bucket"] is None or report["backend"] != "onnxruntime":
        return None
    bucket, rows = failed["bucket"], failed["rows"]
    from exporter.debug import MERGED, exposed_graph
    from trt_runtime.bundles import open_bundle, open_engine
    from trt_runtime.engine import allocate
    from trt_runtime.parity import first_departure

    bundle, _ = open_bundle(folder)
    with (
        exposed_graph(folder, bucket) as graph,
        open_engine(folder, bundle, graph) as engine,
    ):

        def run_graph(feeds: dict[str, Any]) -> dict[str, Any]:
            outputs = allocate(graph.outputs, rows)
            engine.run(feeds, outputs)
            return {n.removeprefix(MERGED): t for n, t in outputs.items() if n.startswith(MERGED)}

        found = first_departure(folder, bucket, run_graph, rows=rows)
    if found is None:
        return "after the last attention module"
    return f"{found[0]}, by {found[1]:.3g}"


def _show_parity(report: dict[str, Any]) -> None:
    """Print the tables of a verify report."""
    rows = [
        (
            "dense" if row["bucket"] is None else f"bucket {row['bucket']}",
            row["rows"],
            row["tensor"],
            f"{row['max_abs']:.2e}",
            f"{row['reference_max']:.3g}",
            "yes" if row["passed"] else "NO",
        )
        for row in report["graphs"]
    ]
    title = (
        f"{report['backend']} against PyTorch, {report['dtype']}, tolerance {report['tolerance']:g}"
    )
    show_table(title, ("graph", "rows", "worst tensor", "max abs", "reference max", "agrees"), rows)
    run_report = report.get("run")
    if run_report is None:
        return
    pictures = []
    for name in (report["backend"], "torch"):
        quality = run_report[f"quality_{name}"]
        pictures.append(
            (
                name,
                f"{quality['psnr_db']:.2f}",
                f"{quality['ssim']:.4f}",
                _numbers(quality.get("accuracy")),
            )
        )
    pictures.append(("dense", "", "", _numbers(run_report.get("accuracy_dense"))))
    title = (
        f"{run_report['prompts']} pictures: final latents of {report['backend']} and torch "
        f"differ by at most {run_report['max_abs_latent_diff']:.2e}"
    )
    show_table(title, ("plan on", "PSNR dB to dense", "SSIM to dense", "accuracy"), pictures)


def _numbers(values: dict[str, Any] | None) -> str:
    if not values:
        return ""
    return ", ".join(f"{k} {v:.4g}" for k, v in values.items() if isinstance(v, int | float))
