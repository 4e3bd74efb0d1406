"""What the targets of the Makefile pass on."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("given", "passed"),
    [("", ""), ("4", "--batch 4"), ("2 2 8", "--batch-range 2 2 8")],
)
def test_engine_passes_the_rows_on(given: str, passed: str) -> None:
    done = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "--assume-new=pyproject.toml", "engine",
         f"BATCH={given}"],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True,
    )  # fmt: skip
    command = " ".join(done.stdout.replace("\\\n", " ").split())
    assert command.endswith(f"--verify --fallback {passed}".strip())
