"""A copy of a bucket's graph that shows what each attention module put out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import onnx

from plans.bundle import BATCH, GraphSpec, TensorSpec, load_bundle
from plans.plan import load_plan

MERGED = "merged."  # and the module's name: what the export calls the operators' outputs
_ELEMENT = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}


@contextmanager
def exposed_graph(folder: Path | str, bucket: int) -> Iterator[GraphSpec]:
    """Give a graph with an output `merged.<module>` [B, S, H, D] per attention operator.

    It lies beside the bucket's graph, to name the same weights file, and is removed at the end.
    A module that only reads its cache has no operator and is left out.
    """
    folder = Path(folder)
    bundle = load_bundle(folder)
    graph = bundle.graph(bucket)
    model = onnx.load(str(folder / graph.file), load_external_data=False)
    names = {name for node in model.graph.node for name in node.output if name.startswith(MERGED)}
    kind = getattr(onnx.TensorProto, _ELEMENT[bundle.dtype])
    specs = []
    for module in load_plan(folder / bundle.plan_file).modules:
        name = MERGED + module.name
        if name in names:
            batch = bundle.batch if bundle.batch_range is None else BATCH
            shape = (batch, module.layout.seq_len, module.heads, module.head_dim)
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, shape))
            specs.append(TensorSpec(name, bundle.dtype, shape))
    path = folder / f".exposed_{graph.file}"
    try:
        path.write_bytes(model.SerializeToString())
        yield replace(graph, file=path.name, outputs=(*graph.outputs, *specs))
    finally:
        path.unlink(missing_ok=True)
