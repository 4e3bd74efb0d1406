from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from plans.bundle import (
    Bundle,
    CacheSpec,
    EngineSpec,
    GraphSpec,
    TensorSpec,
    WeightSpec,
    check_bundle,
    file_sha256,
    load_bundle,
    save_bundle,
)
from plans.errors import ArrowheadError
from plans.plan import cache_flow, dense_plan, save_plan
from tests.tiny import random_plan, tiny_sd3

PLAN = random_plan(tiny_sd3())


def _graph(bucket: int | None) -> GraphSpec:
    name = "dense" if bucket is None else f"bucket_{bucket}"
    return GraphSpec(
        f"{name}.onnx",
        bucket,
        (TensorSpec("hidden_states", "float16", ("B", 4, 8, 12)),),
        (TensorSpec("sample", "float16", ("B", 4, 8, 12)),),
        (
            WeightSpec("to_q.weight", 0, 64, "float16", (8, 4)),
            WeightSpec("to_q.weight[4:8]", 32, 32, "float16", (4, 4)),
            WeightSpec("rope", 64, 16, "float32", (4,)),
        ),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_plan(PLAN, tmp_path / "plan.json")
    (tmp_path / "weights.bin").write_bytes(bytes(range(80)))
    bundle = Bundle(
        plan_sha256=PLAN.sha256,
        model={"architecture": PLAN.model.architecture, "source": "../model"},
        config={"num_layers": 3},
        dtype="float16",
        batch=2,
        weights_file="weights.bin",
        weights_sha256=file_sha256(tmp_path / "weights.bin"),
        cache_groups=tuple(
            CacheSpec(g.name, g.heads, ("B", 29, len(g.heads), 8)) for g in cache_flow(PLAN).groups
        ),
        graphs=tuple(_graph(bucket) for bucket in range(len(PLAN.buckets))),
        dense=_graph(None),
        versions={"torch": "2.11"},
        engines=(EngineSpec("onnxruntime", 0, None, True, 1.5, {"onnxruntime": "1.22"}),),
    )
    for graph in bundle.all_graphs:
        (tmp_path / graph.file).write_bytes(b"onnx")
    save_bundle(bundle, tmp_path)
    return tmp_path


def test_bundles_survive_the_round_trip(folder: Path) -> None:
    bundle = load_bundle(folder)
    assert bundle.graphs == tuple(_graph(b) for b in range(len(PLAN.buckets)))
    assert bundle.dense == _graph(None) and bundle.graph(1).file == "bucket_1.onnx"
    assert isinstance(bundle.cache_groups[0], CacheSpec)
    before = (folder / "bundle.json").read_text()
    save_bundle(bundle, folder)
    assert (folder / "bundle.json").read_text() == before
    check_bundle(bundle, folder, PLAN, hash_weights=True)


def test_an_engine_that_is_gone_is_for_its_backend_to_miss(folder: Path) -> None:
    gone = EngineSpec("tensorrt", 0, "tensorrt/bucket_0.engine", False, 1.5, {})
    bundle = replace(load_bundle(folder), engines=(gone,))
    save_bundle(bundle, folder)
    check_bundle(load_bundle(folder), folder, PLAN)
    save_bundle(replace(bundle, engines=(replace(gone, file="../elsewhere"),)), folder)
    with pytest.raises(ArrowheadError, match="files inside the bundle folder"):
        load_bundle(folder)


def test_unknown_bucket_is_refused(folder: Path) -> None:
    with pytest.raises(ArrowheadError, match=r"bucket 9 .*expected one of \[0, 1, 2\]"):
        load_bundle(folder).graph(9)


def test_edited_plan_is_refused(folder: Path) -> None:
    with pytest.raises(ArrowheadError, match="edited after the export.*export the bundle again"):
        check_bundle(load_bundle(folder), folder, dense_plan(PLAN))


def test_missing_graph_is_refused(folder: Path) -> None:
    (folder / "bucket_1.onnx").unlink()
    with pytest.raises(ArrowheadError, match="no file bucket_1.onnx"):
        check_bundle(load_bundle(folder), folder, PLAN)


def test_truncated_weights_are_refused(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(bytes(79))
    with pytest.raises(ArrowheadError, match="79 bytes; expected at least 80: it is truncated"):
        check_bundle(load_bundle(folder), folder, PLAN)


def test_changed_weights_are_refused_when_hashed(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(bytes(80))
    bundle = load_bundle(folder)
    check_bundle(bundle, folder, PLAN)
    with pytest.raises(ArrowheadError, match="weights file .*got sha256"):
        check_bundle(bundle, folder, PLAN, hash_weights=True)


def test_graphs_caches_and_weights_must_be_the_plans(folder: Path) -> None:
    bundle = load_bundle(folder)
    wrong = replace(bundle.graphs[0], weights=(WeightSpec("w", 0, 60, "float16", (8, 4)),))
    cases = [
        (replace(bundle, graphs=bundle.graphs[:-1]), r"buckets \[0, 1\]; expected .* 3 buckets"),
        (replace(bundle, cache_groups=bundle.cache_groups[1:]), "caches of bundle"),
        (replace(bundle, graphs=(wrong, *bundle.graphs[1:])), "60 bytes; expected 64 for float16"),
    ]
    for broken, message in cases:
        with pytest.raises(ArrowheadError, match=message):
            check_bundle(broken, folder, PLAN)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "arrowhead.bundle/2", "expected arrowhead.bundle/1"),
        ("dtype", "int8", "dtype .*not one of"),
        ("weights_file", "../secret.bin", "inside the bundle folder"),
        ("plan_file", "/etc/plan.json", "inside the bundle folder"),
    ],
)
def test_broken_files_are_refused(folder: Path, key: str, value: str, message: str) -> None:
    data = json.loads((folder / "bundle.json").read_text())
    data[key] = value
    (folder / "bundle.json").write_text(json.dumps(data))
    with pytest.raises(ArrowheadError, match=message):
        load_bundle(folder)


def test_folder_without_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArrowheadError, match="bundle.json .*No such file"):
        load_bundle(tmp_path)
