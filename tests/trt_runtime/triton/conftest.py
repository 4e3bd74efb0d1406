"""A real tritonserver, micro bundles to serve, and their twins in process."""

from __future__ import annotations

import fcntl
import io
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.trt_runtime.triton.micro import make_bundle
from trt_runtime.pipeline import draw, load_pipeline, pictures_per_call
from trt_runtime.triton.environment import install
from trt_runtime.triton.server import Installation, find_server

ROOT = Path(__file__).parents[3]
Pixels = np.ndarray[Any, Any]


def decode(png: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(png)))


def assert_near(got: Pixels, expected: Pixels) -> None:
    """Equal within 1/255 on 99.9 % of the values: what another batch composition may change."""
    apart = np.abs(got.astype(int) - expected.astype(int))
    assert (apart <= 1).mean() >= 0.999, f"{(apart > 1).sum()} of {apart.size} values differ"


class Twin:
    """The runtime in process on the bundle that is served."""

    def __init__(self, bundle: Path) -> None:
        self.pipe = load_pipeline(bundle, threads=1)
        self.pipe.set_progress_bar_config(disable=True)
        self.rows = pictures_per_call(self.pipe.transformer)

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int], **more: Any) -> list[Pixels]:
        """Draw in one call, what is left of its rows filled with the last."""
        fill = self.rows - len(prompts)
        pictures = draw(
            self.pipe, [*prompts, *[prompts[-1]] * fill], [*seeds, *[seeds[-1]] * fill], **more
        )
        return [np.asarray(picture.image) for picture in pictures[: len(prompts)]]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """As the served models have it: threads change what a sum rounds to."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def installation() -> Installation:
    """The CPU server of build/triton-server, installed at the first use."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("no tritonserver: its wheel is for x86-64 Linux")
    folder = ROOT / "build" / "triton-server"
    folder.parent.mkdir(exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes come here together
        install(folder)
    return find_server(folder)


@pytest.fixture(scope="session")
def micro_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Exported micro bundles, by kind and seed of the plan."""
    made: dict[tuple[str, int], Path] = {}

    def get(kind: str, seed: int = 0) -> Path:
        key = (kind, seed)
        if key not in made:
            made[key] = make_bundle(kind, tmp_path_factory.mktemp(f"micro_{kind}"), seed=seed)
        return made[key]

    return get


@pytest.fixture(scope="session")
def twin(micro_bundle: Callable[..., Path]) -> Callable[..., Twin]:
    """Twins of the micro bundles."""
    made: dict[tuple[str, int], Twin] = {}

    def get(kind: str, seed: int = 0) -> Twin:
        if (kind, seed) not in made:
            made[kind, seed] = Twin(micro_bundle(kind, seed))
        return made[kind, seed]

    return get
