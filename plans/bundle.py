"""bundle.json: the only seam between exporter and runtime."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from plans.cache_flow import cache_flow
from plans.errors import ArrowheadError, atomic_write
from plans.json_files import check_format, dump_json, read_json
from plans.plan import Plan

FORMAT = "arrowhead.bundle/1"
BUNDLE_FILE = "bundle.json"
BATCH = "B"  # a dynamic batch in a shape
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}
_EXPORT_AGAIN = "export the bundle again"


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output; "B" in the shape is a dynamic batch dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class WeightSpec:
    """An initializer whose bytes lie in the bundle's weights file.

    Several graphs may name the same or overlapping bytes: rows of one matrix.
    """

    name: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX graph; bucket None is the stock dense graph."""

    file: str
    bucket: int | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[WeightSpec, ...]


@dataclass(frozen=True)
class EngineSpec:
    """What a backend made of one graph; verified False was built but never run."""

    backend: str
    bucket: int | None
    file: str | None
    verified: bool
    seconds: float
    versions: dict[str, str]


class BatchRange(NamedTuple):
    """Rows of one transformer call that a bundle takes: least, tuned for, most."""

    min: int
    opt: int
    max: int


class CacheSpec(NamedTuple):
    """One cache buffer [B, S, Hg, D] by its group name."""

    name: str
    heads: tuple[int, ...]
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A folder of graphs with one weights file and the plan they were made from.

    model holds the fields of ModelRef with source resolvable from the bundle folder. batch counts
    rows of one transformer call, two per picture under classifier-free guidance: the number that
    all graphs hold, or the most that they take where batch_range lets it vary.
    """

    plan_file: str = "plan.json"
    plan_sha256: str
    model: dict[str, Any]
    config: dict[str, Any]
    dtype: str
    batch: int
    weights_file: str
    weights_sha256: str
    cache_groups: tuple[CacheSpec, ...]
    graphs: tuple[GraphSpec, ...]
    dense: GraphSpec | None
    versions: dict[str, str]
    engines: tuple[EngineSpec, ...] = field(default=())
    batch_range: BatchRange | None = None

    @property
    def rows(self) -> range:
        """The numbers of rows that a transformer call may have."""
        least = self.batch if self.batch_range is None else self.batch_range.min
        return range(least, self.batch + 1)

    def graph(self, bucket: int) -> GraphSpec:
        """Return the graph of one bucket."""
        for graph in self.graphs:
            if graph.bucket == bucket:
                return graph
        raise ArrowheadError(
            f"bucket {bucket}",
            got="no graph in the bundle",
            expected=f"one of {[graph.bucket for graph in self.graphs]}",
            fix=_EXPORT_AGAIN,
        )

    @property
    def all_graphs(self) -> tuple[GraphSpec, ...]:
        return self.graphs if self.dense is None else (*self.graphs, self.dense)


def load_bundle(folder: Path | str) -> Bundle:
    """Read a bundle folder's bundle.json; check_bundle compares it with the files beside it."""
    path = Path(folder) / BUNDLE_FILE
    subject = f"bundle {path}"
    data = read_json(path, subject)
    check_format(data, FORMAT, "bundle-1.schema.json", subject)
    fields = {name: value for name, value in data.items() if name != "format"}
    fields["cache_groups"] = tuple(
        CacheSpec(group["name"], tuple(group["heads"]), tuple(group["shape"]))
        for group in data["cache_groups"]
    )
    fields["graphs"] = tuple(_graph(graph) for graph in data["graphs"])
    fields["dense"] = None if data["dense"] is None else _graph(data["dense"])
    fields["engines"] = tuple(EngineSpec(**engine) for engine in data["engines"])
    if data.get("batch_range") is not None:
        fields["batch_range"] = BatchRange(*data["batch_range"])
    bundle = Bundle(**fields)
    rows = bundle.batch_range
    if rows is not None and not 1 <= rows.min <= rows.opt <= rows.max == bundle.batch:
        raise ArrowheadError(
            subject,
            got=f"batch_range {list(rows)} and batch {bundle.batch}",
            expected="1 <= min <= opt <= max, which is the batch",
            fix=_EXPORT_AGAIN,
        )
    for name in _file_names(bundle):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ArrowheadError(
                subject,
                got=f"file {name}",
                expected="files inside the bundle folder",
                fix=_EXPORT_AGAIN,
            )
    return bundle


