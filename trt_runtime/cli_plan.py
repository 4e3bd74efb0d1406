"""The verb plan: search, carry, measure, synthetic, show, diff, edit, import, check."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from plans.accounting import account
from plans.plan import Plan, check_plan, load_plan, save_plan
from trt_runtime.cli_carry import add_carry, add_measure
from trt_runtime.cli_common import (
    Verbs,
    add_verb,
    make_parent,
    percent,
    progress_bar,
    prompts_of,
)
from trt_runtime.cli_plan_show import rows_of, show_plan
from trt_runtime.cli_search import add_buckets, add_sampling, add_search, search_options
from trt_runtime.cli_synthetic import add_synthetic
from trt_runtime.plan_text import apply_edits, differences, own_buckets, parse_edit, parse_steps


def add_verbs(verbs: Verbs) -> None:
    parser = verbs.add_parser("plan", help="search, carry, measure, show, edit and check plans")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    add_search(actions, search)
    add_buckets(actions)
    add_carry(actions)
    add_measure(actions)
    _add_import(actions)
    add_synthetic(actions)
    show_parser = add_verb(
        actions,
        "show",
        show,
        "show a plan: modes by bucket and module, and what it saves",
        "  arrowhead plan show plan.json\n  arrowhead plan show plan.json --picture plan.png",
    )
    show_parser.add_argument("plan", type=Path, metavar="PLAN")
    show_parser.add_argument("--picture", type=Path, metavar="FILE", help="draw it, too")
    show_parser.add_argument(
        "--heads", action="store_true", help="each head's mode, however many there are"
    )
    parser = add_verb(
        actions,
        "diff",
        diff,
        "list what differs between two plans, per step, module and head; plans of other step "
        "counts are compared at the nearest sigmas",
        "  arrowhead plan diff before.json after.json",
    )
    parser.add_argument("first", type=Path, metavar="PLAN")
    parser.add_argument("second", type=Path, metavar="OTHER")
    _add_edit(actions)
    _add_check(actions)


def _add_edit(actions: Verbs) -> None:
    parser = add_verb(
        actions,
        "edit",
        edit,
        "set modes by hand; the result is checked and accounted anew",
        "  arrowhead plan edit plan.json --bucket 1 --output edited.json \\\n"
        "      --set transformer_blocks.3.attn:0,2-4=cached --set 'transformer_blocks.*:all=full'\n"
        "  arrowhead plan edit plan.json --steps 7-9 --set '*:0=full' --output edited.json\n"
        "what an edited plan errs:\n"
        "  arrowhead plan measure edited.json",
    )
    parser.add_argument("plan", type=Path, metavar="PLAN")
    parser.add_argument(
        "--set",
        action="append",
        required=True,
        metavar="MODULE:HEADS=MODE",
        help="MODULE may be a pattern; HEADS all, or as 0,2-4; MODE full, cached or a half "
        "window in blocks",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--bucket", type=int, nargs="+", metavar="I", help="of these buckets")
    where.add_argument(
        "--steps", metavar="STEPS", help="of these steps, as 3,7-9: they get buckets of their own"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: PLAN itself")


def _add_check(actions: Verbs) -> None:
    parser = add_verb(
        actions,
        "check",
        check,
        "check a plan by itself and, with --model, against a checkpoint",
        "  arrowhead plan check plan.json\n"
        "  arrowhead plan check plan.json --model stabilityai/stable-diffusion-3-medium-diffusers",
    )
    parser.add_argument("plan", type=Path, metavar="PLAN")
    parser.add_argument("-m", "--model", help="folder in diffusers' format, or hub id")
    parser.add_argument("--revision", metavar="NAME", help="of the hub id")


def _add_import(actions: Verbs) -> None:
    parser = add_verb(
        actions,
        "import",
        import_,
        "translate a plan of the DiTFastAttnV2 reference (two pickles, read without running code)",
        "  arrowhead plan import head_option.pkl outputshare.pkl --model my-model \\\n"
        "      --num-inference-steps 28 --output plan.json",
    )
    parser.add_argument("head_options", type=Path, metavar="HEAD_OPTIONS")
    parser.add_argument("output_shares", type=Path, metavar="OUTPUT_SHARES")
    add_sampling(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")


def search(arguments: argparse.Namespace) -> int:
    """Search, write the plan and its picture, and print what was found."""
    from plans.search import search_plan
    from trt_runtime.cli_models import load_for_planning, sampling_of
    from trt_runtime.kernels import use_kernels

    options = search_options(arguments)
    pipe = load_for_planning(arguments)
    print(f"attention of plans: {use_kernels(arguments.device, pipe.transformer.dtype)}")
    prompts = prompts_of(arguments, arguments.model)
    try:
        with progress_bar() as advance:
            plan = search_plan(
                pipe,
                prompts,
                **sampling_of(pipe, arguments),
                **options,
                announce=print,
                progress=lambda stage, done, total, saved: advance(
                    f"{stage}, {percent(saved)} saved" if saved else stage, done, total
                ),
            )
    except KeyboardInterrupt:
        print("interrupted: the same command with --resume takes up the runs that are done")
        raise
    make_parent(arguments.output)
    save_plan(plan, arguments.output)
    _draw(plan, arguments.picture or arguments.output.with_suffix(".png"))
    show_plan(plan)
    print(f"plan: {arguments.output}")
    return 0


def show(arguments: argparse.Namespace) -> int:
    """Print a plan, and draw it where asked."""
    plan = load_plan(arguments.plan)
    show_plan(plan, all_heads=arguments.heads)
    if arguments.picture is not None:
        _draw(plan, arguments.picture)
    return 0


def _draw(plan: Plan, path: Path) -> None:
    from plans.picture import plan_picture

    make_parent(path)
    plan_picture(plan, path)
    print(f"picture: {path}")


def diff(arguments: argparse.Namespace) -> int:
    """Print what differs; 1 if anything does, as diff does."""
    first, second = load_plan(arguments.first), load_plan(arguments.second)
    lines = differences(first, second)
    print("\n".join(lines) if lines else "no difference")
    if lines:
        saved = [percent(account(p, 1)["attention_flops_saved"]) for p in (first, second)]
        print(f"attention saved: {saved[0]} -> {saved[1]}")
    return 1 if lines else 0


def edit(arguments: argparse.Namespace) -> int:
    """Set modes, check, account and save."""
    plan = load_plan(arguments.plan)
    edited, buckets = plan, arguments.bucket
    if arguments.steps is not None:
        edited, buckets = own_buckets(plan, parse_steps(arguments.steps))
    for bucket in buckets:
        edited = apply_edits(edited, bucket, [parse_edit(text) for text in arguments.set])
    check_plan(edited)
    # What was measured, was measured of another plan.
    edited = replace(edited, search=None, accounting=account(edited, rows_of(plan)))
    target = arguments.output or arguments.plan
    make_parent(target)
    save_plan(_relocate(edited, arguments.plan), target)
    saved = [percent(account(p, 1)["attention_flops_saved"]) for p in (plan, edited)]
    print(
        f"{target}: attention saved {saved[1]}, before {saved[0]}; graphs {len(edited.buckets)}, "
        f"before {len(plan.buckets)}; not measured: `arrowhead plan measure {target}`"
    )
    return 0


def _relocate(plan: Plan, old: Path) -> Plan:
    """Keep a relative model.source pointing at the same folder from another place."""
    from plans.plan import resolve_source

    return replace(
        plan, model=replace(plan.model, source=resolve_source(plan, old.resolve().parent))
    )


def import_(arguments: argparse.Namespace) -> int:
    """Translate the reference's pickles."""
    from plans.importer import import_reference
    from trt_runtime.cli_models import bare_plan, load_for_planning
    from trt_runtime.live import spec_of

    pipe = load_for_planning(arguments)
    bare = bare_plan(pipe, arguments)
    plan = import_reference(
        arguments.head_options,
        arguments.output_shares,
        spec=spec_of(bare, bare.model.architecture, pipe.transformer.config),
        sampler=bare.sampler,
        vae_scale_factor=bare.vae_scale_factor,
        source=bare.model.source,
        weights_sha256=bare.model.weights_sha256,
    )
    plan = replace(plan, accounting=account(plan, rows_of(plan)))
    make_parent(arguments.output)
    save_plan(plan, arguments.output)
    show_plan(plan)
    print(f"plan: {arguments.output}")
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Check legality, and fit to a model."""
    plan = load_plan(arguments.plan)
    against = ""
    if arguments.model is not None:
        from trt_runtime.cli_models import check_against_model

        check_against_model(plan, arguments.model, arguments.revision)
        against = f", and fits {arguments.model}"
    print(f"{arguments.plan}: legal{against}")
    return 0
