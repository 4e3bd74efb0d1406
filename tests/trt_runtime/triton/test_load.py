"""The load tool: its loops and percentiles alone, and once against the real server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plans.errors import ArrowheadError
from trt_runtime.cli import main
from trt_runtime.triton.load import Sample, bench_serve, closed_loop, open_loop, summary
from trt_runtime.triton.server import SERVER_VARIABLE, Installation


class Slow:
    """Answers that take a while, and how many were under way at once."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now, self.most = seconds, 0, 0
        self.lock = threading.Lock()

    def __call__(self, index: int) -> Sample:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(self.seconds)
        with self.lock:
            self.now -= 1
        return Sample(self.seconds, self.seconds / 2, 0.0, "full" if index == 3 else "")


@pytest.mark.parametrize("clients", [1, 3])
def test_a_closed_loop_keeps_its_clients_busy(clients: int) -> None:
    send = Slow(0.02)
    samples, seconds = closed_loop(send, 9, clients)
    assert send.most == clients and len(samples) == 9
    assert seconds >= 9 / clients * 0.02


def test_an_open_loop_sends_whether_or_not_it_is_answered() -> None:
    send = Slow(0.2)
    samples, seconds = open_loop(send, 10, rate=50, limit=10)
    assert send.most > 5 and 0.38 <= seconds < 2
    assert len(samples) == 10


def test_an_open_loop_that_falls_behind_shows_in_the_latency() -> None:
    samples, _ = open_loop(Slow(0.05), 6, rate=1000, limit=1)
    assert samples[-1].seconds > 5 * 0.05


def test_summary() -> None:
    samples = [Sample(0.1 * (i + 1), 0.05, 0.01) for i in range(9)] + [Sample(0, 0, 0, "refused")]
    report = summary(samples, 4.5)
    assert (report["requests"], report["errors"], report["first_error"]) == (10, 1, "refused")
    assert report["pictures_per_second"] == pytest.approx(2.0)
    assert report["p50_seconds"] == pytest.approx(0.5)
    assert report["overhead_p50_ms"] == pytest.approx(440)
    assert summary([Sample(0, 0, 0, "refused")], 1.0)["pictures_per_second"] == 0


@pytest.mark.parametrize(
    "wrong", [{"requests": 0}, {"concurrency": 65}, {"rate": -1.0}, {"requests": 10**9}]
)
def test_loads_without_bounds_are_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ArrowheadError, match="bench serve .* expected 1 to 100000 requests"):
        bench_serve(tmp_path, Installation(tmp_path), ["a"], **wrong)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_bench_serve(
    protocol: str,
    micro_bundle: Callable[..., Path],
    installation: Installation,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: Any,
) -> None:
    assert installation.backends is not None
    monkeypatch.setenv(SERVER_VARIABLE, str(installation.backends.parent))
    target = tmp_path / "report.json"
    code = main(
        ["bench", "serve", str(micro_bundle("sd3")), "--requests", "8", "--concurrency", "2",
         "--threads", "1", "--protocol", protocol, "--prompt", "a red circle", "--no-warmup",
         "--json", str(target)]
    )  # fmt: skip
    report = json.loads(target.read_text())
    assert code == 0, report
    for part in ("in_process", "one_client", "closed_loop", "open_loop"):
        assert report[part]["requests"] == 8 and report[part]["errors"] == 0
    # The bound, 5 ms, is held on a quiet machine; tests run on busy ones.
    assert 0 < report["one_client"]["overhead_p50_ms"] < 100
    assert "overhead of serving a picture" in capsys.readouterr().out