def _graph(data: Mapping[str, Any]) -> GraphSpec:
    def shaped(entry: Mapping[str, Any]) -> dict[str, Any]:
        return {**entry, "shape": tuple(entry["shape"])}

    return GraphSpec(
        data["file"],
        data["bucket"],
        tuple(TensorSpec(**shaped(entry)) for entry in data["inputs"]),
        tuple(TensorSpec(**shaped(entry)) for entry in data["outputs"]),
        tuple(WeightSpec(**shaped(entry)) for entry in data["weights"]),
    )


def save_bundle(bundle: Bundle, folder: Path | str) -> None:
    """Write bundle.json into the folder."""
    data = {"format": FORMAT, **asdict(bundle)}
    if bundle.batch_range is None:
        del data["batch_range"]  # as bundles were before there were ranges
    data["cache_groups"] = [
        {"name": name, "heads": list(heads), "shape": list(shape)}
        for name, heads, shape in bundle.cache_groups
    ]
    atomic_write(Path(folder) / BUNDLE_FILE, dump_json(data))


def _exported_names(bundle: Bundle) -> Iterator[str]:
    yield bundle.plan_file
    yield bundle.weights_file
    yield from (graph.file for graph in bundle.all_graphs)


def _file_names(bundle: Bundle) -> Iterator[str]:
    yield from _exported_names(bundle)
    yield from (engine.file for engine in bundle.engines if engine.file is not None)


def check_bundle(
    bundle: Bundle, folder: Path | str, plan: Plan, *, hash_weights: bool = False
) -> None:
    """Raise ArrowheadError if the bundle's files or its plan are not those it was exported with.

    hash_weights reads the whole weights file; without it only its size is checked.
    """
    folder = Path(folder)
    if plan.sha256 != bundle.plan_sha256:
        raise ArrowheadError(
            f"plan of bundle {folder}",
            got=f"sha256 {plan.sha256[:12]}: edited after the export",
            expected=bundle.plan_sha256[:12],
            fix="restore the plan file, or export the bundle again with the edited plan",
        )
    # Engines are not looked for: whoever opens one says how to build it.
    for name in _exported_names(bundle):
        if not (folder / name).is_file():
            raise ArrowheadError(
                f"bundle {folder}",
                got=f"no file {name}",
                expected="all its files",
                fix=_EXPORT_AGAIN,
            )
    buckets = sorted(graph.bucket for graph in bundle.graphs if graph.bucket is not None)
    if buckets != list(range(len(plan.buckets))):
        raise ArrowheadError(
            f"graphs of bundle {folder}",
            got=f"buckets {buckets}",
            expected=f"one graph for each of the plan's {len(plan.buckets)} buckets",
            fix=_EXPORT_AGAIN,
        )
    _check_cache_groups(bundle, folder, plan)
    _check_weights(bundle, folder, hash_weights)


def _check_cache_groups(bundle: Bundle, folder: Path, plan: Plan) -> None:
    planned = [(group.name, group.heads) for group in cache_flow(plan).groups]
    exported = [(name, tuple(heads)) for name, heads, _ in bundle.cache_groups]
    if planned != exported:
        raise ArrowheadError(
            f"caches of bundle {folder}",
            got=f"{len(exported)} groups, {sorted(set(exported) - set(planned))[:3]} not planned",
            expected=f"the plan's {len(planned)} groups",
            fix=_EXPORT_AGAIN,
        )


def _check_weights(bundle: Bundle, folder: Path, hash_weights: bool) -> None:
    for graph in bundle.all_graphs:
        for weight in graph.weights:
            nbytes = math.prod(weight.shape) * ITEM_BYTES[weight.dtype]
            if weight.nbytes != nbytes:
                raise ArrowheadError(
                    f"weight {weight.name} of {graph.file}",
                    got=f"{weight.nbytes} bytes",
                    expected=f"{nbytes} for {weight.dtype} {list(weight.shape)}",
                    fix=_EXPORT_AGAIN,
                )
    path = folder / bundle.weights_file
    ends = (w.offset + w.nbytes for graph in bundle.all_graphs for w in graph.weights)
    needed, size = max(ends, default=0), path.stat().st_size
    if size < needed:
        raise ArrowheadError(
            f"weights file {path}",
            got=f"{size} bytes",
            expected=f"at least {needed}: it is truncated",
            fix="copy the file again in full, or export the bundle again",
        )
    if hash_weights and (found := file_sha256(path)) != bundle.weights_sha256:
        raise ArrowheadError(
            f"weights file {path}",
            got=f"sha256 {found[:12]}",
            expected=bundle.weights_sha256[:12],
            fix="copy the file again, or export the bundle again",
        )


def file_sha256(path: Path) -> str:
    """Hash a file of any size."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
