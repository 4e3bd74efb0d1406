"""The end of a stream: its request stays open a while after its last response.

Triton (2.51, and by its source later ones too) counts a request as over once it has the final flag,
also while the response that came with the flag is still being written to the client. If the client
cancels or dies in that moment, the gRPC front end waits for ever for a response that it has had:
request and model are never let go, and neither unloading nor stopping ends. So the flag goes alone,
after the client has gone or had time to read.
"""

from __future__ import annotations

import threading
import time
import traceback
from typing import Any

# For a client to read its last response; one that then hangs up need not wait.
LINGER_SECONDS = 2.0
ERROR_LINGER_SECONDS = 0.2  # an error is short, and waited for
# From a cancellation to the flag: the server's write to that client fails first.
SETTLE_SECONDS = 0.05
_LOOK_SECONDS = 0.02


class Closing:
    """Sends each response sender the final flag, once, from a thread of its own.

    final: the value of the flag.
    """

    def __init__(self, final: int) -> None:
        self._final = final
        self._due: dict[Any, float] = {}  # by sender: when it gets the flag at the latest
        self._cancelled: set[Any] = set()
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="closing", daemon=True)
        self._thread.start()

    def add(self, sender: Any, linger: float) -> None:
        """Take over a sender that has sent its last response, for so many seconds at most."""
        with self._changed:
            self._due[sender] = time.monotonic() + linger
            self._changed.notify()

    def close(self) -> None:
        """Send the flag to all that are left, and end the thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._due and not self._stopped:
                    self._changed.wait()
                if not self._due:
                    return
                senders = list(self._due)
            for sender in senders:
                try:
                    self._look(sender)
                except Exception as error:  # the others must get theirs
                    traceback.print_exception(error)
                    self._forget(sender)
            time.sleep(_LOOK_SECONDS)

    def _look(self, sender: Any) -> None:
        now = time.monotonic()
        if sender not in self._cancelled and sender.is_cancelled():
            self._cancelled.add(sender)
            self._due[sender] = min(self._due[sender], now + SETTLE_SECONDS)
        if self._stopped or now >= self._due[sender]:
            self._forget(sender)
            sender.send(flags=self._final)

    def _forget(self, sender: Any) -> None:
        with self._changed:
            self._due.pop(sender, None)
        self._cancelled.discard(sender)
