"""The verb bench e2e: pictures from a bundle, or steps of a real architecture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plans.architectures import ARCHITECTURES, Architecture, architecture_of
from plans.errors import ArrowheadError
from plans.synthetic import Mix, mix_of_cut, parse_mix
from trt_runtime.cli_common import (
    Verbs,
    add_backend,
    add_json,
    add_prompts,
    add_verb,
    bytes_text,
    make_parent,
    percent,
    progress_bar,
    prompts_of,
    session_of,
    show_table,
    write_json,
)

DENSE = "dense"


def add_e2e(actions: Verbs) -> None:
    """Add `e2e` to the actions of bench."""
    parser = add_verb(
        actions,
        "e2e",
        e2e,
        "time pictures of a bundle with the plan against the stock dense graph, or steps of a "
        "real architecture with random weights",
        "  arrowhead bench e2e bundle\n"
        "  arrowhead bench e2e bundle --repeats 5 --threads 1 --profile --json bench.json\n"
        "  arrowhead bench e2e --architecture flux.1-dev --height 2048 --width 2048 \\\n"
        "      --mix 6/12x4/6 8/0/16 dense --baseline eager torch.compile --json flux.json\n"
        "  arrowhead bench e2e --architecture sd3-medium --cut 0.3 0.5 0.68 --profile \\\n"
        "      --plot sd3.png\n"
        "  arrowhead bench e2e --architecture flux.1-dev --mix 6/12x4/6+8/10x4/6 --loop\n"
        "  arrowhead bench e2e --architecture sd3-medium --no-full-step \\\n"
        "      --mix 7/8x4/9:onnxruntime 7/8x4/9 dense:onnxruntime",
    )
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE")
    add_prompts(parser)
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds (default 3)")
    parser.add_argument("--num-warmup-runs", type=int, default=1, help="untimed rounds (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--profile",
        action="store_true",
        help="seconds per operator type too; with --architecture milliseconds by class of kernel",
    )
    add_backend(parser)
    add_json(parser)
    _add_steps(parser)


def _add_steps(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "steps of a real architecture",
        "random weights, synthetic plans, in place of BUNDLE; on a GPU where there is one",
    )
    group.add_argument("--architecture", metavar="NAME", help=f"one of {', '.join(ARCHITECTURES)}")
    group.add_argument("--height", type=int, default=2048, metavar="PIXELS")
    group.add_argument("--width", type=int, default=2048, metavar="PIXELS")
    group.add_argument(
        "--mix",
        nargs="+",
        default=[],
        metavar="F/A/C",
        help="heads full/arrow/cached in every module, as 6/12x4/6 (half windows of 4 blocks; "
        "V / 32 tokens by default), or dense; joined by + they are buckets of one plan; "
        "6/12x4/6:torch takes that variant alone",
    )
    group.add_argument(
        "--cut", nargs="+", type=float, default=[], metavar="X", help="mixes by attention saved"
    )
    group.add_argument(
        "--variant",
        nargs="+",
        default=["torch-compile"],
        metavar="NAME",
        help="how the plan is run: torch, torch-compile (default), torch-compile-whole, "
        "-unpruned (one graph whose modes are an input), -copies (of each bucket's weights), "
        "-plain-gelu, -no-graph; onnxruntime, whose graphs are exported for it",
    )
    group.add_argument(
        "--baseline",
        nargs="*",
        default=["eager", "torch.compile"],
        metavar="NAME",
        help="eager, torch.compile, torch.compile-blocks, torch.compile-max-autotune",
    )
    group.add_argument("--depth", type=int, metavar="N", help="at most N blocks of each kind")
    group.add_argument("--block", type=int, default=128, metavar="TOKENS")
    group.add_argument("--steps-per-round", type=int, default=3, metavar="N")
    group.add_argument("--no-full-step", action="store_true", help="time no step that fills caches")
    group.add_argument(
        "--loop",
        action="store_true",
        help="whole pictures too: all 28 steps in their order, text encoders and VAE",
    )
    group.add_argument("--dtype", default=None, help="bf16 (default on a GPU), fp16 or fp32")
    group.add_argument(
        "--folder", type=Path, metavar="DIR",
        help="for onnxruntime's graphs and weights while its row is timed (default: the system's)",
    )  # fmt: skip
    group.add_argument("--plot", type=Path, metavar="FILE", help="draw where a step's time goes")


def e2e(arguments: argparse.Namespace) -> int:
    """Time a bundle's pictures, or an architecture's steps."""
    if (arguments.bundle is None) == (arguments.architecture is None):
        raise ArrowheadError(
            "bench e2e",
            got="both a bundle and --architecture" if arguments.bundle else "nothing to time",
            expected="a bundle folder, or --architecture",
            fix="pass one of the two",
        )
    return _pictures(arguments) if arguments.architecture is None else _steps(arguments)


def _steps(arguments: argparse.Namespace) -> int:
    import torch

    from trt_runtime.bench_steps import measure_steps
    from trt_runtime.cli_common import dtype_of
    from trt_runtime.cli_graphs import graph_settings
    from trt_runtime.engine import DTYPES
    from trt_runtime.picture_parts import parts_of
    from trt_runtime.step_runners import Settings

    on_gpu = arguments.device.startswith("cuda") or torch.cuda.is_available()
    device = "cuda" if on_gpu and arguments.device == "cpu" else arguments.device
    dtype = arguments.dtype or ("bf16" if on_gpu else "fp32")
    architecture = architecture_of(arguments.architecture)
    parts = parts_of(architecture) if arguments.loop else None
    if arguments.depth is not None:
        architecture = architecture.of_depth(arguments.depth)
        parts = parts and parts.of_depth(arguments.depth)
    rows = _rows(architecture, arguments)
    settings = Settings(
        height=arguments.height,
        width=arguments.width,
        baselines=arguments.baseline,
        device=device,
        dtype=DTYPES[dtype_of(dtype)],
        block=arguments.block,
        rounds=arguments.repeats,
        repeats=arguments.steps_per_round,
        full_step=not arguments.no_full_step,
        loop=arguments.loop,
        parts=parts,
        profile=arguments.profile or arguments.plot is not None,
    )

    def row_done(report: dict[str, Any]) -> None:
        if arguments.json and arguments.json != "-":
            write_json(report, arguments.json)

    report = measure_steps(
        architecture,
        rows,
        settings,
        graphs=graph_settings(architecture, rows, settings, arguments.folder),
        log=lambda line: print(line, file=sys.stderr, flush=True),
        row_done=row_done,
    )
    if arguments.json:
        write_json(report, arguments.json)
    if arguments.plot is not None:
        from trt_runtime.step_profile import draw_classes

        make_parent(arguments.plot)
        draw_classes([*report["baselines"], *report["rows"]], arguments.plot)
    if arguments.json != "-":
        show_steps(report)
    return 1 if report["failures"] else 0


def _rows(
    architecture: Architecture, arguments: argparse.Namespace
) -> list[tuple[str, tuple[Mix, ...]]]:
    """Give (variant, mixes) of every row, in the order of the arguments."""
    from trt_runtime.step_runners import BASELINES, VARIANTS

    spec = architecture.spec(arguments.height, arguments.width, arguments.block)
    layout, heads = spec.modules[0].layout, spec.modules[0].heads
    plans: list[tuple[list[str], tuple[Mix, ...]]] = []
    for text in arguments.mix:
        joined, _, variant = text.partition(":")
        mixes = [] if joined == DENSE else joined.split("+")
        variants = [variant] if variant else arguments.variant
        plans.append((variants, tuple(parse_mix(mix, layout, heads) for mix in mixes)))
    cuts = arguments.cut or ([] if plans else [0.68])
    plans += [(arguments.variant, (mix_of_cut(cut, layout, heads),)) for cut in cuts]
    rows = [(variant, mixes) for variants, mixes in plans for variant in variants]
    _check_names("--variant", [variant for variant, _ in rows], VARIANTS)
    _check_names("--baseline", arguments.baseline, BASELINES)
    return rows


def _check_names(option: str, given: Sequence[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise ArrowheadError(
                option, got=name, expected=f"some of {', '.join(known)}", fix="pass one of them"
            )


def show_steps(report: dict[str, Any]) -> None:
    """Print the rows: baselines first, then every mix, with what it gains on each baseline."""
    names = [row["backend"] for row in report["baselines"]]
    rows = [(row["backend"], DENSE, "", *_cells(row), *("" for _ in names))
            for row in report["baselines"]]  # fmt: skip
    for row in report["rows"]:
        gains = [f"{row['baselines_ms'][name] / row['ms']:.2f}x" for name in names]
        saved = percent(row["share_saved"])
        rows.append((row["backend"], row["mix"], saved, *_cells(row), *gains))
    first = (report["rows"] or report["baselines"] or [None])[0]
    subject = "" if first is None else f"{first['architecture']} {first['height']}x{first['width']}"
    show_table(
        f"{subject}, {report['dtype']}, {report['device']}: medians of {report['rounds']} rounds; "
        "random weights and synthetic plans, which say nothing of quality; 28 and 50 steps are "
        "those of the transformer alone",
        ("runs on", "heads", "saved", "ms a step", "full step", "28 steps s", "50 steps s",
         "picture", "host ms", "peak", "caches", "ready, s", *(f"x {name}" for name in names)),
        rows,
    )  # fmt: skip
    if report["rows"]:
        _show_weights(report["rows"])
    if report.get("parts"):
        _show_parts(report["parts"])
    for failure in report["failures"]:
        print(f"failed: {failure['row']}: {failure['error'].splitlines()[0]}", file=sys.stderr)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    full = row.get("full_step_ms")
    pictures = row.get("picture_seconds") or {
        n: int(n) * row["ms"] / 1000 for n in ("28", "50")
    }  # a baseline's steps are all alike
    return (
        f"{row['ms']:.1f}",
        "" if full is None else f"{full:.1f}",
        *("" if pictures[n] is None else f"{pictures[n]:.2f}" for n in ("28", "50")),
        _picture_cell(row),
        f"{row['host_ms']:.2f}",
        bytes_text(row["peak_bytes"]),
        bytes_text(row["cache_bytes"]) if row["cache_bytes"] else "",
        f"{row['prepare_seconds']:.0f}",
    )


def _picture_cell(row: dict[str, Any]) -> str:
    ms = row.get("picture_ms")
    return "" if ms is None else f"{ms['total'] / 1000:.2f}"


def _show_weights(rows: Sequence[dict[str, Any]]) -> None:
    cells = []
    for row in rows:
        sizes = (row["weight_bytes"], row["copied_weight_bytes"], max(row["grown_device_bytes"], 0))
        weights, copied, grown = map(bytes_text, sizes)
        ratios = (row["weights_ratio"], row["measured_weights_ratio"])
        told = ("" if ratio is None else f"{ratio:.3f}x" for ratio in ratios)
        cells.append((row["backend"], row["mix"], weights, copied, *told, grown))
    columns = ("runs on", "heads", "weights", "copied", "in all", "on the device", "grown")
    show_table("weights of all buckets, and what the timed steps took for good", columns, cells)


def _show_parts(parts: dict[str, Any]) -> None:
    rows = [("text", name, f"{ms:.1f}") for name, ms in parts["encoders_ms"].items()]
    rows += [("VAE", name, f"{ms:.1f}") for name, ms in parts["vae_ms"].items()]
    show_table("a picture beside its steps, uncompiled", ("part", "", "ms"), rows)


def _pictures(arguments: argparse.Namespace) -> int:
    """Time dense and plan in turns."""
    from trt_runtime.bench import end_to_end
    from trt_runtime.bundles import model_source, open_bundle

    bundle, _ = open_bundle(arguments.bundle)
    prompts = prompts_of(arguments, model_source(bundle, arguments.bundle))
    with progress_bar() as progress:
        report = end_to_end(
            arguments.bundle,
            prompts,
            backend=arguments.backend,
            device=arguments.device,
            **session_of(arguments),
            repeats=arguments.repeats,
            warmup=arguments.num_warmup_runs,
            seed=arguments.seed,
            profile=arguments.profile,
            progress=progress,
        )
    if arguments.json:
        write_json(report, arguments.json)
    if arguments.json != "-":
        _show_bench(report)
    return 0


def _show_bench(report: dict[str, Any]) -> None:
    if "operators" in report:
        dense, plan = report["operators"]["dense"], report["operators"]["plan"]
        kinds = sorted(
            {*dense, *plan}, key=lambda kind: -max(dense.get(kind, 0), plan.get(kind, 0))
        )
        seconds = [(k, f"{dense.get(k, 0):.3f}", f"{plan.get(k, 0):.3f}") for k in kinds[:15]]
        show_table("seconds in operators, one call", ("operator", "dense", "plan"), seconds)
    rows: list[tuple[Any, ...]] = [
        ("picture", "", *_pair(report, "seconds"), f"{report['speedup']:.2f}x"),
        (
            "transformer",
            report["steps"],
            *_pair(report, "transformer_seconds"),
            f"{report['transformer_speedup']:.2f}x",
        ),
    ]
    dense_step = report["dense"]["step_seconds"]["0"]
    for bucket, spent in report["plan"]["step_seconds"].items():
        count = report["plan"]["step_counts"][bucket]
        rows.append(
            (
                f"step of bucket {bucket}",
                count,
                f"{dense_step:.4f}",
                f"{spent:.4f}",
                f"{dense_step / spent:.2f}x",
            )
        )
    title = (
        f"{report['backend']} ({report['attention']}), {report['dtype']}, {report['device']}: "
        f"medians of {report['repeats']}, seconds"
    )
    show_table(title, ("", "steps", "dense", "plan", "speed-up"), rows)


def _pair(report: dict[str, Any], key: str) -> tuple[str, str]:
    return f"{report['dense'][key]:.3f}", f"{report['plan'][key]:.3f}"
