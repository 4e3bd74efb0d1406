"""The JSON beside each TensorRT engine, and the refusal of an engine that does not fit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from plans.bundle import Bundle, GraphSpec, TensorSpec, file_sha256
from plans.errors import ArrowheadError, atomic_write
from plans.json_files import check_format, dump_json, read_json
from plans.plan import Plan
from trt_runtime.tensorrt_library import PluginLibrary, TensorRT

FORMAT = "arrowhead.engine/1"
FOLDER = "tensorrt"  # of a bundle
_BUILD = "build it on this machine: arrowhead build BUNDLE --backend tensorrt"


@dataclass(frozen=True, kw_only=True)
class EngineMetadata:
    """What one engine file is; plans/schema/engine-1.schema.json says what each field means."""

    engine_bytes: int
    engine_sha256: str
    bucket: int | None
    steps: list[list[int]]
    graph_sha256: str
    weights_sha256: str
    plan_sha256: str
    architecture: str
    picture: list[int]
    scheduler: str
    num_steps: int
    dtype: str
    batch: list[int]
    arrowhead: str
    tensorrt: dict[str, str]
    plugin: dict[str, str] | None
    operators: dict[str, str]
    compute_capability: str | None
    device: str | None
    cuda: str | None
    driver: str | None
    weights: str
    shared_weights: list[str]
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    caches: list[dict[str, Any]]
    weights_bytes: int | None
    activation_bytes: int | None
    builder: dict[str, Any]
    built: str
    seconds: float
    verified: bool = False

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold it: inlined bodies ask the device for shapes mid-run."""
        return "function" not in self.operators.values()


def engine_path(folder: Path, graph: GraphSpec) -> Path:
    """Where the engine of a graph lies in its bundle."""
    return Path(folder) / FOLDER / Path(graph.file).with_suffix(".engine").name


def metadata_path(engine: Path) -> Path:
    return engine.with_name(engine.name + ".json")


def save_metadata(metadata: EngineMetadata, engine: Path) -> None:
    """Write the metadata; an engine without is none, so this comes after the engine itself."""
    atomic_write(metadata_path(engine), dump_json({"format": FORMAT, **asdict(metadata)}))


def load_metadata(engine: Path) -> EngineMetadata:
    """Read the metadata of an engine file. Raises ArrowheadError if either is not there."""
    path = metadata_path(engine)
    for needed in (engine, path):
        if not needed.is_file():
            raise ArrowheadError(
                f"engine {engine}",
                got=f"no file {needed.name}",
                expected="a complete engine and its metadata",
                fix=_BUILD,
            )
    subject = f"metadata {path}"
    data = read_json(path, subject)
    check_format(data, FORMAT, "engine-1.schema.json", subject)
    return EngineMetadata(**{name: value for name, value in data.items() if name != "format"})


def step_ranges(plan: Plan, bucket: int | None) -> list[list[int]]:
    """Half-open ranges of the steps that run a bucket; of all steps for the dense graph."""
    ranges: list[list[int]] = []
    for step, of_step in enumerate(plan.schedule):
        if bucket is not None and of_step != bucket:
            continue
        if ranges and ranges[-1][1] == step:
            ranges[-1][1] = step + 1
        else:
            ranges.append([step, step + 1])
    return ranges


def rows_of(bundle: Bundle) -> list[int]:
    """The min, opt and max rows that a bundle's engines are built for."""
    return list(bundle.batch_range or (bundle.batch,) * 3)


def check_engine(
    engine: Path,
    metadata: EngineMetadata,
    folder: Path,
    bundle: Bundle,
    graph: GraphSpec,
    trt: TensorRT,
    plugin: PluginLibrary | None,
    compute_capability: str,
) -> None:
    """Raise ArrowheadError, with the reason, unless the engine fits bundle, library and machine."""
    found = {
        "plan": (metadata.plan_sha256, bundle.plan_sha256),
        "graph": (metadata.graph_sha256, file_sha256(folder / graph.file)),
        "weights": (metadata.weights_sha256, bundle.weights_sha256),
    }
    for what, (got, expected) in found.items():
        if got != expected:
            raise _refusal(engine, f"built from {what} {got[:12]}", f"the bundle's {expected[:12]}")
    if metadata.batch != rows_of(bundle):
        raise _refusal(
            engine,
            f"built for min, opt and max rows {metadata.batch}",
            f"the bundle's {rows_of(bundle)}",
        )
    made_by, here = metadata.tensorrt, {"flavour": trt.flavour, "version": trt.version}
    if {name: made_by[name] for name in here} != here:
        raise _refusal(
            engine,
            f"built by {made_by['flavour']} {made_by['version']}",
            f"{trt.flavour} {trt.version}, which is what is installed",
        )
    built_for = metadata.compute_capability
    if built_for is not None and built_for != compute_capability:
        raise _refusal(
            engine,
            f"built for compute capability {built_for} ({metadata.device})",
            f"this GPU's {compute_capability}",
        )
    _check_plugin(engine, metadata, plugin)


def _check_plugin(engine: Path, metadata: EngineMetadata, plugin: PluginLibrary | None) -> None:
    if metadata.plugin is None:
        return
    wanted = f"plugin {metadata.plugin['version']}, build {metadata.plugin['build_id']}"
    if plugin is None:
        raise ArrowheadError(
            f"engine {engine}",
            got="no plugin library",
            expected=f"{wanted}, with which it was built",
            fix="run `make plugins`, or set ARROWHEAD_TRT_LIBRARY to the library",
        )
    if metadata.plugin != plugin.identity:
        raise _refusal(
            engine,
            f"built with {wanted}",
            f"plugin {plugin.version}, build {plugin.build_id} of {plugin.path}",
        )


def check_bytes(engine: Path, metadata: EngineMetadata) -> None:
    """Raise ArrowheadError unless the engine file's bytes are all there and as they were built."""
    size = engine.stat().st_size
    if size != metadata.engine_bytes:
        raise _refusal(engine, f"{size} bytes", f"{metadata.engine_bytes}: it is truncated")
    found = file_sha256(engine)
    if found != metadata.engine_sha256:
        raise _refusal(
            engine, f"sha256 {found[:12]}", f"{metadata.engine_sha256[:12]}: it is damaged"
        )


def _refusal(engine: Path, got: str, expected: str) -> ArrowheadError:
    return ArrowheadError(f"engine {engine}", got=got, expected=expected, fix=_BUILD)


def tensor_entry(spec: TensorSpec) -> dict[str, Any]:
    """A tensor as the metadata lists it."""
    return {**asdict(spec), "shape": list(spec.shape)}
