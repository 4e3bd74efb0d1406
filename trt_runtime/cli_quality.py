"""The verb bench quality: what saving costs in quality, as a curve."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from plans.errors import ArrowheadError
from plans.prices import Prices
from trt_runtime.cli_common import (
    Verbs,
    add_verb,
    cache_folder,
    progress_bar,
    prompts_of,
    show_table,
)
from trt_runtime.quality_settings import DELTAS, THRESHOLDS, VARIANTS, Settings


def add_quality(actions: Verbs) -> None:
    """Add `quality` to the actions of bench."""
    parser = add_verb(
        actions,
        "quality",
        quality,
        "draw captions with plans of several kinds, fewer steps, step caches, and uncompressed",
        "  arrowhead bench quality --model tests/testbed/tiny-sd3 --block 16 \\\n"
        "      --prompts tests.testbed.evaluate:held_out_captions --num-prompts 500 --seeds 2 \\\n"
        "      --accuracy tests.testbed.reader:score --num-inference-steps 16 \\\n"
        "      --guidance-scale 3 --max-sequence-length 49 --device cuda --batch 125 \\\n"
        "      --output build/quality/tiny-sd3\n"
        "  arrowhead bench quality --model my-model --prompts captions.txt --output quality \\\n"
        "      --variants both steps --deltas 0.1 0.3 --resume",
    )
    _add_inputs(parser)
    _add_sampling(parser)
    _add_rows(parser)


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m", "--model", required=True, help="folder in diffusers' format, or hub id"
    )
    parser.add_argument("--revision", metavar="NAME", help="of the hub id")
    parser.add_argument(
        "--prompts",
        required=True,
        metavar="FILE",
        help="captions to draw, one a line, or PACKAGE.MODULE:FUNCTION, which is given "
        "--num-prompts and returns as many",
    )
    parser.add_argument("--num-prompts", type=int, metavar="N", help="draw only the first N")
    parser.add_argument(
        "--calibration-prompts",
        type=Path,
        metavar="FILE",
        help="what plans are searched on (default: the model's calibration_prompts.txt)",
    )
    parser.add_argument(
        "--num-calibration-prompts", type=int, metavar="N", help="use only the first N"
    )
    parser.add_argument(
        "--accuracy",
        metavar="PACKAGE.MODULE:FUNCTION",
        help='(captions, PIL pictures) -> dict of numbers, one of them "accuracy"; asked where '
        "there are no verdicts",
    )
    parser.add_argument(
        "--verdicts",
        metavar="PACKAGE.MODULE:FUNCTION",
        help="(captions, pictures [n, 3, height, width] in -1..1) -> per caption a list of "
        "booleans, one a fact; for the paired interval (default: `verdicts` beside --accuracy)",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="results, plans and page"
    )
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument(
        "--limit-minutes", type=float, metavar="X", help="begin no row after that time"
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-inference-steps", type=int, metavar="N")
    parser.add_argument("--guidance-scale", type=float, metavar="X")
    size = "the size the model was trained at (default: the pipeline's, for FLUX 128 latents)"
    parser.add_argument("--height", type=int, metavar="PIXELS", help=size)
    parser.add_argument("--width", type=int, metavar="PIXELS", help="likewise")
    parser.add_argument("--max-sequence-length", type=int, metavar="T")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="pictures of one call")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; then +1 each")
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="pictures of each caption (default 1)"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--dtype", default="fp32", help="fp32 (default; on a GPU with TF32 products), fp16, bf16"
    )


def _add_rows(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--block",
        type=int,
        default=128,
        metavar="TOKENS",
        help="image tokens of a block (default 128; 16 gives 1024 tokens the geometry of 2K)",
    )
    parser.add_argument(
        "--deltas",
        type=float,
        nargs="+",
        default=list(DELTAS),
        metavar="X",
        help="bounds to search with (default 0.05 0.1 0.2 0.4 0.8)",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        default=list(VARIANTS),
        choices=list(VARIANTS),
        metavar="NAME",
        help="kinds of row, of: " + "; ".join(f"{n}: {v.label}" for n, v in VARIANTS.items()),
    )
    parser.add_argument(
        "--searches", type=int, default=1, metavar="N",
        help="plans of each bound, each searched with other noise, to see them differ (default 1)",
    )  # fmt: skip
    parser.add_argument(
        "--fewer-steps",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="step counts of `steps` and `fewer` (default: 7/8, 3/4, 5/8, 1/2, 3/8 of all)",
    )
    parser.add_argument(
        "--thresholds", type=float, nargs="+", default=list(THRESHOLDS), metavar="X",
        help="of the step caches (default 0.05 0.1 0.2 0.4 0.8)",
    )  # fmt: skip
    parser.add_argument(
        "--stacked-deltas", type=float, nargs="+", default=[], metavar="X",
        help="bounds of the plans of `stacked` and `fewer` (default: the middle one of --deltas)",
    )  # fmt: skip
    parser.add_argument(
        "--prices",
        nargs="?",
        const="",
        metavar="FILE",
        help="for `priced`, `stacked` and `fewer`: they save milliseconds of calls of --batch "
        "pictures, as FILE says (default: this GPU's); shapes it lacks are measured first",
    )
    parser.add_argument(
        "--max-buckets", "--buckets", type=int, default=6, metavar="K",
        help="graphs of a plan at most (default 6)",
    )  # fmt: skip


def quality(arguments: argparse.Namespace) -> int:
    """Make the missing rows, write the page and print the table."""
    import torch

    from trt_runtime.cli_models import load_for_planning
    from trt_runtime.quality import measure_quality
    from trt_runtime.quality_page import write_all
    from trt_runtime.quality_report import HEADER, table
    from trt_runtime.verify import load_accuracy

    captions = _captions(arguments)
    accuracy = load_accuracy(arguments.accuracy) if arguments.accuracy else None
    verdicts = _verdicts(arguments)
    if arguments.device.startswith("cuda") and arguments.dtype == "fp32":
        torch.set_float32_matmul_precision("high")
    pipe = load_for_planning(arguments)
    settings = _settings(pipe, captions, arguments)
    with progress_bar() as progress:
        report = measure_quality(
            pipe,
            settings,
            arguments.output,
            accuracy=accuracy,
            verdicts=verdicts,
            resume=arguments.resume,
            limit_seconds=arguments.limit_minutes and 60 * arguments.limit_minutes,
            progress=progress if sys.stderr.isatty() else _row_lines(),
        )
    files = write_all(report, arguments.output)
    what = (
        f"{len(captions)} captions x {settings.seeds} seeds, {settings.height} x {settings.width}, "
        f"{settings.steps} steps, "
        f"{report['settings']['device']}, {report['settings']['dtype']}"
    )
    show_table(what, HEADER, table(report))
    for name, why in report["skipped"].items():
        print(f"skipped {name}: {why}")
    print(*files, sep=", ")
    return 0


def _row_lines() -> Callable[[str, int, int], None]:
    """Give a progress report for logs: a line on stderr when a row begins."""
    begin, shown = time.perf_counter(), -1

    def report(what: str, done: int, total: int) -> None:
        nonlocal shown
        if done > shown:
            shown = done
            name = what.partition(":")[0]
            seconds = time.perf_counter() - begin
            print(f"{seconds:6.1f} s  {done}/{total}  {name}", file=sys.stderr, flush=True)

    return report


def _settings(pipe: Any, captions: list[str], arguments: argparse.Namespace) -> Settings:
    from trt_runtime.cli_models import sampling_of

    calibration = argparse.Namespace(
        prompt=None,
        prompts=arguments.calibration_prompts,
        num_prompts=arguments.num_calibration_prompts,
    )
    return Settings(
        captions=tuple(captions),
        calibration=tuple(prompts_of(calibration, arguments.model)),
        **sampling_of(pipe, arguments),
        block=arguments.block,
        max_buckets=arguments.max_buckets,
        deltas=tuple(arguments.deltas),
        variants=tuple(arguments.variants),
        searches=arguments.searches,
        fewer_steps=tuple(arguments.fewer_steps),
        thresholds=tuple(arguments.thresholds),
        stacked_deltas=tuple(arguments.stacked_deltas),
        prices=_prices(pipe, arguments),
        batch=arguments.batch,
        seed=arguments.seed,
        seeds=arguments.seeds,
        source=arguments.model,
        revision=arguments.revision,
    )


def _prices(pipe: Any, arguments: argparse.Namespace) -> Prices | None:
    """Load the prices, and measure those that are missing."""
    if arguments.prices is None:
        return None
    from trt_runtime.bench_price import complete, prices_file, shapes_of
    from trt_runtime.cli_models import bare_plan

    bare = bare_plan(pipe, arguments)
    rows = arguments.batch * (2 if bare.sampler.cfg else 1)
    path = Path(arguments.prices) if arguments.prices else prices_file(cache_folder())
    return replace(complete(path, shapes_of(bare.modules, rows)), batch=arguments.batch)


def _captions(arguments: argparse.Namespace) -> list[str]:
    name = arguments.prompts
    if ":" in name and not Path(name).exists():
        make = load_callable("--prompts", name, "a callable (count) -> captions")
        return list(make(arguments.num_prompts or 500))
    file = argparse.Namespace(prompt=None, prompts=Path(name), num_prompts=arguments.num_prompts)
    return prompts_of(file)


def _verdicts(arguments: argparse.Namespace) -> Any:
    if arguments.verdicts:
        return load_callable(
            "--verdicts", arguments.verdicts, "a callable (captions, pictures) -> lists of booleans"
        )
    if not arguments.accuracy:
        return None
    return getattr(sys.modules[arguments.accuracy.partition(":")[0]], "verdicts", None)


def load_callable(option: str, name: str, expected: str) -> Callable[..., Any]:
    """Import "package.module:function", from the current folder too."""
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ArrowheadError(
            option,
            got=f"{name} ({error})",
            expected=f"package.module:function, {expected}",
            fix="check the spelling and run from the folder that holds the package",
        ) from error
