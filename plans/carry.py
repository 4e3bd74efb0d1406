"""A plan found at one step count or picture size, carried to another by a stated rule.

Each new step stands for the plan's step of the nearest sigma, and takes its bucket; step 0 stands
for step 0. The age of a cache is counted in the plan's own steps, from the step that wrote it to
the step that reads it, as the new steps stand for them. A head may be as old in a bucket as the
plan let it get there. Where it would be older, the bucket computes the head instead, or the step
takes another bucket: an all-full one, or one that the plan uses both before and after, where no
cache is too old. Of all these what saves most over the whole run is done.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil
from typing import Any

from plans.cache_flow import heads_of, oldest_caches
from plans.check import SIGMA_TOLERANCE, check_config, check_plan
from plans.errors import ArrowheadError
from plans.models import AttentionModule, ModelSpec
from plans.plan import Bucket, Plan, join_equal
from plans.tiles import CACHED, FULL, TokenLayout, kept_pairs

RULE = (
    "bucket of the nearest sigma; caches no older, in the plan's own steps, than the plan let them "
    "get in their bucket, else the head is computed or the step takes another bucket; half windows "
    "and bands cover at least the share of the image they covered"
)
# What a search was asked for, which a later repair of the carried plan asks for again.
_ASKED = ("delta", "cap_factor", "candidates", "divisors", "max_buckets", "error_weights")

_Head = tuple[str, int]  # module, head


@dataclass(frozen=True)
class Carried:
    """A carried plan and what the rule had to change.

    of_step: for each new step the plan's step it stands for. raised: bucket, module and head that
    are computed instead of cached. retimed: steps that took another bucket, by that bucket. Buckets
    are the plan's, before unused ones left.
    """

    plan: Plan
    of_step: tuple[int, ...]
    raised: tuple[tuple[int, str, int], ...]
    retimed: dict[int, int]


def carry_plan(plan: Plan, target: Plan) -> Carried:
    """Carry a plan to the model, picture, block and sampler of `target`, any plan made for them.

    The search record says where the plan comes from; errors it does not have, since nothing was
    run. Where nothing changes the plan is returned as it is. Raises ArrowheadError for another
    architecture, config, module list, scheduler class, or CFG switched on or off; other weights
    only warn.
    """
    _refuse_others(plan, target)
    if _same_run(plan, target):
        same = tuple(range(plan.steps))
        return Carried(replace(plan, model=target.model), same, (), {})
    of_step = nearest_steps(plan, target.sampler.sigmas)
    buckets = tuple(
        Bucket(
            {
                new.name: carried_modes(bucket.modes[new.name], old.layout, new.layout)
                for old, new in zip(plan.modules, target.modules, strict=True)
            }
        )
        for bucket in plan.buckets
    )
    moved = replace(
        target,
        buckets=buckets,
        schedule=tuple(plan.schedule[step] for step in of_step),
        search=None,
        accounting=None,
    )
    young = _Rejuvenation(plan, moved, of_step)
    moved = young.result()
    moved = replace(moved, search=_record(plan, young, of_step))
    check_plan(moved)
    return Carried(moved, of_step, tuple(young.raised), young.retimed)


def nearest_steps(plan: Plan, sigmas: Sequence[float]) -> tuple[int, ...]:
    """Return, for each sigma, the plan's step of the nearest one: step 0 for the first.

    Of two that are equally near it is the earlier.
    """
    own = plan.sampler.sigmas

    def nearest(sigma: float) -> int:
        return min(range(len(own)), key=lambda step: round(abs(own[step] - sigma), 7))

    return (0, *(nearest(sigma) for sigma in sigmas[1:]))


def carried_modes(modes: Sequence[int], old: TokenLayout, new: TokenLayout) -> tuple[int, ...]:
    """Return modes whose half windows, and bands of 2w + 1 blocks, cover no less of the image.

    In row-major order the share of the tokens is that of the picture's height, whatever its shape.
    Rounded outwards; a window that keeps every block becomes full.
    """
    if (old.image_tokens, old.block) == (new.image_tokens, new.block):
        return tuple(modes)
    grown = Fraction(new.image_tokens * old.block, new.block * old.image_tokens)  # blocks a block
    result = []
    for mode in modes:
        if mode >= 0:
            reach, band = mode * grown, ((2 * mode + 1) * grown - 1) / 2
            mode = max(ceil(reach), ceil(band))
            mode = FULL if mode >= new.blocks - 1 else mode
        result.append(mode)
    return tuple(result)


def _same_run(plan: Plan, target: Plan) -> bool:
    """Whether the errors measured of a plan are those of its runs at the target."""
    old, new = plan.sampler, target.sampler
    weights = {plan.model.weights_sha256, target.model.weights_sha256} - {None}
    return (
        (plan.height, plan.width, plan.modules) == (target.height, target.width, target.modules)
        and old.steps == new.steps
        and max(abs(a - b) for a, b in zip(old.sigmas, new.sigmas, strict=True)) <= SIGMA_TOLERANCE
        and old.guidance_scale == new.guidance_scale
        and len(weights) < 2
    )


def _record(plan: Plan, young: _Rejuvenation, of_step: Sequence[int]) -> dict[str, Any]:
    asked = plan.search or {}
    origin = {
        "plan_sha256": plan.sha256,
        "steps": plan.steps,
        "sigmas_sha256": plan.sampler.sigmas_sha256,
        "height": plan.height,
        "width": plan.width,
        "text_tokens": plan.text_tokens,
        "block": plan.block,
        "weights_sha256": plan.model.weights_sha256,
        "basis": asked.get("basis"),
        "rule": RULE,
        "of_step": list(of_step),
        "raised": [list(entry) for entry in young.raised],
        "retimed": {str(step): bucket for step, bucket in young.retimed.items()},
    }
    if "carried_from" in asked:
        origin["carried_from"] = asked["carried_from"]
    kept = {name: asked[name] for name in _ASKED if name in asked}
    return {"method": "carried", "basis": "carried", **kept, "carried_from": origin}


class _Rejuvenation:
    """Goes through the new steps once and mends those whose caches would be too old.

    Either change only makes later, and earlier, caches younger, so one pass is enough.
    """

    def __init__(self, plan: Plan, moved: Plan, of_step: Sequence[int]) -> None:
        self.raised: list[tuple[int, str, int]] = []
        self.retimed: dict[int, int] = {}
        self._plan = moved
        self._of_step = of_step
        self._oldest = oldest_caches(plan)
        self._uses = [
            [step for step, own in enumerate(plan.schedule) if own == bucket]
            for bucket in range(len(plan.buckets))
        ]
        self._full = moved.full_bucket
        self._schedule = list(moved.schedule)
        self._modules = {module.name: module for module in moved.modules}
        self._modes = [dict(heads_of(bucket)) for bucket in moved.buckets]
        self._computed = [self._widest(bucket) for bucket in range(len(moved.buckets))]
        self._written: dict[_Head, int] = {}
        for step, of in enumerate(of_step):
            if self._too_old(step, self._schedule[step]):
                self._mend(step)
            for head, mode in self._modes[self._schedule[step]].items():
                if mode != CACHED:
                    self._written[head] = of

    def _too_old(self, step: int, bucket: int) -> list[_Head]:
        """Heads that would read too old a cache in this bucket."""
        return [
            head
            for head, mode in self._modes[bucket].items()
            if mode == CACHED
            and self._of_step[step] - self._written[head] > self._oldest[bucket, head]
        ]

    def _widest(self, bucket: int) -> dict[_Head, int]:
        """How a bucket computes what it caches: the widest way that another, not all full, does."""
        widest: dict[_Head, int] = {}
        for head in self._modes[bucket]:
            others = [
                modes[head]
                for i, modes in enumerate(self._modes)
                if i not in (bucket, self._full) and modes[head] != CACHED
            ]
            widest[head] = FULL if not others or FULL in others else max(others)
        return widest

    def _mend(self, step: int) -> None:
        """Compute the old heads wherever the step's bucket is used, or give it another bucket."""
        bucket, of = self._schedule[step], self._of_step[step]
        old = self._too_old(step, bucket)
        by_head = self._schedule.count(bucket) * sum(
            self._pairs(head, self._computed[bucket][head]) for head in old
        )
        others = [
            other
            for other, uses in enumerate(self._uses)
            if other == self._full or (uses[0] <= of <= uses[-1] and not self._too_old(step, other))
        ]
        other = min(others, key=self._kept, default=None)
        if other is not None and self._kept(other) - self._kept(bucket) <= by_head:
            self._schedule[step] = self.retimed[step] = other
            return
        for head in old:
            self._modes[bucket][head] = self._computed[bucket][head]
            self.raised.append((bucket, *head))

    def _kept(self, bucket: int) -> int:
        return sum(self._pairs(head, mode) for head, mode in self._modes[bucket].items())

    def _pairs(self, head: _Head, mode: int) -> int:
        module: AttentionModule = self._modules[head[0]]
        return kept_pairs(module.layout, mode, module.text_output)

    def result(self) -> Plan:
        """Return the plan without the buckets that no step uses, equal ones joined."""
        buckets = tuple(
            Bucket({n: tuple(own[n, h] for h in range(m.heads)) for n, m in self._modules.items()})
            for own in self._modes
        )
        used = sorted(set(self._schedule))
        schedule = tuple(used.index(bucket) for bucket in self._schedule)
        plan = replace(
            self._plan, buckets=tuple(buckets[bucket] for bucket in used), schedule=schedule
        )
        return join_equal(plan) if self.raised else plan


