"""Which engine is refused, and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from plans.errors import ArrowheadError
from tests.tiny import random_plan, tiny_sd3
from tests.trt_runtime.fake_engines import PLUGIN, Built, graph_of
from trt_runtime.tensorrt_library import PluginLibrary, TensorRT
from trt_runtime.tensorrt_metadata import (
    check_engine,
    load_metadata,
    metadata_path,
    save_metadata,
    step_ranges,
)

HERE = TensorRT(None, "TensorRT", "11.4.0", None)


@pytest.fixture
def built(tmp_path: Path) -> Built:
    return Built(tmp_path, graph_of())


def check(built: Built, library: PluginLibrary | None = PLUGIN, **changes: Any) -> None:
    """Check an engine whose metadata has these changes, with a library loaded or none."""
    graph = built.bundle.graphs[0]
    path = built.write(graph, **changes)
    metadata = load_metadata(path)
    check_engine(path, metadata, built.folder, built.bundle, graph, HERE, library, "9.0")


def test_engines_that_fit_pass(built: Built) -> None:
    check(built)
    check(built, compute_capability=None)  # built ahead of time, for every GPU
    check(built, library=None, plugin=None)  # which has none in it


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"plan_sha256": "b" * 64}, "built from plan bbbbbbbbbbbb; expected the bundle's aaaaaaaaaaaa"),
    ({"graph_sha256": "b" * 64}, "built from graph bbbbbbbbbbbb; expected the bundle's"),
    ({"weights_sha256": "b" * 64}, "built from weights bbbbbbbbbbbb; expected the bundle's"),
    (
        {"tensorrt": {"flavour": "TensorRT", "version": "10.13.0", "bindings": "10.13.0.1"}},
        "built by TensorRT 10.13.0; expected TensorRT 11.4.0, which is what is installed",
    ),
    (
        {"tensorrt": {"flavour": "TensorRT-RTX", "version": "11.4.0", "bindings": "11.4"}},
        "built by TensorRT-RTX 11.4.0; expected TensorRT 11.4.0",
    ),
    (
        {"compute_capability": "8.9", "device": "NVIDIA L40S"},
        r"built for compute capability 8.9 \(NVIDIA L40S\); expected this GPU's 9.0",
    ),
    (
        {"plugin": {"version": "0.1.0", "build_id": "f" * 16}},
        "built with plugin 0.1.0, build ffffffffffffffff; expected plugin 0.1.0, build 0123",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSALS)
def test_an_engine_that_does_not_fit_is_refused(
    built: Built, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArrowheadError, match=message):
        check(built, **changes)


def test_a_missing_plugin_library_is_named(built: Built) -> None:
    with pytest.raises(
        ArrowheadError, match="no plugin library; expected plugin 0.1.0, build 0123"
    ):
        check(built, library=None)


def test_steps_are_half_open_ranges() -> None:
    plan = replace(random_plan(tiny_sd3()), schedule=(0, 1, 1, 2, 1, 0))
    assert step_ranges(plan, 1) == [[1, 3], [4, 5]]
    assert step_ranges(plan, 0) == [[0, 1], [5, 6]]
    assert step_ranges(plan, None) == [[0, 6]]


def test_metadata_survives_the_round_trip_and_strangers_are_refused(built: Built) -> None:
    path = built.write(built.bundle.graphs[0])
    metadata = load_metadata(path)
    save_metadata(replace(metadata, verified=True), path)
    assert load_metadata(path) == replace(metadata, verified=True)
    text = metadata_path(path).read_text()
    metadata_path(path).write_text(text.replace('"bucket"', '"bukket"'))
    with pytest.raises(ArrowheadError, match="engine-1.schema.json"):
        load_metadata(path)
