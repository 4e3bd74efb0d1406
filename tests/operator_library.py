"""The operator library for ONNX Runtime, built once a process as a user builds it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@cache
def built() -> Path:
    """Build it with `make plugins-cpu`; skip, in make's words, where a tool is missing."""
    pytest.importorskip("onnxruntime")
    if shutil.which("make") is None:
        pytest.skip("no make: apt-get install make")
    path = Path(tempfile.mkdtemp(prefix="arrowhead-")) / "libarrowhead_onnxruntime.so"
    made = subprocess.run(
        ["make", "--no-print-directory", "plugins-cpu", f"OPERATORS={path}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "plugins-cpu: needs" in made.stdout:
        pytest.skip(made.stdout.strip())
    assert made.returncode == 0, made.stdout + made.stderr
    return path
