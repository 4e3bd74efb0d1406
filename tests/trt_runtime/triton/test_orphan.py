"""A process that outlives its parent: it is ended, and the memory they shared removed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trt_runtime.triton.conftest import ROOT
from tests.trt_runtime.triton.processes import wait_for
from trt_runtime.triton.orphan import SHARED_MEMORY, parent_and_group, segments, watch

_CHILD = """
import ctypes, sys, time
from trt_runtime.triton.orphan import leave_with_server, stop
watching = leave_with_server()
print(watching.pid, flush=True)
how = sys.argv[2]
if how == "stops":
    stop(watching)
    print("stopped", flush=True)
if how != "ends":
    (ctypes.PyDLL(None) if how == "locked" else time).sleep(60)  # PyDLL: keeps Python's lock
"""
_PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]])
print(child.pid, flush=True)
time.sleep(60)
"""


def runs(pid: int) -> bool:
    return parent_and_group(pid) is not None


class Family:
    """A parent that shares memory with its child, and the child's watch."""

    def __init__(self, how: str) -> None:
        self.segment = SHARED_MEMORY / f"arrowhead_test_{uuid.uuid4().hex}"
        self.segment.touch()
        command = [sys.executable, "-c", _PARENT, _CHILD, self.segment.name, how]
        self.parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self.child, self.watch = int(self.line()), int(self.line())

    def line(self) -> str:
        assert self.parent.stdout is not None
        return self.parent.stdout.readline()

    def close(self) -> None:
        self.parent.kill()
        self.parent.wait()
        assert self.parent.stdout is not None
        self.parent.stdout.close()
        self.segment.unlink(missing_ok=True)


@pytest.fixture
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    made = Family(request.param)
    yield made
    made.close()


def test_segments_are_the_files_that_the_command_line_names(tmp_path: Path) -> None:
    (tmp_path / "arrowhead_1").touch()
    (tmp_path / "another").touch()
    words = ["stub", "/models/arrowhead/1/model.py", "arrowhead_1", "1048576", "", "python"]
    assert segments(words, tmp_path) == [tmp_path / "arrowhead_1"]


def test_a_process_that_nobody_waited_for_has_ended() -> None:
    process = subprocess.Popen(["true"], process_group=0)
    wait_for("its end", lambda: parent_and_group(process.pid) is None, 10)
    assert Path(f"/proc/{process.pid}").exists()
    process.wait()
    assert parent_and_group(os.getpid()) == (os.getppid(), os.getpgrp())


def test_memory_of_a_server_and_a_process_that_have_both_gone_is_removed(tmp_path: Path) -> None:
    ended = [subprocess.Popen(["true"]) for _ in range(2)]
    for each in ended:
        each.wait()
    segment = tmp_path / "arrowhead_1"
    segment.touch()
    watch(ended[0].pid, ended[1].pid, [segment, tmp_path / "gone"])
    assert not segment.exists()


def test_memory_of_a_server_that_runs_on_is_its_own(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    segment = tmp_path / "arrowhead_1"
    segment.touch()
    watch(os.getpid(), ended.pid, [segment])
    assert segment.exists()


@pytest.mark.parametrize("family", ["waits", "locked"], indirect=True)
def test_a_child_stays_with_its_parent_and_goes_after_it(family: Family) -> None:
    assert runs(family.child) and runs(family.watch) and family.segment.exists()
    family.parent.send_signal(signal.SIGKILL)
    wait_for("the end of the child", lambda: not runs(family.child), 10)
    wait_for("the end of the watch", lambda: not runs(family.watch), 10)
    assert not family.segment.exists()


@pytest.mark.parametrize("family", ["ends"], indirect=True)
def test_the_watch_goes_after_the_child_and_leaves_the_parent_its_memory(family: Family) -> None:
    wait_for("the end of the watch", lambda: not runs(family.watch), 10)
    assert runs(family.parent.pid) and family.segment.exists()


@pytest.mark.parametrize("family", ["stops"], indirect=True)
def test_a_watch_that_is_stopped_leaves_nothing_of_itself(family: Family) -> None:
    assert family.line() == "stopped\n"
    assert not Path(f"/proc/{family.watch}").exists() and runs(family.child)
