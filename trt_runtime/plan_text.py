"""Plans in words: names of modes, edits given on a command line, differences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from plans.carry import nearest_steps
from plans.errors import ArrowheadError
from plans.plan import Bucket, Plan
from plans.tiles import CACHED, FULL


@dataclass(frozen=True)
class Edit:
    """One mode for some heads (None: all) of the modules that match a pattern."""

    pattern: str
    heads: tuple[int, ...] | None
    mode: int


def mode_name(mode: int, *, short: bool = False) -> str:
    """Give full, cached or arrow 3; short: F, C or 3."""
    if mode == FULL:
        return "F" if short else "full"
    if mode == CACHED:
        return "C" if short else "cached"
    return str(mode) if short else f"arrow {mode}"


def modes_text(modes: Sequence[int], *, counted: bool = False) -> str:
    """Give a module's modes one by one, F C 4; counted: as 6F 10x4 8C."""
    if not counted:
        return " ".join(mode_name(mode, short=True) for mode in modes)
    count = Counter(modes)
    windows = [f"{count[w]}x{w}" for w in sorted(count) if w >= 0]
    full, cached = (f"{count[m]}{n}" for m, n in ((FULL, "F"), (CACHED, "C")))
    return " ".join([*[full] * (FULL in count), *windows, *[cached] * (CACHED in count)])


def mode_counts(plan: Plan, bucket: int) -> dict[str, int]:
    """Count heads of one bucket by mode: full, arrow, cached."""
    counts: Counter[str] = Counter(full=0, arrow=0, cached=0)
    for modes in plan.buckets[bucket].modes.values():
        for mode in modes:
            counts["cached" if mode == CACHED else "full" if mode == FULL else "arrow"] += 1
    return dict(counts)


def parse_edit(text: str) -> Edit:
    """Read MODULE:HEADS=MODE, as in transformer_blocks.3.attn:0,2-4=cached."""
    where, found, mode = text.rpartition("=")
    pattern, separator, heads = where.rpartition(":")
    try:
        if not (found and separator and pattern):
            raise ValueError(text)
        return Edit(pattern, _heads(heads), _mode(mode))
    except ValueError:
        raise ArrowheadError(
            "--set",
            got=text,
            expected="MODULE:HEADS=MODE, heads as all or 0,2-4, mode full, cached or a number >= 0",
            fix="write for example --set transformer_blocks.3.attn:0,2-4=cached",
        ) from None


def _heads(text: str) -> tuple[int, ...] | None:
    return None if text == "all" else _numbers(text)


def _numbers(text: str) -> tuple[int, ...]:
    """Read 0,2-4."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        numbers += range(int(first), int(last) + 1) if dash else [int(first)]
    return tuple(numbers)


def parse_steps(text: str) -> tuple[int, ...]:
    """Read steps, as 0,2-4."""
    try:
        return _numbers(text)
    except ValueError:
        raise ArrowheadError(
            "--steps", got=text, expected="numbers, as 3,7-9", fix="count steps from 0"
        ) from None


def _mode(text: str) -> int:
    named = {"full": FULL, "cached": CACHED}
    mode = named.get(text)
    if mode is None:
        mode = int(text)
        if mode < 0:
            raise ValueError(text)
    return mode


def apply_edits(plan: Plan, bucket: int, edits: Sequence[Edit]) -> Plan:
    """Give the plan with one bucket's modes changed; the caller checks the result."""
    if not 0 <= bucket < len(plan.buckets):
        raise ArrowheadError(
            "--bucket",
            got=bucket,
            expected=f"one of 0..{len(plan.buckets) - 1}",
            fix="`arrowhead plan show` lists the buckets and their steps",
        )
    modes = {name: list(own) for name, own in plan.buckets[bucket].modes.items()}
    for edit in edits:
        names = [name for name in modes if fnmatchcase(name, edit.pattern)]
        if not names:
            raise ArrowheadError(
                "--set module",
                got=edit.pattern,
                expected=f"one of, or a pattern for, {', '.join(modes)}",
                fix="check the name; quote patterns with *",
            )
        for name in names:
            for head in range(len(modes[name])) if edit.heads is None else edit.heads:
                if not 0 <= head < len(modes[name]):
                    raise ArrowheadError(
                        f"--set heads of {name}",
                        got=head,
                        expected=f"0..{len(modes[name]) - 1}",
                        fix="count heads from 0",
                    )
                modes[name][head] = edit.mode
    buckets = list(plan.buckets)
    buckets[bucket] = Bucket({name: tuple(own) for name, own in modes.items()})
    return replace(plan, buckets=tuple(buckets))


