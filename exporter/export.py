"""Write a bundle: one graph per bucket, the dense graph, weights, plan and bundle.json."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from exporter.graphs import bucket_graph, cache_shape, dense_graph, fix_positions, shadow
from exporter.graphs import step_inputs as make_inputs
from exporter.weights import WeightsFile
from plans.bundle import (
    BATCH,
    BUNDLE_FILE,
    BatchRange,
    Bundle,
    CacheSpec,
    GraphSpec,
    TensorSpec,
    WeightSpec,
    save_bundle,
)
from plans.errors import ArrowheadError
from plans.models import complete_config, model_spec, weights_fingerprint
from plans.plan import CacheGroup, Plan, cache_flow, check_plan, save_plan
from plans.stock import check_stock

Progress = Callable[[str, int, int], None]  # what, done, total

WEIGHTS_FILE = "weights.bin"
PLAN_FILE = "plan.json"

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_NAMES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT64: "int64",
}
_MEBIBYTE = 2**20


def export_bundle(
    transformer: nn.Module,
    plan: Plan,
    folder: Path | str,
    *,
    dtype: str | torch.dtype,
    batch: int | tuple[int, int, int],
    source: str | None = None,
    dense: bool = True,
    buckets: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Export a diffusers SD3 or FLUX transformer as a bundle folder; the model stays as it is.

    dtype: float32, float16 or bfloat16 (fp32, fp16, bf16). batch: rows of one transformer call;
    (min, opt, max) makes graphs that take any number from min to max, tuned for opt.
    source: checkpoint the transformer was loaded from, a folder or a hub id (default: the plan's).
    buckets: of the plan, those to export (None: all); graphs of some are opened one by one.
    A bundle already in `folder` is replaced once the new one is complete. Raises ArrowheadError
    for a model, plan or option that cannot be exported, and when the disk is full.
    """
    name = _dtype_name(dtype)
    rows = _rows(batch)
    config = _check(transformer, plan)
    report = progress or (lambda what, done, total: None)
    plan = replace(plan, model=_model_ref(plan, source))
    with _folder_in_the_making(Path(folder)) as temporary:
        copy = shadow(transformer, _DTYPES[name])
        fix_positions(copy, plan)
        inputs = make_inputs(plan, config, rows.max, _DTYPES[name])
        dynamic = rows if rows.min < rows.max else None
        graphs, weights_sha256 = _write_graphs(
            copy, plan, inputs, dynamic, temporary, _chosen(plan, buckets, dense), report
        )
        save_plan(plan, temporary / PLAN_FILE)
        bundle = Bundle(
            plan_file=PLAN_FILE,
            plan_sha256=plan.sha256,
            model=_model_of_bundle(plan, Path(folder)),
            config=config,
            dtype=name,
            batch=rows.max,
            batch_range=dynamic,
            weights_file=WEIGHTS_FILE,
            weights_sha256=weights_sha256,
            cache_groups=tuple(_cache_spec(plan, group, rows) for group in cache_flow(plan).groups),
            graphs=tuple(graph for graph in graphs if graph.bucket is not None),
            dense=next((graph for graph in graphs if graph.bucket is None), None),
            versions=_versions(),
        )
        save_bundle(bundle, temporary)
    return bundle


