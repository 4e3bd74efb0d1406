"""The verbs plan search and plan buckets: their arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from trt_runtime.cli_common import (
    Verbs,
    add_json,
    add_prompts,
    add_verb,
    cache_folder,
    make_parent,
    percent,
    progress_bar,
    show_table,
    write_json,
)

DIVISORS = (8, 16, 32)
FIRST_STEPS = ("full", "arrow")
ERROR_WEIGHTS = ("head", "output", "stream", "stream-dt", "gradient")


def add_sampling(parser: argparse.ArgumentParser, *, of_plan: bool = False) -> None:
    """Arguments that fix what a plan is for; None leaves the pipeline's own default.

    of_plan: what is not given is a plan's, the model and the block too.
    """
    model = "folder in diffusers' format, or hub id"
    parser.add_argument(
        "-m",
        "--model",
        required=not of_plan,
        help=f"{model} (default: the plan's)" if of_plan else model,
    )
    parser.add_argument("--revision", metavar="NAME", help="of the hub id")
    parser.add_argument("--num-inference-steps", type=int, metavar="N")
    parser.add_argument("--height", type=int, metavar="PIXELS")
    parser.add_argument("--width", type=int, metavar="PIXELS")
    parser.add_argument("--guidance-scale", type=float, metavar="X")
    parser.add_argument("--max-sequence-length", type=int, metavar="T")
    block = "default: the plan's" if of_plan else "default 128"
    parser.add_argument(
        "--block",
        type=int,
        default=None if of_plan else 128,
        metavar="TOKENS",
        help=f"image tokens of a block ({block}; 16 gives 1024 tokens the geometry of 2K)",
    )
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtype", default="fp32", help="of the run: fp32 (default), fp16, bf16")


def add_search(actions: Verbs, run: Callable[[argparse.Namespace], int]) -> None:
    parser = add_verb(
        actions,
        "search",
        run,
        "search a plan for a checkpoint: record a calibration run, choose, measure",
        "  arrowhead plan search --model stabilityai/stable-diffusion-3-medium-diffusers \\\n"
        "      --num-inference-steps 28 --delta 0.2 --device cuda --dtype fp16 --output plan.json\n"
        "  arrowhead plan search --model my-model --candidates cache --prompts prompts.txt \\\n"
        "      --output cache-only.json",
    )
    add_sampling(parser)
    add_prompts(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the plan")
    picture = "picture of the plan (default: beside it, .png)"
    parser.add_argument("--picture", type=Path, metavar="FILE", help=picture)
    _add_bounds(parser)
    parser.add_argument(
        "--candidates",
        nargs="+",
        default=["arrow", "cache"],
        choices=("arrow", "cache"),
        help="what to try beside full attention (default: both)",
    )
    parser.add_argument(
        "--divisors",
        type=int,
        nargs="+",
        default=list(DIVISORS),
        metavar="K",
        help="arrow half windows are V / 2K image tokens (default 8 16 32)",
    )
    parser.add_argument(
        "--method",
        choices=("pooled", "joint", "progressive"),
        default="pooled",
        help="pooled (default): at most --max-buckets graphs, chosen together with their schedule, "
        "with --delta the bound of the errors' mean over all steps and modules; joint: as pooled, "
        "with --delta the bound of each; progressive: DiTFastAttnV2's own search, step by step, a "
        "graph for each step",
    )
    add_error_weights(parser)
    graphs = "graphs at most, but for progressive (default 4)"
    parser.add_argument("--max-buckets", type=int, default=4, metavar="K", help=graphs)
    parser.add_argument(
        "--first-step",
        choices=FIRST_STEPS,
        default="full",
        help="heads of the first step: full (default), or arrows too, which few graphs save more "
        "with; without a full graph such a plan cannot run with --on-mismatch dense",
    )
    parser.add_argument("--seed", type=int, default=0)
    _add_prices(parser)
    _add_effort(parser)


def _add_bounds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--delta",
        type=float,
        default=0.2,
        metavar="X",
        help="bound on the errors, see --method (default 0.2): more saves more",
    )
    parser.add_argument(
        "--cap-factor",
        type=float,
        default=1.5,
        metavar="C",
        help="not pooled, a head may err by C * delta / heads (default 1.5)",
    )


def add_error_weights(parser: argparse.ArgumentParser, default: str | None = "head") -> None:
    """Argument that says what errors are multiplied by; without a default it is a plan's own."""
    parser.add_argument(
        "--error-weights",
        choices=ERROR_WEIGHTS,
        default=default,
        help="what a head's error counts: head (default), alike for all; output: by its share of "
        "what its module adds to the residual stream; stream: by how much of the stream that is; "
        "stream-dt: by that and the step's sigma difference; gradient: by how much the prediction "
        "moves with it, which takes a backward pass a step of one run"
        + ("" if default else " (default: recorded)"),
    )


def _add_prices(parser: argparse.ArgumentParser) -> None:
    """Arguments that say what counts as saved."""
    parser.add_argument(
        "--prices",
        nargs="?",
        const="",
        metavar="FILE",
        help="save milliseconds, as `arrowhead bench attention --price` measured them (default "
        "FILE: this GPU's), and use no mode that is not faster than full (default: save pairs)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=1,
        metavar="N",
        help="pictures of the transformer call that --prices are for (default 1)",
    )


