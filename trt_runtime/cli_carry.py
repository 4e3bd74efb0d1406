"""The verbs plan carry and plan measure: a plan at another step count or size, and its errors."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from plans.errors import ArrowheadError
from plans.plan import Plan, load_plan, save_plan
from trt_runtime.cli_common import (
    Verbs,
    add_prompts,
    add_verb,
    make_parent,
    percent,
    progress_bar,
    prompts_of,
)
from trt_runtime.cli_plan_show import show_plan
from trt_runtime.cli_search import add_device, add_error_weights, add_sampling

RULE = """
the rule:
  A new step takes the bucket of the plan's step with the nearest sigma, step 0 that of step 0. Half
  windows grow with the picture, rounded outwards, so that window and band cover at least the share
  of the image they covered. The age of a cache is counted in the plan's own steps: where it would
  be older than the plan let it get in its bucket, the bucket computes that head, or the step
  takes another bucket, used before and after it, where none is, or an all-full one: whatever
  saves most. Errors do not carry over: the record says "carried" until they are measured. Another
  architecture, config, module list or scheduler, and CFG switched on or off, are refused. A carried
  plan is exported anew. To fewer steps, where each is a larger one, much may have to be repaired: a
  search there saves more."""


def add_carry(actions: Verbs) -> None:
    parser = add_verb(
        actions,
        "carry",
        carry,
        "carry a plan to another step count, picture size or text length by a stated rule",
        "  arrowhead plan carry plan.json --num-inference-steps 20 --output plan-20.json\n"
        "  arrowhead plan carry plan.json --height 2048 --width 2048 --output plan-2k.json \\\n"
        "      --measure --prompts prompts.txt --device cuda --dtype bf16\n"
        "  arrowhead plan carry plan.json --num-inference-steps 20 --output plan-20.json \\\n"
        f"      --repair --delta 0.3\n{RULE.strip()}",
    )
    parser.add_argument("plan", type=Path, metavar="PLAN")
    add_sampling(parser, of_plan=True)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the plan")
    parser.add_argument(
        "--measure", action="store_true", help="run it on prompts and write its errors on record"
    )
    _add_measuring(parser)


def add_measure(actions: Verbs) -> None:
    parser = add_verb(
        actions,
        "measure",
        measure,
        "run a plan, carried or edited, and write what its heads err on record",
        "  arrowhead plan measure edited.json --prompts prompts.txt --device cuda --dtype bf16\n"
        "  arrowhead plan measure edited.json --repair --delta 0.3 --output repaired.json",
    )
    parser.add_argument("plan", type=Path, metavar="PLAN")
    model = "folder in diffusers' format, or hub id (default: the plan's)"
    parser.add_argument("-m", "--model", help=model)
    parser.add_argument("--revision", metavar="NAME", help="of the hub id")
    add_device(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: PLAN itself")
    _add_measuring(parser)


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--repair",
        action="store_true",
        help="measure, and raise the heads that break the bounds until none does",
    )
    parser.add_argument(
        "--delta", type=float, metavar="X", help="bound of each step and module (default: recorded)"
    )
    parser.add_argument(
        "--cap-factor", type=float, metavar="C", help="a head may err by C * delta / heads"
    )
    add_error_weights(parser, None)
    add_prompts(parser)
    parser.add_argument("--seed", type=int, default=0)
    for name, text in (
        ("rounds", "measurements after which raised heads become full at once"),
        ("prompts-per-run", "prompts in one transformer call"),
        ("sample-tokens", "image tokens of a module that errors are told from"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=text)
    parser.add_argument(
        "--offload",
        choices=("none", "model", "sequential"),
        default="none",
        help="keep weights in host memory, as in plan search",
    )


def carry(arguments: argparse.Namespace) -> int:
    """Carry, measure where asked, save and print."""
    from plans.carry import carry_plan

    plan = load_plan(arguments.plan)
    pipe = _pipeline(plan, arguments)
    carried = carry_plan(plan, _target(plan, pipe, arguments))
    result = carried.plan
    if result.accounting is None:
        from plans.accounting import account

        result = replace(result, accounting=account(result, 2 if result.sampler.cfg else 1))
    if arguments.measure or arguments.repair:
        result = _measured(result, pipe, arguments)
    _save(result, arguments.output)
    show_plan(result)
    print("\n".join([_saving(plan, result), f"plan: {arguments.output}"]))
    return 0


def measure(arguments: argparse.Namespace) -> int:
    """Measure, repair where asked, save and print."""
    plan = load_plan(arguments.plan)
    result = _measured(plan, _pipeline(plan, arguments), arguments)
    target = arguments.output or arguments.plan
    _save(result, target)
    show_plan(result)
    print("\n".join([_saving(plan, result), f"plan: {target}"]))
    return 0


def _saving(before: Plan, after: Plan) -> str:
    from plans.accounting import account

    saved = [percent(account(p, 1)["attention_flops_saved"]) for p in (after, before)]
    return f"attention saved {saved[0]}, before {saved[1]}"


def _save(plan: Plan, target: Path) -> None:
    make_parent(target)
    save_plan(plan, target)


def _pipeline(plan: Plan, arguments: argparse.Namespace) -> Any:
    """Load the checkpoint that --model or the plan names, of the plan's architecture."""
    from plans.carry import check_architecture
    from trt_runtime.cli_models import load_for_planning, source_of
    from trt_runtime.kernels import use_kernels

    if arguments.model is None and arguments.revision is None:
        arguments.revision = plan.model.revision
    arguments.model = source_of(plan, arguments.plan, arguments.model)
    pipe = load_for_planning(arguments)
    check_architecture(plan, type(pipe.transformer).__name__)
    use_kernels(arguments.device, pipe.transformer.dtype)
    return pipe


def _target(plan: Plan, pipe: Any, arguments: argparse.Namespace) -> Plan:
    """The all-full plan of the pipeline as the arguments, and else the plan, would call it."""
    from plans.denoising import Denoising, dense_plan_of
    from trt_runtime.pipeline import pipeline_kwargs

    calls = pipeline_kwargs(plan, pipe)
    given = {name: getattr(arguments, name) for name in calls}
    if given["num_inference_steps"] is not None and given["num_inference_steps"] < 1:
        raise ArrowheadError(
            "--num-inference-steps",
            got=given["num_inference_steps"],
            expected="at least 1",
            fix="give the step count of your deployment",
        )
    calls |= {name: value for name, value in given.items() if value is not None}
    settings = Denoising(["a picture"], steps=calls.pop("num_inference_steps"), seed=0, **calls)
    block = arguments.block or plan.block
    return dense_plan_of(pipe, settings, block, arguments.model, arguments.revision)


def _measured(plan: Plan, pipe: Any, arguments: argparse.Namespace) -> Plan:
    from plans.effort import Wanted
    from plans.search import measure_plan
    from trt_runtime.pipeline import pipeline_kwargs

    with progress_bar() as advance:
        return measure_plan(
            pipe,
            plan,
            prompts_of(arguments, arguments.model),
            repair=arguments.repair,
            delta=arguments.delta,
            cap_factor=arguments.cap_factor,
            error_weights=arguments.error_weights,
            max_sequence_length=pipeline_kwargs(plan, pipe)["max_sequence_length"],
            seed=arguments.seed,
            wanted=Wanted(
                arguments.rounds, arguments.prompts_per_run, None, arguments.sample_tokens
            ),
            announce=print,
            progress=lambda stage, done, total, _: advance(stage, done, total),
        )
