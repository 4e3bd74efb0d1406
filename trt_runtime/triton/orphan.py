"""A model's process goes when its server has gone, and takes its shared memory along.

A server that is killed, that crashes, or that ends at --exit-timeout-secs does not tell its models.
Triton's own watch (2.51) then waits for what the process does to end, which may be an answer that
nobody takes: the process would stay for ever, with its engines. Nor does it remove the segment.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
_LOOK_SECONDS = 0.1


def leave_with_server() -> None:
    """Watch over the server, this process's parent, from a thread."""
    arguments = Path("/proc/self/cmdline").read_text().split("\0")
    watching = (os.getppid(), segments(arguments))
    threading.Thread(target=watch, args=watching, name="orphan", daemon=True).start()


def segments(arguments: list[str], folder: Path = SHARED_MEMORY) -> list[Path]:
    """Find the shared memory that a process was started on: Triton names it on its command line."""
    names = [word for word in arguments[1:] if word and "/" not in word]
    return [folder / name for name in names if (folder / name).is_file()]


def watch(parent: int, shared: list[Path], leave: Callable[[int], object] = os._exit) -> None:
    """Wait until `parent` is the parent no more; then remove what was shared, and leave."""
    with suppress(OSError):  # a kernel without pidfd: only look now and then
        over = select.poll()
        over.register(os.pidfd_open(parent), select.POLLIN)
        over.poll()
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    for segment in shared:
        segment.unlink(missing_ok=True)
    leave(1)
