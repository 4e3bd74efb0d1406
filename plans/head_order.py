"""In which order a module's heads lie best: what each bucket computes, and each cache, as one run.

Heads that lie side by side are a slice of every projection; others have to be copied out of it.
A *place* is where a head lies: `order[place] == head`. A plan told by places is a plan of the same
model with its heads in that order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from plans.plan import Bucket, CacheFlow, Plan, cache_flow
from plans.tiles import CACHED

Order = tuple[int, ...]

_BEAM = 64  # partial orders kept: exact for four kinds of heads, and so for three buckets
_COMPUTED = 4  # matrices that are copied for a head that is computed (Q, K, V, output) ...
_WRITTEN = 1  # ... and for one whose cache is written


def head_orders(plan: Plan) -> dict[str, Order]:
    """Give each module the order of its heads in which the plan copies fewest of them.

    A module whose own order is as good keeps it.
    """
    groups = cache_flow(plan).groups
    orders = {}
    for module in plan.modules:
        wanted: dict[frozenset[int], int] = {}
        for bucket in plan.buckets:
            modes = bucket.modes[module.name]
            heads = frozenset(head for head, mode in enumerate(modes) if mode != CACHED)
            wanted[heads] = _COMPUTED
        for group in groups:
            if group.module == module.name:
                wanted.setdefault(frozenset(group.heads), _WRITTEN)
        orders[module.name] = best_order(module.heads, wanted)
    return orders


def best_order(heads: int, wanted: Mapping[frozenset[int], int]) -> Order:
    """Order heads so that the sets that are no run cost least: `wanted` per head of each set."""
    sets = [s for s in wanted if 0 < len(s) < heads]
    costs = tuple(wanted[s] * len(s) for s in sets)
    kinds: dict[int, list[int]] = {}  # heads by the sets they are in, which are bits
    for head in range(heads):
        member = sum(1 << i for i, s in enumerate(sets) if head in s)
        kinds.setdefault(member, []).append(head)
    members = tuple(kinds)
    order = tuple(head for i in _order_kinds(members, costs) for head in kinds[members[i]])
    own = tuple(range(heads))

    def cost(order: Order) -> int:
        return sum(c for s, c in zip(sets, costs, strict=True) if not is_run(places_of(order, s)))

    return own if cost(own) <= cost(order) else order


@lru_cache(maxsize=4096)  # modules of a synthetic plan are all alike
def _order_kinds(members: tuple[int, ...], costs: tuple[int, ...]) -> Order:
    """Order kinds of heads by a beam search from left to right."""

    def cost(broken: int) -> int:
        return sum(c for i, c in enumerate(costs) if broken >> i & 1)

    # What matters of a partial order: which kinds it has, the last one, the sets it has broken.
    beam: dict[tuple[frozenset[int], int, int], Order] = {(frozenset(), 0, 0): ()}
    for _ in members:
        following: dict[tuple[frozenset[int], int, int], Order] = {}
        for (placed, last, broken), order in beam.items():
            rest = 0  # sets that have heads yet to come
            for kind in set(range(len(members))) - placed:
                rest |= members[kind]
            for kind, member in enumerate(members):
                if kind not in placed:
                    key = (placed | {kind}, member, broken | (last & ~member & rest))
                    following.setdefault(key, (*order, kind))
        best = sorted(following.items(), key=lambda item: cost(item[0][2]))  # stable
        beam = dict(best[:_BEAM])
    return next(iter(beam.values()))


def places_of(order: Order, heads: Iterable[int]) -> tuple[int, ...]:
    """Say where heads lie, ascending."""
    return tuple(sorted(order.index(head) for head in heads))


def is_run(places: Sequence[int]) -> bool:
    """Whether ascending places follow one another."""
    return len(places) > 0 and places[-1] - places[0] == len(places) - 1


def plan_by_places(plan: Plan, orders: Mapping[str, Order]) -> Plan:
    """Tell the plan by places."""
    buckets = tuple(
        Bucket({
            name: tuple(modes[head] for head in orders[name])
            for name, modes in bucket.modes.items()
        })
        for bucket in plan.buckets
    )  # fmt: skip
    return replace(plan, buckets=buckets)


def flow_by_places(plan: Plan, orders: Mapping[str, Order]) -> CacheFlow:
    """Tell the plan's cache groups by places; their names stay those of cache_flow(plan)."""
    return CacheFlow(tuple(
        replace(group, heads=places_of(orders[group.module], group.heads))
        for group in cache_flow(plan).groups
    ))  # fmt: skip
