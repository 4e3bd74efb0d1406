"""A process that outlives its parent: it ends by itself, and removes the memory they shared."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.trt_runtime.triton.conftest import ROOT
from tests.trt_runtime.triton.processes import wait_for
from trt_runtime.triton.orphan import SHARED_MEMORY, segments, watch

_CHILD = """
import sys, time
from trt_runtime.triton.orphan import leave_with_server
leave_with_server()
print("watching", flush=True)
time.sleep(60)
"""
_PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]])
print(child.pid, flush=True)
time.sleep(60)
"""


def test_segments_are_the_files_that_the_command_line_names(tmp_path: Path) -> None:
    (tmp_path / "arrowhead_1").touch()
    (tmp_path / "another").touch()
    words = ["stub", "/models/arrowhead/1/model.py", "arrowhead_1", "1048576", "", "python"]
    assert segments(words, tmp_path) == [tmp_path / "arrowhead_1"]


@pytest.mark.parametrize("pidfd", [True, False])
def test_one_whose_parent_has_gone_removes_the_segment_and_leaves(
    pidfd: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(pid: int) -> int:
        raise OSError("no such system call")

    if not pidfd:
        monkeypatch.setattr(os, "pidfd_open", refused)
    ended = subprocess.Popen(["true"])
    ended.wait()
    segment, left = tmp_path / "arrowhead_1", []
    segment.touch()
    watch(ended.pid, [segment, tmp_path / "gone"], left.append)
    assert left == [1] and not segment.exists()


def test_a_child_stays_with_its_parent_and_goes_after_it() -> None:
    segment = SHARED_MEMORY / f"arrowhead_test_{uuid.uuid4().hex}"
    segment.touch()
    command = [sys.executable, "-c", _PARENT, _CHILD, segment.name]
    parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert parent.stdout.readline() == "watching\n"
    os.kill(child, 0)
    assert segment.exists()
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_for("the end of the child", lambda: not Path(f"/proc/{child}/cmdline").exists(), 10)
    assert not segment.exists()
    parent.stdout.close()
