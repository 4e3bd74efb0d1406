"""What a request may hold, and how each fault is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from plans.errors import ArrowheadError
from plans.plan import Plan
from tests import tiny
from trt_runtime.triton.request import MAX_PROMPT_BYTES, parse

NAMES = ("PROMPT", "NEGATIVE_PROMPT", "SEED", "STEPS", "HEIGHT", "WIDTH", "GUIDANCE")
TEXT = np.ones((1, 5, 12), np.float32)
POOLED = np.ones((1, 10), np.float32)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return tiny.random_plan(tiny.tiny_sd3())  # 6 steps, 64 x 96, guidance 4


def texts(*values: bytes) -> np.ndarray[Any, Any]:
    return np.array([[value] for value in values], dtype=object)


def numbers(*values: float, dtype: Any = np.int32) -> np.ndarray[Any, Any]:
    return np.array([[value] for value in values], dtype=dtype)


def test_all_that_fits_is_taken(plan: Plan) -> None:
    asked = parse(
        plan,
        NAMES,
        {
            "PROMPT": texts(b"a cat", "ein B\u00e4r".encode()),
            "NEGATIVE_PROMPT": texts(b"", b"blurred"),
            "SEED": numbers(7, 2**63 - 1, dtype=np.int64),
            "STEPS": numbers(6, 6),
            "HEIGHT": numbers(64, 64),
            "WIDTH": numbers(96, 96),
            "GUIDANCE": numbers(5.5, 5.5, dtype=np.float32),
            "PREVIEW_EVERY": numbers(2, 2),
        },
    )
    assert asked.prompts == ("a cat", "ein B\u00e4r") and asked.negatives == ("", "blurred")
    assert asked.seeds == (7, 2**63 - 1) and asked.guidance == 5.5 and asked.preview_every == 2


def test_what_is_left_out_is_the_plans_and_the_seed_is_random(plan: Plan) -> None:
    asked = [parse(plan, NAMES, {"PROMPT": texts(b"a", b"b")}) for _ in range(2)]
    assert asked[0].guidance == 4.0 and asked[0].preview_every == 0
    assert len({*asked[0].seeds, *asked[1].seeds}) == 4


def test_embeddings_stand_for_prompts(plan: Plan) -> None:
    given = {"PROMPT_EMBEDS": TEXT, "POOLED_PROMPT_EMBEDS": POOLED}
    asked = parse(plan, NAMES, given)
    assert asked.prompts is None and len(asked.seeds) == 1
    assert set(asked.embeddings or ()) == {"prompt_embeds", "pooled_prompt_embeds"}
    # They share no call with prompts, nor with other guidance.
    assert asked.call != parse(plan, NAMES, {"PROMPT": texts(b"a")}).call


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"SEED": numbers(1, dtype=np.int64)}, "PROMPT | got nothing; .* Fix: send PROMPT"),
        ({"PROMPT": texts(b"a"), "PROMPT_EMBEDS": TEXT, "POOLED_PROMPT_EMBEDS": POOLED},
         "got both PROMPT and PROMPT_EMBEDS"),
        ({"PROMPT_EMBEDS": TEXT}, "POOLED_PROMPT_EMBEDS | got nothing; .* send POOLED"),
        ({"PROMPT": texts(b"a"), "NEGATIVE_PROMPT_EMBEDS": TEXT,
          "NEGATIVE_POOLED_PROMPT_EMBEDS": POOLED}, "them beside a text prompt"),
        ({"PROMPT_EMBEDS": TEXT * np.nan, "POOLED_PROMPT_EMBEDS": POOLED},
         "PROMPT_EMBEDS | got values that are not finite"),
        ({"PROMPT": texts(b"caf\xe9")}, "byte 0xe9 at 3, which is not UTF-8"),
        ({"PROMPT": texts(b"a" * 10_000_000)}, f"10000000 bytes; expected at most "
         f"{MAX_PROMPT_BYTES}"),
        ({"PROMPT": texts(b"a"), "NEGATIVE_PROMPT": texts(b"\xff")}, "NEGATIVE_PROMPT | got byte"),
        ({"PROMPT": texts(b"a"), "SEED": numbers(-1, dtype=np.int64)}, "SEED | got -1"),
        ({"PROMPT": texts(b"a"), "STEPS": numbers(28)}, "STEPS | got 28; expected 6, as planned"),
        ({"PROMPT": texts(b"a"), "STEPS": numbers(0)}, "send 6 or leave STEPS out"),
        ({"PROMPT": texts(b"a"), "HEIGHT": numbers(1024)}, "HEIGHT | got 1024; expected 64"),
        ({"PROMPT": texts(b"a"), "WIDTH": numbers(2**31 - 1)}, "WIDTH | got 2147483647"),
        ({"PROMPT": texts(b"a"), "GUIDANCE": numbers(1, dtype=np.float32)}, "expected above 1"),
        ({"PROMPT": texts(b"a"), "GUIDANCE": numbers(np.nan, dtype=np.float32)}, "GUIDANCE .* nan"),
        ({"PROMPT": texts(b"a"), "GUIDANCE": numbers(1e30, dtype=np.float32)}, "at most 100"),
        ({"PROMPT": texts(b"a", b"b"), "GUIDANCE": numbers(3, 4, dtype=np.float32)},
         "one value for all of its pictures"),
        ({"PROMPT": texts(b"a"), "PREVIEW_EVERY": numbers(-2)}, "PREVIEW_EVERY | got -2"),
    ],
)  # fmt: skip
def test_faults_are_named(plan: Plan, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(ArrowheadError, match=message.replace(" | ", r" \| ")):
        parse(plan, NAMES, arrays)
