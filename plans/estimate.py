"""What a schedule saves, told in a fraction of a millisecond, to find schedules worth judging."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from plans.tables import HeadTables, Ints

Bits = NDArray[np.uint64]  # one bit a head along the last axis
Flags = NDArray[np.bool_]


class Estimate:
    """Savings of schedules where each head keeps a cap of its own and modules have no sums.

    Whether a head stays under its cap at a step, in a mode or at a cache's age, is one bit. A head
    may be cached in a set of buckets if the bits of all its steps are set, so a schedule is judged
    by a few ANDs over all heads at once. cap: [R].
    """

    def __init__(self, tables: HeadTables, cap: NDArray[np.float64]) -> None:
        steps, rows, windows = tables.arrow.shape
        self._rows = rows
        # Most saving first, FULL last: the first that a bucket's steps all allow is the one.
        order = np.argsort(-tables.arrow_saving.mean(axis=0), kind="stable")
        own = np.concatenate([tables.arrow[:, :, order], np.zeros((steps, rows, 1))], axis=2)
        self._saving = np.zeros((windows + 1, rows), dtype=np.float32)
        self._saving[:-1] = tables.arrow_saving[:, order].T
        self._cached_saving = tables.cached_saving.astype(np.float32)
        self._widest = int(np.argmax(order)) if windows else 0
        weights = np.broadcast_to(tables.weights, (steps, rows))[:, :, None]
        allowed = (own * weights < cap[:, None]).transpose(0, 2, 1)
        allowed[:, -1] = True
        self._own = _pack(allowed)  # [N, W + 1, words]
        self._aged = _pack(_aged(tables, own, cap))  # [N, A + 2, W + 1, words]
        self._known: dict[tuple[int, ...], float] = {}

    def saving(self, schedule: tuple[int, ...]) -> float:
        """Return what the best modes save over all steps."""
        if schedule not in self._known:
            self._known[schedule] = self._judge(np.array(schedule))
        return self._known[schedule]

    def _judge(self, schedule: Ints) -> float:
        buckets = int(schedule.max()) + 1
        own = np.zeros((buckets, *self._own.shape[1:]), dtype=np.uint64)
        for bucket in range(buckets):
            np.bitwise_and.reduce(self._own[schedule == bucket], axis=0, out=own[bucket])
        narrow = _first(own)
        wide = np.zeros_like(own)
        wide[:, self._widest] = own[:, self._widest]
        wide[:, -1] |= ~wide[:, self._widest]
        full = np.zeros_like(own)
        full[:, -1] = ~np.uint64(0)

        cached = subsets(buckets)
        skip = cached[:, schedule]
        age = ages(skip)
        young = age.max(axis=1) <= self._aged.shape[1] - 2
        cached, skip, age = cached[young], skip[young], age[young]
        writes = np.zeros(cached.shape, dtype=bool)
        option, step = np.nonzero(~skip[:, :-1] & skip[:, 1:])
        writes[option, schedule[step]] = True
        share = np.bincount(schedule, minlength=buckets).astype(np.float32)
        saving = [self._of(modes) for modes in (narrow, wide, full)]
        base = (cached @ share)[:, None] * self._cached_saving
        base += (~(cached | writes) * share) @ saving[0]
        best = np.zeros(self._rows, dtype=np.float32)
        for modes, own_saving in zip((narrow, wide, full), saving, strict=True):
            total = base + (writes * share) @ own_saving
            total[~self._within(modes, schedule, age)] = 0
            np.maximum(best, total.max(axis=0), out=best)
        return float(best.sum())

    def _of(self, modes: Bits) -> NDArray[np.float32]:
        """What each bucket's modes [K, W + 1, words] save, [K, R]."""
        picked = _unpack(modes, self._rows)
        return np.einsum("kwr,wr->kr", picked, self._saving)

    def _within(self, modes: Bits, schedule: Ints, age: Ints) -> Flags:
        """Say for which heads the caches of each set of buckets keep the cap, [P, R]."""
        steps = np.arange(len(schedule))
        option, step = np.nonzero(age)
        if not len(step):
            return np.ones((len(age), self._rows), dtype=bool)
        old = age[option, step]
        bits = self._aged[step, old]
        bits &= modes[schedule[steps[step] - old]]
        seen = np.bitwise_or.reduce(bits, axis=1)
        result = np.full((len(age), seen.shape[1]), ~np.uint64(0))
        which, first = np.unique(option, return_index=True)
        result[which] = np.bitwise_and.reduceat(seen, first, axis=0)
        return _unpack(result, self._rows)


def ages(cached: Flags) -> Ints:
    """Return how many steps ago each step's output was computed; steps are axis 1."""
    steps = np.arange(cached.shape[1]).reshape(-1, *[1] * (cached.ndim - 2))
    return steps - np.maximum.accumulate(np.where(cached, 0, steps), axis=1)


def subsets(buckets: int) -> Flags:
    """Return every set of buckets but the first, [2^(K-1), K], the empty one first."""
    bits = np.arange(2 ** (buckets - 1))[:, None] >> np.arange(buckets - 1) & 1
    return np.pad(bits.astype(bool), ((0, 0), (1, 0)))


def _aged(tables: HeadTables, own: NDArray[np.float64], cap: NDArray[np.float64]) -> Flags:
    """Say whether a head keeps its cap at a step, a cache's age and the mode it was computed in."""
    steps, rows, oldest = tables.cached.shape
    result = np.zeros((steps, oldest + 2, own.shape[2], rows), dtype=bool)
    result[:, 0] = True
    factor = np.broadcast_to(tables.drift * tables.weights, (steps, rows))
    for age in range(1, min(oldest, steps - 1) + 1):
        errors = (tables.cached[age:, :, age - 1, None] + own[:-age]) * factor[age:, :, None]
        allowed = (errors < cap[:, None]) | (errors == 0)
        result[age:, age] = allowed.transpose(0, 2, 1)
    return result


def _first(allowed: Bits) -> Bits:
    """Keep of each bucket's allowed modes the first: [K, W + 1, words]."""
    before = np.bitwise_or.accumulate(allowed, axis=1)
    result = allowed.copy()
    result[:, 1:] &= ~before[:, :-1]
    return result


def _pack(flags: Flags) -> Bits:
    missing = -flags.shape[-1] % 64
    padded = np.pad(flags, [(0, 0)] * (flags.ndim - 1) + [(0, missing)])
    return np.ascontiguousarray(np.packbits(padded, axis=-1)).view(np.uint64)


def _unpack(bits: Bits, rows: int) -> Flags:
    flat = np.ascontiguousarray(bits).view(np.uint8)
    return np.unpackbits(flat, axis=-1, count=rows).view(bool)