def _dtype_name(dtype: str | torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    name = _SHORT.get(name, name)
    if name not in _DTYPES:
        raise ArrowheadError(
            "dtype", got=dtype, expected=f"one of {', '.join(_DTYPES)}", fix="pass one of them"
        )
    return name


def _rows(batch: int | tuple[int, int, int]) -> BatchRange:
    """Give min, opt and max rows of a call; one number is all three."""
    rows = BatchRange(*((batch,) * 3 if isinstance(batch, int) else batch))
    if not 1 <= rows.min <= rows.opt <= rows.max:
        raise ArrowheadError(
            "batch",
            got=batch if isinstance(batch, int) else list(batch),
            expected="rows of one transformer call, at least 1, or min <= opt <= max of them",
            fix="pass 2 per picture under classifier-free guidance, else 1",
        )
    return rows


def _cache_spec(plan: Plan, group: CacheGroup, rows: BatchRange) -> CacheSpec:
    batch, *others = cache_shape(plan, group, rows.max)
    return CacheSpec(group.name, group.heads, (batch if rows.min == rows.max else BATCH, *others))


def _check(transformer: nn.Module, plan: Plan) -> dict[str, Any]:
    """Refuse what cannot be exported; give the transformer's config as JSON types."""
    raw = {**getattr(transformer, "config", {}), "_class_name": type(transformer).__name__}
    spec = model_spec(
        raw,
        height=plan.height,
        width=plan.width,
        vae_scale_factor=plan.vae_scale_factor,
        text_tokens=plan.text_tokens,
        block=plan.block,
    )
    check_plan(plan, spec)
    check_stock(transformer, plan.modules)
    return complete_config(raw)


def _model_ref(plan: Plan, source: str | None) -> Any:
    if source is None:
        return plan.model
    path = Path(source)
    if not path.is_dir():
        return replace(plan.model, source=source)
    weights = path / "transformer"
    fingerprint = weights_fingerprint(weights) if weights.is_dir() else None
    return replace(plan.model, source=str(path.resolve()), weights_sha256=fingerprint)


def _model_of_bundle(plan: Plan, folder: Path) -> dict[str, Any]:
    source = plan.model.source
    if source is not None and Path(source).is_absolute():
        source = Path(os.path.relpath(source, folder.resolve())).as_posix()
    return asdict(replace(plan.model, source=source, config=None))


def _chosen(plan: Plan, buckets: Sequence[int] | None, dense: bool) -> list[int | None]:
    """Give the graphs to make; None stands for the stock dense one."""
    known = range(len(plan.buckets))
    for bucket in buckets or ():
        if bucket not in known:
            raise ArrowheadError(
                "buckets to export",
                got=bucket,
                expected=f"some of {list(known)}",
                fix="pass the plan's",
            )
    return [*(known if buckets is None else buckets), *([None] if dense else [])]


def _write_graphs(
    transformer: Any,
    plan: Plan,
    inputs: dict[str, Tensor],
    rows: BatchRange | None,
    folder: Path,
    buckets: Sequence[int | None],
    report: Progress,
) -> tuple[list[GraphSpec], str]:
    tensors = [*transformer.parameters(), *transformer.buffers()]
    total = sum(tensor.nbytes for tensor in tensors)
    _check_space(folder, total)

    def written(done: int) -> None:
        report("writing weights", done // _MEBIBYTE, max(done, total) // _MEBIBYTE)

    graphs = []
    with WeightsFile(folder / WEIGHTS_FILE, tensors, written) as weights:
        for done, bucket in enumerate(buckets):
            file = "dense.onnx" if bucket is None else f"bucket_{bucket}.onnx"
            report(f"exporting {file}", done, len(buckets))
            if bucket is None:
                model = dense_graph(transformer, plan, inputs, rows)
            else:
                model = bucket_graph(transformer, plan, bucket, inputs, rows)
            specs = weights.externalise(model)
            graphs.append(_write_graph(model, folder / file, bucket, specs))
    for graph in graphs:  # the checker wants the weights file complete
        onnx.checker.check_model(str(folder / graph.file))
    report("exported", len(buckets), len(buckets))
    return graphs, weights.sha256


def _write_graph(
    model: ir.Model, path: Path, bucket: int | None, weights: tuple[WeightSpec, ...]
) -> GraphSpec:
    path.write_bytes(ir.serde.serialize_model(model).SerializeToString())
    inputs, outputs = (
        tuple(_tensor_spec(value) for value in values)
        for values in (model.graph.inputs, model.graph.outputs)
    )
    return GraphSpec(path.name, bucket, inputs, outputs, weights)


def _tensor_spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None and value.shape is not None and value.dtype is not None
    shape = tuple(dim if isinstance(dim, int) else BATCH for dim in value.shape)
    return TensorSpec(value.name, _NAMES[value.dtype], shape)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise _no_space(folder.parent, f"{free / 2**30:.1f} GiB free", needed)


def _no_space(folder: Path, got: str, needed: int | None = None) -> ArrowheadError:
    room = "room for the weights" if needed is None else f"{needed / 2**30:.1f} GiB"
    return ArrowheadError(
        f"writing a bundle in {folder}",
        got=got,
        expected=room,
        fix="free space or export to another disk; nothing was left behind",
    )


@contextmanager
def _folder_in_the_making(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside the target that takes its place at the end, or vanishes."""
    target = target.absolute()
    if target.exists() and not (target / BUNDLE_FILE).is_file():
        if not target.is_dir() or any(target.iterdir()):
            raise ArrowheadError(
                f"output folder {target}",
                got="something that is not a bundle",
                expected="a new or empty folder, or a bundle to replace",
                fix="choose another folder",
            )
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp makes it private
        yield temporary
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    except OSError as error:
        raise _no_space(target.parent, f"{type(error).__name__}: {error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "onnx", "onnxscript", "diffusers", "arrowhead"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found
