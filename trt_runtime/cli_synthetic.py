"""The verb plan synthetic: a plan of chosen heads, for speed and memory alone."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from plans.architectures import ARCHITECTURES, architecture_of
from plans.plan import save_plan
from plans.synthetic import mix_of_cut, parse_mix, synthetic_plan
from trt_runtime.cli_common import Verbs, add_verb, make_parent
from trt_runtime.cli_plan_show import show_plan


def add_synthetic(actions: Verbs) -> None:
    """Add `synthetic` to the actions of plan."""
    parser = add_verb(
        actions,
        "synthetic",
        synthetic,
        "make a plan from chosen numbers of heads, measured on nothing: for speed and memory",
        "  arrowhead plan synthetic --architecture flux.1-dev --cut 0.68 --output flux.json\n"
        "  arrowhead plan synthetic --architecture sd3-medium --height 2048 --width 2048 \\\n"
        "      --mix 7/8x4/9 --full-every 7 --output sd3.json\n"
        "  arrowhead export --plan sd3.json --model my-sd3 --output bundle",
    )
    parser.add_argument(
        "--architecture", required=True, metavar="NAME", help=f"one of {', '.join(ARCHITECTURES)}"
    )
    parser.add_argument("--height", type=int, default=2048, metavar="PIXELS")
    parser.add_argument("--width", type=int, default=2048, metavar="PIXELS")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument(
        "--mix",
        nargs="+",
        default=[],
        metavar="F/A/C",
        help="heads full/arrow/cached in every module, as 7/8x4/9 (half windows of 4 blocks; "
        "V / 32 tokens by default); several share the steps after the first",
    )
    chosen.add_argument(
        "--cut", type=float, metavar="X", help="choose the mix that saves this share of attention"
    )
    parser.add_argument("--num-inference-steps", type=int, default=28, metavar="N")
    parser.add_argument(
        "--full-every",
        type=int,
        default=0,
        metavar="N",
        help="every N-th step is full and fills the caches (default: only the first)",
    )
    parser.add_argument("--block", type=int, default=128, metavar="TOKENS")
    parser.add_argument("--model", help="the checkpoint to name in the plan: folder or hub id")
    parser.add_argument("--seed", type=int, default=0, help="of which head has which mode")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the plan")


def synthetic(arguments: argparse.Namespace) -> int:
    """Write the plan and print what it saves."""
    architecture = architecture_of(arguments.architecture)
    spec = architecture.spec(arguments.height, arguments.width, arguments.block)
    layout, heads = spec.modules[0].layout, spec.modules[0].heads
    mixes = [parse_mix(text, layout, heads) for text in arguments.mix]
    if arguments.cut is not None:
        mixes = [mix_of_cut(arguments.cut, layout, heads)]
    plan = synthetic_plan(
        architecture,
        mixes,
        height=arguments.height,
        width=arguments.width,
        steps=arguments.num_inference_steps,
        block=arguments.block,
        full_every=arguments.full_every,
        seed=arguments.seed,
    )
    if arguments.model is not None:
        source = str(Path(arguments.model).resolve()) if Path(arguments.model).is_dir() else None
        plan = replace(plan, model=replace(plan.model, source=source or arguments.model))
    make_parent(arguments.output)
    save_plan(plan, arguments.output)
    show_plan(plan)
    print(f"plan: {arguments.output}")
    return 0