def check_architecture(plan: Plan, architecture: str) -> None:
    """Raise ArrowheadError unless a plan is for the transformer class of this name."""
    if architecture != plan.model.architecture:
        raise ArrowheadError(
            "transformer class",
            got=architecture,
            expected=f"{plan.model.architecture}, as planned",
            fix="name a checkpoint of that class, or search a plan for this one",
        )


def _refuse_others(plan: Plan, target: Plan) -> None:
    old, new = plan.sampler, target.sampler
    check_architecture(plan, target.model.architecture)
    facts: list[tuple[str, object, object, str]] = [
        ("attention modules", *_module_lists(plan.modules, target.modules),
         "search a plan for this model"),
        ("scheduler", new.scheduler, old.scheduler,
         "load the scheduler that the plan was made with, or search a plan for this one"),
        ("classifier-free guidance", "on" if new.cfg else "off", "on" if old.cfg else "off",
         f"pass --guidance-scale {old.guidance_scale:g}, or search a plan anew"),
    ]  # fmt: skip
    for subject, got, expected, fix in facts:
        if got != expected:
            raise ArrowheadError(subject, got=got, expected=f"{expected}, as planned", fix=fix)
    if target.model.config_sha256 != plan.model.config_sha256:
        check_config(plan, spec_of(target))
    weights = plan.model.weights_sha256, target.model.weights_sha256
    if None not in weights and weights[0] != weights[1]:
        warnings.warn(
            "the weights are not those that the plan was made for: measure it on them",
            stacklevel=3,
        )


def spec_of(plan: Plan) -> ModelSpec:
    """Return what a plan that keeps its model's config says of the transformer."""
    return ModelSpec(
        plan.model.architecture, plan.model.config or {}, plan.height, plan.width,
        plan.text_tokens, plan.block, plan.modules,
    )  # fmt: skip


def _module_lists(
    planned: Sequence[AttentionModule], live: Sequence[AttentionModule]
) -> tuple[object, object]:
    """Return the two lists as far as they differ: equal if they do not."""
    if len(live) != len(planned):
        return len(live), len(planned)
    for old, new in zip(planned, live, strict=True):
        if _shape(old) != _shape(new):
            return _shape(new), _shape(old)
    return None, None


def _shape(module: AttentionModule) -> str:
    """A module without the numbers of its tokens."""
    layout = module.layout
    order = "text first" if layout.text_first else "image first"
    text = order if layout.text_tokens else "no text"
    return f"{module.name}: {module.heads} heads x {module.head_dim}, {text}"
