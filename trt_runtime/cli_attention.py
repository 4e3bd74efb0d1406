"""The verb bench attention: the kernels alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from trt_runtime.attention_cases import BASELINES, CASES, KERNELS
from trt_runtime.cli_common import (
    Verbs,
    add_json,
    add_verb,
    cache_folder,
    make_parent,
    progress_bar,
    show_table,
    write_json,
)


def add_attention(actions: Verbs) -> None:
    """Add `attention` to the actions of bench."""
    parser = add_verb(
        actions,
        "attention",
        attention,
        "time attention alone on a GPU: the kernel library against what PyTorch has",
        "  arrowhead bench attention\n"
        "  arrowhead bench attention --case flux-2k --implementation arrowhead sdpa-cudnn \\\n"
        "      --launches 400 --json attention.json --plot roofline.png\n"
        "  arrowhead bench attention --price --case flux-2k\n"
        "  arrowhead bench attention --price prices.json --plan plan.json --batch 8",
    )
    parser.add_argument(
        "--case",
        nargs="+",
        choices=CASES,
        default=list(CASES),
        metavar="CASE",
        help=f"some of {', '.join(CASES)} (default: all)",
    )
    parser.add_argument(
        "--implementation",
        nargs="+",
        choices=(*KERNELS, *BASELINES),
        default=["arrowhead", *BASELINES],
        metavar="NAME",
        help=f"some of {', '.join((*KERNELS, *BASELINES))} (default: the kernel the device gets, "
        "and those that are not arrowhead's)",
    )
    parser.add_argument(
        "--launches", type=int, default=200, metavar="N", help="of one round (default 200)"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed (default 5)")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw TFLOP/s over the share of pairs kept"
    )
    parser.add_argument(
        "--price",
        nargs="?",
        const="",
        metavar="FILE",
        help="measure what a head costs in each mode, for `arrowhead plan search --prices`; FILE "
        "is by default one of this GPU and kernel build in the user's cache folder",
    )
    parser.add_argument(
        "--plan",
        type=Path,
        metavar="PLAN",
        help="with --price: the shapes of this plan's modules, in place of --case",
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=1,
        metavar="N",
        help="with --plan: pictures of a transformer call (default 1)",
    )
    add_json(parser)


def _price(arguments: argparse.Namespace) -> int:
    """Measure prices, add them to the file, and print them."""
    from plans.plan import load_plan
    from plans.prices import load_prices, merged, save_prices
    from trt_runtime.bench_price import (
        TABLE,
        measure_prices,
        prices_file,
        shape_of_case,
        shapes_of,
        table,
    )

    path = Path(arguments.price) if arguments.price else prices_file(cache_folder())
    if arguments.plan is not None:
        plan = load_plan(arguments.plan)
        shapes = shapes_of(plan.modules, arguments.batch * (2 if plan.sampler.cfg else 1))
    else:
        shapes = [shape_of_case(CASES[name]) for name in arguments.case]
    with progress_bar() as progress:
        prices = measure_prices(
            shapes, launches=arguments.launches, rounds=arguments.rounds, progress=progress
        )
    if path.is_file():
        prices = merged(load_prices(path), prices)
    save_prices(prices, path)
    show_table(f"{prices.device}, kernels {prices.kernel}: milliseconds", TABLE, table(prices))
    print(f"prices: {path}")
    return 0


def attention(arguments: argparse.Namespace) -> int:
    """Time the cases and print the table."""
    if arguments.price is not None:
        return _price(arguments)
    from trt_runtime.bench_attention import HEADER, draw_roofline, measure_attention, table

    def keep(report: dict[str, Any]) -> None:
        if arguments.json and arguments.json != "-":
            write_json(report, arguments.json)

    with progress_bar() as progress:
        report = measure_attention(
            arguments.case,
            arguments.implementation,
            launches=arguments.launches,
            rounds=arguments.rounds,
            progress=progress,
            keep=keep,
        )
    if arguments.json == "-":
        write_json(report, arguments.json)
    if arguments.plot:
        make_parent(arguments.plot)
        draw_roofline(report["rows"], arguments.plot)
    if arguments.json != "-":
        title = (
            f"{report['device']}, {report['dtype']}: medians of {report['rounds']} rounds of "
            f"{report['launches']} launches"
        )
        show_table(title, HEADER, table(report["rows"]))
    return 0
