"""A model's process goes when its server has gone, and takes its shared memory along.

A server that is killed, that crashes, or that ends at --exit-timeout-secs does not tell its models.
Triton's own watch (2.51) then waits for what the process does to end, which may be an answer that
nobody takes: the process would stay for ever, with its engines. Nor does it remove the segment.

The watch is a process of its own (12 MB, and ten looks a second): a server that crashes can take a
lock of the shared memory along, for which the model's process then waits and lets no thread of its
own run, since it holds Python's lock meanwhile.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
_LOOK_SECONDS = 0.1


def leave_with_server() -> subprocess.Popen[bytes]:
    """Start the watch over this process and the server, its parent.

    The watch ends with either; `stop` ends it before.
    """
    arguments = Path("/proc/self/cmdline").read_text().split("\0")
    watched = [os.getppid(), os.getpid(), *segments(arguments)]
    # Triton's stub has the interpreter that PATH names.
    return subprocess.Popen(
        [sys.executable or "python3", "-I", "-S", __file__, *map(str, watched)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def stop(watching: subprocess.Popen[bytes]) -> None:
    """End the watch, and take its exit status: a container's first process may take none."""
    watching.terminate()
    watching.wait()


def segments(arguments: list[str], folder: Path = SHARED_MEMORY) -> list[Path]:
    """Find the shared memory that a process was started on: Triton names it on its command line."""
    names = [word for word in arguments[1:] if word and "/" not in word]
    return [folder / name for name in names if os.path.isfile(folder / name)]  # False if too long


def watch(server: int, process: int, shared: list[Path]) -> None:
    """Wait until `process` is the server's child no more; end and remove what the server left."""
    while (runs := parent_and_group(process)) is not None and runs[0] == server:
        time.sleep(_LOOK_SECONDS)
    if runs is not None:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    elif parent_and_group(server) is not None:
        return  # the process has ended, and the server clears up after it
    for segment in shared:
        segment.unlink(missing_ok=True)


def parent_and_group(process: int | str) -> tuple[int, int] | None:
    """Look up a process; None if it has ended, also where nobody has taken its exit status yet."""
    try:
        line = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    state, parent, group = line.rpartition(")")[2].split()[:3]  # the name may hold anything
    return None if state in "ZX" else (int(parent), int(group))


if __name__ == "__main__":
    watch(int(sys.argv[1]), int(sys.argv[2]), [Path(name) for name in sys.argv[3:]])
