"""The processes of a server, as the kernel lists them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from trt_runtime.triton.server import Server


def stubs(server: Server) -> list[int]:
    """Find the processes of a server's models."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes()
        except OSError:  # it ended meanwhile
            continue
        if b"triton_python_backend_stub" in words and server.shared_memory_prefix.encode() in words:
            found.append(int(folder.name))
    return found


def resident_bytes(pids: Sequence[int]) -> int:
    """Sum what the processes hold in memory."""
    total = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
    return total * 1024


def wait_for(what: str, happened: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:g} s"
        time.sleep(0.05)