def _add_effort(parser: argparse.ArgumentParser) -> None:
    """Arguments that say how much is run, and where."""
    parser.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help="runs with a plan, after the recorded one, at most (default: small models 6; large "
        "ones as many as fit into 1.35 plain runs a prompt)",
    )
    parser.add_argument(
        "--prompts-per-run",
        type=int,
        metavar="N",
        help="prompts in one transformer call (default: small models all, large ones 1: each "
        "prompt then runs with the plan found so far)",
    )
    parser.add_argument(
        "--final-check",
        action=argparse.BooleanOptionalAction,
        help="run the plan on all prompts, again and again, until its errors are within the bounds "
        "(default for small models); without it heads that were over are raised by what the last "
        "run tells, and the plan's record calls its errors predicted",
    )
    parser.add_argument(
        "--sample-tokens",
        type=int,
        metavar="N",
        help="image tokens of a module that errors are told from (default 2048): fewer take less "
        "memory",
    )
    parser.add_argument(
        "--offload",
        choices=("none", "model", "sequential"),
        default="none",
        help="keep weights in host memory and move them to the GPU a model, or a layer, at a time: "
        "a 24 GB card holds what FLUX.1-dev needs besides only with sequential",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="take up the finished runs of the same search that was cut off",
    )
    parser.add_argument(
        "--tables",
        type=Path,
        metavar="FILE",
        help="keep what was recorded for plan buckets: a .npz",
    )


def search_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Give search_plan's arguments, but for the sampling."""
    from plans.effort import Wanted
    from plans.prices import load_prices
    from plans.tables import save_tables
    from trt_runtime.bench_price import prices_file

    prices = None
    if arguments.prices is not None:
        named = Path(arguments.prices) if arguments.prices else prices_file(cache_folder())
        prices = replace(load_prices(named), batch=arguments.batch)
    tables = arguments.tables
    if tables is not None:
        make_parent(tables)
    return dict(
        delta=arguments.delta,
        cap_factor=arguments.cap_factor,
        divisors=tuple(arguments.divisors),
        candidates=tuple(arguments.candidates),
        block=arguments.block,
        method=arguments.method,
        max_buckets=arguments.max_buckets,
        first_step=arguments.first_step,
        seed=arguments.seed,
        source=arguments.model,
        revision=arguments.revision,
        wanted=Wanted(
            arguments.rounds,
            arguments.prompts_per_run,
            arguments.final_check,
            arguments.sample_tokens,
        ),
        prices=prices,
        error_weights=arguments.error_weights,
        scratch=cache_folder() / "search",
        resume=arguments.resume,
        keep_tables=None if tables is None else lambda found: save_tables(found, tables),
    )


def add_buckets(actions: Verbs) -> None:
    parser = add_verb(
        actions,
        "buckets",
        buckets,
        "tell what fewer graphs lose, from the errors a search recorded",
        "  arrowhead plan buckets recorded.npz\n"
        "  arrowhead plan buckets recorded.npz --delta 0.4 --max-buckets 2 4 8\n"
        "recorded.npz comes from:\n"
        "  arrowhead plan search --model my-model --tables recorded.npz --output plan.json",
    )
    parser.add_argument("tables", type=Path, metavar="TABLES")
    _add_bounds(parser)
    parser.add_argument(
        "--method",
        choices=("pooled", "joint"),
        default="pooled",
        help="what --delta bounds, as in `plan search` (default pooled)",
    )
    parser.add_argument(
        "--max-buckets",
        type=int,
        nargs="+",
        default=list(range(2, 9)),
        metavar="K",
        help="numbers of graphs (default 2 to 8)",
    )
    parser.add_argument(
        "--first-step",
        nargs="+",
        choices=FIRST_STEPS,
        default=list(FIRST_STEPS),
        help="rules for the heads of the first step, a table each (default: both)",
    )
    add_json(parser)


def buckets(arguments: argparse.Namespace) -> int:
    """Choose for every number of graphs; compare with what a graph a step could save at most."""
    from plans.optimum import compare_buckets
    from plans.tables import load_tables

    tables = load_tables(arguments.tables)
    with progress_bar() as advance:
        report = compare_buckets(
            tables, arguments.delta, arguments.cap_factor, arguments.max_buckets,
            arguments.first_step, advance, arguments.method,
        )  # fmt: skip
    if arguments.json:
        write_json(report, arguments.json)
    if arguments.json != "-":
        for curve in report["curves"]:
            _show_curve(curve, arguments.delta)
    return 0


def _show_curve(curve: dict[str, Any], delta: float) -> None:
    rows = [
        (r["max_buckets"], percent(r["saved"]), percent(r["loss_of_reached"]),
         percent(r["loss"]), f"{r['seconds']:.1f}",
         " ".join(map(str, r["schedule"])))
        for r in curve["rows"]
    ]  # fmt: skip
    title = (
        f"first step {curve['first_step']}: predicted saving, delta {delta:g}; a graph for each "
        f"step: {percent(curve['reached'])} reached, at most {percent(curve['bound'])}"
    )
    show_table(title, ("graphs", "saved", "lost of reached", "of most", "s", "schedule"), rows)
