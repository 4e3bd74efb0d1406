"""Which bucket writes and which reads which head's cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from plans.tiles import CACHED

if TYPE_CHECKING:
    from plans.plan import Bucket, Plan


@dataclass(frozen=True)
class CacheGroup:
    """Heads of one module that the same buckets read and the same buckets write.

    One buffer [B, S, Hg, D], heads ascending.
    """

    module: str
    index: int
    heads: tuple[int, ...]
    readers: frozenset[int]
    writers: frozenset[int]

    @property
    def name(self) -> str:
        return f"{self.module}.{self.index}"


@dataclass(frozen=True)
class CacheFlow:
    """All cache groups of a plan, in module order, then index."""

    groups: tuple[CacheGroup, ...]

    def reads(self, bucket: int) -> tuple[CacheGroup, ...]:
        return tuple(group for group in self.groups if bucket in group.readers)

    def writes(self, bucket: int) -> tuple[CacheGroup, ...]:
        return tuple(group for group in self.groups if bucket in group.writers)

    def of(self, module: str) -> tuple[CacheGroup, ...]:
        return tuple(group for group in self.groups if group.module == module)


def cache_flow(plan: Plan) -> CacheFlow:
    """Return the cache groups of a legal plan.

    A bucket writes a head iff it computes it at some step and a later step reads it before it is
    recomputed; heads that nobody reads are in no group.
    """
    return CacheFlow(tuple(g for module in plan.modules for g in _module_groups(plan, module.name)))


def every_write(plan: Plan) -> CacheFlow:
    """Return the cache groups of a plan, each written whenever its heads are computed.

    So a cached head takes the latest output there is, also where steps are left out.
    """
    buckets = frozenset(range(len(plan.buckets)))
    groups = cache_flow(plan).groups
    return CacheFlow(tuple(replace(group, writers=buckets - group.readers) for group in groups))


def _module_groups(plan: Plan, module: str) -> Iterator[CacheGroup]:
    modes = [bucket.modes[module] for bucket in plan.buckets]
    heads_of: dict[tuple[frozenset[int], frozenset[int]], list[int]] = {}
    for head in range(len(modes[0])):
        readers = frozenset(b for b, row in enumerate(modes) if row[head] == CACHED)
        # A write is read iff the very next step reads: any other next step recomputes the head.
        writers = frozenset(
            now
            for now, following in pairwise(plan.schedule)
            if modes[now][head] != CACHED and modes[following][head] == CACHED
        )
        if readers:
            heads_of.setdefault((readers, writers), []).append(head)
    for index, ((readers, writers), heads) in enumerate(heads_of.items()):
        yield CacheGroup(module, index, tuple(heads), readers, writers)


def oldest_caches(plan: Plan) -> dict[tuple[int, tuple[str, int]], int]:
    """Return the greatest age in steps of each cache: by bucket and (module, head) that reads."""
    oldest: dict[tuple[int, tuple[str, int]], int] = {}
    written: dict[tuple[str, int], int] = {}
    for step, bucket in enumerate(plan.schedule):
        for head, mode in heads_of(plan.buckets[bucket]):
            if mode == CACHED:
                oldest[bucket, head] = max(step - written[head], oldest.get((bucket, head), 0))
            else:
                written[head] = step
    return oldest


def heads_of(bucket: Bucket) -> Iterator[tuple[tuple[str, int], int]]:
    """Yield (module, head) and mode."""
    for name, modes in bucket.modes.items():
        for head, mode in enumerate(modes):
            yield (name, head), mode
