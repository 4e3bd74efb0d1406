"""When a stream's request gets the final flag: once, after its client has gone or had time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from tests.trt_runtime.triton.processes import wait_for
from trt_runtime.triton.closing import SETTLE_SECONDS, Closing

FINAL = 1


class Sender:
    """A response sender that notes when it was given the flag."""

    def __init__(self, *, cancelled: bool = False, broken: bool = False) -> None:
        self.cancelled, self.broken = cancelled, broken
        self.flagged: list[float] = []

    def is_cancelled(self) -> bool:
        if self.broken:
            raise RuntimeError("the server has gone")
        return self.cancelled

    def send(self, response: object = None, flags: int = 0) -> None:
        assert response is None and flags == FINAL
        self.flagged.append(time.monotonic())


@pytest.fixture
def closing() -> Iterator[Callable[[float], Closing]]:
    made: list[Closing] = []

    def make(linger: float) -> Closing:
        made.append(Closing(FINAL, linger=linger))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_a_client_that_stays_has_time_to_read(closing: Callable[[float], Closing]) -> None:
    sender, started = Sender(), time.monotonic()
    closing(0.3).add(sender)
    wait_for("the flag", lambda: bool(sender.flagged), 10)
    assert sender.flagged[0] - started >= 0.3


def test_one_that_has_gone_is_not_waited_for(closing: Callable[[float], Closing]) -> None:
    stays, leaves = Sender(), Sender()
    owner = closing(60)
    owner.add(stays)
    owner.add(leaves)
    time.sleep(0.1)
    assert not leaves.flagged
    leaves.cancelled, left = True, time.monotonic()
    wait_for("the flag", lambda: bool(leaves.flagged), 10)
    assert leaves.flagged[0] - left >= SETTLE_SECONDS and not stays.flagged


def test_at_the_end_all_get_it_and_none_twice(closing: Callable[[float], Closing]) -> None:
    senders = [Sender(cancelled=i % 2 == 0) for i in range(6)]
    owner = closing(60)
    for sender in senders:
        owner.add(sender)
    owner.close()
    owner.close()
    assert [len(sender.flagged) for sender in senders] == [1] * 6


def test_one_that_fails_does_not_keep_the_others(closing: Callable[[float], Closing]) -> None:
    broken, sender = Sender(broken=True), Sender(cancelled=True)
    owner = closing(60)
    owner.add(broken)
    owner.add(sender)
    wait_for("the flag", lambda: bool(sender.flagged), 10)
    owner.close()
    assert len(sender.flagged) == 1 and not broken.flagged