def own_buckets(plan: Plan, steps: Sequence[int]) -> tuple[Plan, list[int]]:
    """Give the plan with buckets that only these steps use, and which they are."""
    for step in steps:
        if not 0 <= step < plan.steps:
            raise ArrowheadError(
                "--steps",
                got=step,
                expected=f"some of 0..{plan.steps - 1}",
                fix="`arrowhead plan show` lists the buckets and their steps",
            )
    wanted, buckets, schedule = set(steps), list(plan.buckets), list(plan.schedule)
    for bucket in sorted({plan.schedule[step] for step in wanted}):
        if {step for step, own in enumerate(plan.schedule) if own == bucket} <= wanted:
            continue
        schedule = [
            len(buckets) if own == bucket and step in wanted else own
            for step, own in enumerate(schedule)
        ]
        buckets.append(buckets[bucket])
    split = replace(plan, buckets=tuple(buckets), schedule=tuple(schedule))
    return split, sorted({schedule[step] for step in wanted})


def differences(first: Plan, second: Plan) -> list[str]:
    """List what two plans do differently; empty if they do the same."""
    return [*_facts(first, second), *_modes(first, second)]


def _facts(first: Plan, second: Plan) -> Iterator[str]:
    facts = ("height", "width", "vae_scale_factor", "text_tokens", "block", "steps")
    for name in facts:
        a, b = getattr(first, name), getattr(second, name)
        if a != b:
            yield f"{name}: {a} -> {b}"
    for name in ("architecture", "config_sha256", "weights_sha256"):
        a, b = getattr(first.model, name), getattr(second.model, name)
        if a != b:
            yield f"model {name}: {a} -> {b}"
    for name in ("scheduler", "sigmas_sha256", "cfg", "guidance_scale"):
        a, b = getattr(first.sampler, name), getattr(second.sampler, name)
        if a != b:
            yield f"sampler {name}: {a} -> {b}"
    if first.schedule != second.schedule:
        yield f"schedule: {_row(first.schedule)} -> {_row(second.schedule)}"


def _modes(first: Plan, second: Plan) -> Iterator[str]:
    names = [module.name for module in first.modules]
    others = [module.name for module in second.modules]
    for name in names:
        if name not in others:
            yield f"{name}: only in the first"
    for name in others:
        if name not in names:
            yield f"{name}: only in the second"
    alike: dict[tuple[str, str], list[str]] = {}
    for before, step in _pairs(first, second):
        a, b = first.modes_at(before), second.modes_at(step)
        for name in names:
            if name in b and a[name] != b[name]:
                said = str(step) if before == step else f"{before}->{step}"
                alike.setdefault((name, _changes(a[name], b[name])), []).append(said)
    for (name, changes), steps in alike.items():
        yield f"step{'s' * (len(steps) > 1)} {' '.join(steps)}, {name}: {changes}"


def _pairs(first: Plan, second: Plan) -> Iterator[tuple[int, int]]:
    """Steps to compare: of one number, or, for other sigmas, the first's of the nearest sigma."""
    if first.steps == second.steps:
        yield from ((step, step) for step in range(first.steps))
        return
    yield from zip(nearest_steps(first, second.sampler.sigmas), range(second.steps), strict=True)


def _changes(before: Sequence[int], after: Sequence[int]) -> str:
    if len(before) != len(after):
        return f"{len(before)} heads -> {len(after)}"
    heads: dict[str, list[str]] = {}
    for head, (x, y) in enumerate(zip(before, after, strict=True)):
        if x != y:
            heads.setdefault(f"{mode_name(x)} -> {mode_name(y)}", []).append(str(head))
    return "; ".join(
        f"head{'s' * (len(own) > 1)} {','.join(own)} {change}" for change, own in heads.items()
    )


def _row(schedule: Sequence[int]) -> str:
    return " ".join(map(str, schedule))
