"""TensorRT's builder on a progress bar, and stopped by Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Phases:
    """The builder's nested phases as one share in 0..1, which never falls."""

    def __init__(self) -> None:
        self.share = 0.0
        self.innermost = ""
        self._open: list[tuple[str, list[int]]] = []  # name, [steps done, steps]; outermost first

    def start(self, name: str, steps: int) -> None:
        self._open.append((name, [0, max(steps, 1)]))
        self.innermost = name

    def step(self, name: str) -> None:
        for opened, counts in self._open:
            if opened == name:
                counts[0] = min(counts[0] + 1, counts[1])
        share = 0.0
        for _, (done, steps) in reversed(self._open):
            share = (done + share) / steps if done < steps else 1.0
        self.share = max(self.share, share)

    def finish(self, name: str) -> None:
        self._open = [phase for phase in self._open if phase[0] != name]


def progress_monitor(api: Any, show: Callable[[Phases], None], stopped: Callable[[], bool]) -> Any:
    """Make an IProgressMonitor that shows each step, and cancels the build once stopped() is true.

    An exception must not cross into the builder, so whoever wants to stop it says so by `stopped`.
    """

    class Monitor(api.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            api.IProgressMonitor.__init__(self)
            self.phases = Phases()

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.phases.start(name, steps)

        def phase_finish(self, name: str) -> None:
            self.phases.finish(name)

        def step_complete(self, name: str, step: int) -> bool:
            self.phases.step(name)
            show(self.phases)
            return not stopped()

    return Monitor()


@contextmanager
def interrupt_noted() -> Iterator[Callable[[], bool]]:
    """Note Ctrl-C instead of raising it inside; give what tells, and raise it at the end."""
    noted = threading.Event()
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, lambda *_: noted.set()) if in_main else None
    try:
        yield noted.is_set
    finally:
        if in_main:
            signal.signal(signal.SIGINT, before)
        if noted.is_set():
            raise KeyboardInterrupt
