"""The plugins under the real parser and builder of TensorRT, without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from exporter.functions import function_protos
from tests.plugins.test_trt_plugin import LIBRARY, built, offline_environment

ROOT = Path(__file__).parents[2]
NAMED = {"plugin_namespace": "arrowhead"}
ATTRIBUTES = {
    "scale": 0.125, "text_tokens": 5, "text_first": 0, "block": 16, "half_windows": [-1, 0, 1],
}  # fmt: skip
SOURCE = {"source": [3, 0, 1, 4, 2]}
PLUGIN_NOT_FOUND = "Plugin not found"


def graph(
    op: str = "CachedHead",
    *,
    domain: str = "arrowhead",
    dtype: int = TensorProto.FLOAT16,
    batch: int | str = 2,
    cache_heads: int = 2,
    functions: bool = False,
    without: str = "",
    **attributes: Any,
) -> bytes:
    """One node of an operator on [B, 53, heads, 64]: three computed heads, five merged ones.

    cache_heads 0 leaves the cache unconnected.
    """
    cached = op == "CachedHead"
    heads = {"q": 3, "k": 3, "v": 3, **({"cache": cache_heads} if cached and cache_heads else {})}
    given = {**ATTRIBUTES, **(SOURCE if cached else {}), **attributes}
    given.pop(without, None)
    node = helper.make_node(op, list(heads), ["o"], name="x", domain=domain, **given)
    inputs = [
        helper.make_tensor_value_info(name, dtype, [batch, 53, count, 64])
        for name, count in heads.items()
    ]
    output = helper.make_tensor_value_info("o", dtype, [batch, 53, 5 if cached else 3, 64])
    opsets = [helper.make_opsetid("", 20)]
    if domain:
        opsets.append(helper.make_opsetid(domain, 1))
    model = helper.make_model(
        helper.make_graph([node], "g", inputs, [output]),
        opset_imports=opsets,
        functions=function_protos() if functions else [],
        ir_version=10,
    )
    return model.SerializeToString()


ACCEPTED = {
    "by domain": graph(),
    "by attribute": graph(domain="", **NAMED),
    "by both": graph(**NAMED),
    # A bundle's graphs: function bodies too, and the plugin is preferred to them.
    "by both, with functions": graph(functions=True, **NAMED),
    "arrow attention": graph("ArrowAttention", functions=True, **NAMED),
    "bfloat16": graph(dtype=TensorProto.BFLOAT16),
    "open batch": graph(batch="B"),
}
REFUSED = {
    "another namespace": (graph(domain="", plugin_namespace="other"), PLUGIN_NOT_FOUND),
    "no namespace": (graph(domain=""), PLUGIN_NOT_FOUND),
    "another version": (graph(plugin_version="2"), PLUGIN_NOT_FOUND),
    "no block": (graph(without="block"), "CachedHead 'x': field block | got no such field"),
    "scales": (
        graph(scale=[0.125, 0.125]),
        "CachedHead 'x': field scale | got 2 values of FLOAT32; expected 1 value of FLOAT32",
    ),
    "integer scale": (graph(scale=1), "CachedHead 'x': field scale | got"),
    "half windows": (graph(half_windows=[-1, -2, 0]), "half_windows | got [-1,-2,0]; expected"),
    "float32": (
        graph(dtype=TensorProto.FLOAT),
        "CachedHead 'x': input q | got FLOAT; expected HALF or BF16",
    ),
    "no cache": (graph(cache_heads=0), "tensors | got 3 in, 1 out; expected 4 in"),
    "small cache": (graph(cache_heads=1), "CachedHead 'x': field source | got head 4"),
    "heads": (
        graph(half_windows=[-1, 0]),
        "input q [B, S, heads, D] | got [2, 53, 3, 64]; expected 2 heads",
    ),
}


@pytest.fixture(scope="module")
def examined(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What TensorRT made of every graph."""
    environment = offline_environment()
    folder = tmp_path_factory.mktemp("graphs")
    models = {**ACCEPTED, **{name: model for name, (model, _) in REFUSED.items()}}
    paths = []
    for i, model in enumerate(models.values()):
        paths.append(folder / f"{i}.onnx")
        paths[-1].write_bytes(model)
    command = [sys.executable, "-m", "tests.plugins.trt_networks", LIBRARY, *paths]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(zip(models, json.loads(done.stdout.splitlines()[-1]), strict=True))


@built
@pytest.mark.parametrize("name", ACCEPTED)
def test_the_parser_takes_the_plugin_and_the_builder_builds_it(
    name: str, examined: dict[str, Any]
) -> None:
    model = onnx.load_from_string(ACCEPTED[name])
    cached = model.graph.node[0].op_type == "CachedHead"
    found = examined[name]
    assert found["parsed"], found["log"]
    assert found["layers"] == ["PLUGIN_V3"]
    shape, dtype = found["output"]
    assert shape == [-1 if name == "open batch" else 2, 53, 5 if cached else 3, 64]
    assert dtype == ("BF16" if name == "bfloat16" else "HALF")
    assert found["engine_bytes"] > 0, found["log"]
    assert found["fields"] == ["half_windows", "source"][: 1 + cached]
    assert "arrowhead:" not in found["log"]


@built
@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_with_a_reason(name: str, examined: dict[str, Any]) -> None:
    found = examined[name]
    assert not found.get("engine_bytes")
    assert REFUSED[name][1] in found["log"]
    if REFUSED[name][1] != PLUGIN_NOT_FOUND:
        assert found["log"].count("Fix: ") >= 1
