"""The best modes under a schedule once it is settled: every mode in every bucket, heads in pairs.

Schedules are judged by a few options a head. Under the one that was chosen there is time to try
them all, a module at a time, and to give two heads new options at once, which uses up what room a
module's sums leave. What this finds saves no less.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product

import numpy as np

from plans.tables import Floats, Ints

# Options times heads of a module up to which all are tried, and heads up to which all pairs are.
_OPTIONS, _PAIRED = 3000, 8


def all_options(
    kinds: int, schedule: Sequence[int], heads: int, first: Sequence[int] = (0,)
) -> Ints | None:
    """Return every choice of one of `kinds` modes in every bucket, [P, K].

    In the first bucket it is one of the kinds `first`; full is kind 0. None where the choices are
    too many to try.
    """
    free = max(schedule)
    if heads * len(first) * kinds**free > _OPTIONS:
        return None
    return np.array(list(product(first, *[range(kinds)] * free)), dtype=np.int64)


def exchange_pairs(savings: Floats, errors: Floats, picked: Ints, delta: float) -> Ints:
    """Give two heads of one module other options while that saves more within delta.

    savings: [P, H], not finite where an option is not allowed; errors: [P, N, H]; picked: [H].
    """
    picked = picked.copy()
    heads = len(picked)
    if not 1 < heads <= _PAIRED:
        return picked
    allowed = [_efficient(savings[:, h], errors[:, :, h]) for h in range(heads)]
    improved = True
    while improved:
        improved = False
        for pair in combinations(range(heads), 2):
            others = [h for h in range(heads) if h not in pair]
            room = delta - errors[picked[others], :, others].sum(axis=0)
            found = _best_pair(savings, errors, [allowed[h] for h in pair], pair, room)
            now = sum(savings[picked[h], h] for h in pair)
            if found is not None and found[0] > now * (1 + 1e-12):
                picked[list(pair)] = found[1:]
                improved = True
    return picked


def _efficient(savings: Floats, errors: Floats) -> Ints:
    """Options of a head that no other beats in saving and in every step's error."""
    order = np.lexsort((errors.sum(axis=1), -savings))
    kept: list[int] = []
    for option in order[np.isfinite(savings[order])]:
        if not kept or not (errors[kept] <= errors[option]).all(axis=1).any():
            kept.append(int(option))
    return np.array(kept)


def _best_pair(
    savings: Floats, errors: Floats, options: Sequence[Ints], pair: Sequence[int], room: Floats
) -> tuple[float, int, int] | None:
    """Of all pairs of options the one that saves most with its errors within room, [N]."""
    one, other = options
    best = None
    least = -np.inf
    rest = errors[other, :, pair[1]]
    for option in one:  # most saving first, and so for the other
        saved = savings[option, pair[0]] + savings[other, pair[1]]
        if saved[0] <= least:
            break
        fits = np.flatnonzero((errors[option, :, pair[0]] + rest <= room).all(axis=1))
        if len(fits) and saved[fits[0]] > least:
            least = float(saved[fits[0]])
            best = least, int(option), int(other[fits[0]])
    return best
