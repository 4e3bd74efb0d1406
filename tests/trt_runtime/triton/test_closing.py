"""When a stream's request gets the final flag: once, after its client has gone or had time."""

from __future__ import annotations

import time
from collections.abc import Iterator

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
def closing() -> Iterator[Closing]:
    owner = Closing(FINAL)
    yield owner
    owner.close()


def test_a_client_that_stays_has_time_to_read(closing: Closing) -> None:
    sender, started = Sender(), time.monotonic()
    closing.add(sender, 0.3)
    wait_for("the flag", lambda: bool(sender.flagged), 10)
    assert sender.flagged[0] - started >= 0.3


def test_one_that_has_gone_is_not_waited_for(closing: Closing) -> None:
    stays, leaves = Sender(), Sender()
    closing.add(stays, 60)
    closing.add(leaves, 60)
    time.sleep(0.1)
    assert not leaves.flagged
    leaves.cancelled, left = True, time.monotonic()
    wait_for("the flag", lambda: bool(leaves.flagged), 10)
    assert leaves.flagged[0] - left >= SETTLE_SECONDS and not stays.flagged


def test_at_the_end_all_get_it_and_none_twice(closing: Closing) -> None:
    senders = [Sender(cancelled=i % 2 == 0) for i in range(6)]
    for sender in senders:
        closing.add(sender, 60)
    closing.close()
    closing.close()
    assert [len(sender.flagged) for sender in senders] == [1] * 6


def test_one_that_fails_does_not_keep_the_others(closing: Closing) -> None:
    broken, sender = Sender(broken=True), Sender(cancelled=True)
    closing.add(broken, 60)
    closing.add(sender, 60)
    wait_for("the flag", lambda: bool(sender.flagged), 10)
    closing.close()
    assert len(sender.flagged) == 1 and not broken.flagged
