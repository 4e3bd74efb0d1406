"""The trained pipelines of the testbed on the real server, by the command line and its example."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.testbed.models import NAMES
from tests.trt_runtime.triton.conftest import ROOT, Twin, decode
from tests.trt_runtime.triton.trained import export, missing
from trt_runtime.cli import main
from trt_runtime.triton.client import Client
from trt_runtime.triton.server import Installation, Server

pytest.importorskip("tritonclient", reason="no tritonclient: pip install 'arrowhead[triton]'")
PROMPT = "a red circle above a blue square"


class Enough(Exception):
    """What the client raises when it has seen enough."""


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_trained_pipeline_from_the_command_line_to_pictures(
    name: str, installation: Installation, tmp_path: Path, capsys: Any
) -> None:
    if why := missing(name):
        pytest.skip(why)
    bundle, models = export(name, tmp_path / "bundle"), tmp_path / "models"
    assert installation.backends is not None
    written = ["triton", str(bundle), "--output", str(models), "--threads", "1"]
    assert main(written) == 0
    assert main([*written, "--kind", "stream", "--name", "arrowhead_stream", "--no-warmup"]) == 0
    told = capsys.readouterr().out
    assert "PROMPT_EMBEDS" in told and "tritonserver --model-repository=" in told
    twin = Twin(bundle)
    (expected,) = twin([PROMPT], [4])
    with Server(models, installation, start_seconds=240) as server:
        picture = tmp_path / "example.png"
        subprocess.run(
            [sys.executable, "-m", "trt_runtime.triton.client", "--address",
             f"127.0.0.1:{server.grpc}", "--model", "arrowhead_stream", "--stream", "--previews",
             "2", "--prompt", PROMPT, "--seed", "4", "--output", str(picture)],
            cwd=ROOT, check=True,
        )  # fmt: skip
        assert np.array_equal(np.asarray(Image.open(picture)), expected)
        preview = np.asarray(Image.open(picture.with_stem("example-step4")))
        assert preview.shape == expected.shape and not np.array_equal(preview, expected)
        with Client(f"127.0.0.1:{server.http}", protocol="http") as client:
            got = client.draw([PROMPT], seed=4)
        assert np.array_equal(decode(got.pictures[0]), expected)
        _cancel_within_a_step(server)


def _cancel_within_a_step(server: Server) -> None:
    """Hang up in the step after the first: that step is the last, or the one the word met."""

    def hang_up(done: int, _: list[bytes]) -> None:
        raise Enough

    def steps() -> float:
        return server.metric("arrowhead_steps_total", model="arrowhead_stream")

    before = steps()
    with Client(f"127.0.0.1:{server.grpc}", model="arrowhead_stream") as client:
        with pytest.raises(Enough):
            client.stream([PROMPT], seed=1, on_progress=hang_up)
        # This one waits until the cancelled call is over.
        whole = client.stream([PROMPT], seed=4)
    # The first step, the one that was under way when the word came, and one if it came late.
    assert 2 <= steps() - before - len(whole.timings[0]["steps"]) <= 3


@pytest.mark.slow
def test_check_loads_a_bundle_in_a_server(
    installation: Installation, micro_bundle: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    assert installation.backends is not None
    server = str(installation.backends.parent)
    written = ["triton", str(micro_bundle("flux")), "--output", str(tmp_path), "--threads", "1"]
    assert main([*written, "--check", "--server", server]) == 0
    assert "checked: arrowhead loads and drew a picture" in capsys.readouterr().out
