from __future__ import annotations

import numpy as np
import pytest
import torch

from plans.tables import HeadTables
from tests.testbed.candidates import CANDIDATES, RECTANGLES, WINDOWS, Candidate, near, saved

KEYS = {1: 48, 2: 80, 4: 144, (0, 1): 48, (1, 0): 48, (0, 2): 80, (2, 0): 80, (1, 1): 144}


@pytest.mark.parametrize("candidate", [*WINDOWS, *RECTANGLES])
def test_a_query_inside_keeps_as_many_keys_as_it_says(candidate: Candidate) -> None:
    kept = near(candidate, 1024)
    assert kept[16 * 32 + 16].sum() == KEYS[candidate]
    assert torch.equal(kept, kept.T) and kept.diagonal().all()


def test_a_rectangle_is_of_tiles_of_four_rows_and_columns() -> None:
    seen = near((0, 1), 1024)[16 * 32 + 16].view(32, 32)
    assert seen[16:20, 12:24].all() and seen.sum() == 48


def test_more_candidates_save_no_less() -> None:
    rng = np.random.default_rng(0)
    savings = np.array([[1024 - near(c, 1024)[528].sum().item() for c in CANDIDATES]] * 4, float)
    tables = HeadTables(
        (2, 2), tuple(range(len(CANDIDATES))), rng.exponential(0.1, (5, 4, len(CANDIDATES))),
        rng.exponential(0.1, (5, 4, 4)), savings, np.full(4, 1024.0),
    )  # fmt: skip
    shares = [saved(tables, which, 0.1) for which in (WINDOWS, CANDIDATES)]
    assert 0 < saved(tables, WINDOWS, 0.1, ages=1) <= shares[0] + 0.02
    assert shares[0] < shares[1] < 0.95
