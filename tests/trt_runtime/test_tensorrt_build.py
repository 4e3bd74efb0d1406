"""Real engines of tiny pipelines' graphs: TensorRT's own parser and builder, without a GPU."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plans.bundle import ITEM_BYTES, Bundle, EngineSpec, TensorSpec, WeightSpec, load_bundle
from plans.cache_flow import cache_flow
from plans.plan import Plan
from plans.tiles import CACHED
from tests import tiny
from tests.trt_runtime import tensorrt_offline
from trt_runtime.engine_report import builder_memory, engine_rows, estimate
from trt_runtime.tensorrt_library import BUILT
from trt_runtime.tensorrt_metadata import load_metadata, metadata_path

Made = tuple[Path, Bundle, Plan]
Offline = Callable[..., "subprocess.CompletedProcess[str]"]

# The plugins compute heads of 64 and 128; function bodies take any.
_WIDE = {
    "sd3": lambda: tiny.tiny_sd3(num_layers=2, attention_head_dim=64, caption_projection_dim=256),
    "flux": lambda: tiny.tiny_flux(
        num_single_layers=1, attention_head_dim=64, axes_dims_rope=(16, 24, 24)
    ),
}
_DTYPES = {"sd3": ("fp16", "float16"), "flux": ("bf16", "bfloat16")}
# Rows of a call; where they are three, the batch is dynamic.
_BATCHES: dict[str, Any] = {"sd3": 2, "flux": 1, "sd3 range": (2, 4, 8), "flux range": (1, 2, 4)}

with_plugins = pytest.mark.skipif(
    not BUILT.is_file(), reason=f"no {BUILT.name}: run `make plugins`, which needs nvcc"
)


@pytest.fixture(scope="module")
def offline() -> Offline:
    """Run Python with arguments where `tensorrt` can be imported."""
    try:
        environment = tensorrt_offline.variables()
    except tensorrt_offline.Unavailable as error:
        pytest.skip(str(error))

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["python", *arguments],
            cwd=tensorrt_offline.ROOT, env={**environment, **variables}, capture_output=True,
            text=True, timeout=300, check=False,
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Exported bundles of two buckets, by kind."""
    pytest.importorskip("onnxscript")
    from exporter import export_bundle

    made: dict[str, Made] = {}

    def get(kind: str) -> Made:
        if kind not in made:
            model = _WIDE[kind.split()[0]]()
            plan = tiny.random_plan(model, buckets=2, steps=4)
            # A whole module from the cache, which has no operator; and every mode in one module.
            first, last = plan.modules[0].name, plan.modules[-1].name
            plan = tiny.with_modes(plan, {first: (-2,) * 4, last: (-2, 0, -2, -1)})
            folder = tmp_path_factory.mktemp(kind) / "bundle"
            dtype, batch = _DTYPES[kind.split()[0]][0], _BATCHES[kind]
            bundle = export_bundle(model, plan, folder, dtype=dtype, batch=batch, dense=False)
            made[kind] = (folder, bundle, plan)
        return made[kind]

    return get


def dims(spec: TensorSpec | WeightSpec) -> tuple[int, ...]:
    """A shape as TensorRT has it."""
    return tuple(-1 if isinstance(dim, str) else dim for dim in spec.shape)


def parsed(offline: Offline, folder: Path, weights: str, operators: str) -> dict[str, Any]:
    done = offline("-m", "tests.trt_runtime.tensorrt_worker", str(folder), weights, operators)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def build(offline: Offline, folder: Path, *options: str, **variables: str) -> str:
    done = offline(
        "-m", "trt_runtime.cli", "build", str(folder), "--backend", "tensorrt",
        "--optimization-level", "0", *options, **variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@with_plugins
@pytest.mark.parametrize("kind", _BATCHES)
def test_every_operator_is_a_plugin_with_its_attributes(
    kind: str, offline: Offline, bundles: Callable[[str], Made]
) -> None:
    folder, bundle, plan = bundles(kind)
    report = parsed(offline, folder, "embedded", "plugins")
    dtype = _DTYPES[kind.split()[0]][1]
    batch = bundle.batch if bundle.batch_range is None else -1
    for graph in bundle.graphs:
        assert graph.bucket is not None
        found = report["graphs"][graph.file]
        modes = plan.buckets[graph.bucket].modes
        computed = {m.name: m for m in plan.modules if set(modes[m.name]) != {CACHED}}
        assert found["operators"] == dict.fromkeys(computed, "plugin")
        assert set(found["plugins"]) == set(computed)
        for name, module in computed.items():
            plugin, row = found["plugins"][name], modes[name]
            cached = CACHED in row
            assert (plugin["name"], plugin["version"], plugin["namespace"]) == (
                "CachedHead" if cached else "ArrowAttention", "1", "arrowhead",
            )  # fmt: skip
            fresh = [mode for mode in row if mode != CACHED]
            attributes = plugin["attributes"]
            assert attributes["half_windows"] == fresh
            assert attributes["text_first"] == int(module.layout.text_first)
            assert attributes["text_tokens"] == module.layout.text_tokens
            assert attributes["block"] == module.layout.block
            assert attributes["scale"] == pytest.approx(64**-0.5)
            if cached:
                assert sorted(attributes["source"]) == [0, 1, 2, 3]
            seq = module.layout.seq_len
            heads = [len(fresh)] * 3 + [row.count(CACHED)] * cached
            assert plugin["inputs"] == [[dtype, [batch, seq, h, 64]] for h in heads]
            assert plugin["output"] == [dtype, [batch, seq, 4, 64]]


@pytest.mark.parametrize("kind", _BATCHES)
def test_without_the_library_bodies_are_inlined_and_matrices_are_inputs(
    kind: str, offline: Offline, bundles: Callable[[str], Made]
) -> None:
    folder, bundle, _ = bundles(kind)
    report = parsed(offline, folder, "shared", "bodies")
    assert (report["flavour"], report["version"]) == ("TensorRT-RTX", "1.7.1")
    assert report["plugin"] is None
    for graph in bundle.graphs:
        found = report["graphs"][graph.file]
        assert set(found["operators"].values()) == {"function"}
        assert found["plugins"] == {}
        inputs = {name: (dtype, tuple(shape)) for name, dtype, shape in found["inputs"]}
        outputs = {name: (dtype, tuple(shape)) for name, dtype, shape in found["outputs"]}
        matrices = {w.name for w in graph.weights if len(w.shape) > 1}
        # A convolution's weights are the layer's own, no constant: SD3's patch embedding.
        shared = set(inputs) - {s.name for s in graph.inputs}
        assert {name for name in matrices - shared if "pos_embed.proj" not in name} == set()
        assert shared <= matrices
        assert any(".rows_" in name for name in shared) == (graph.bucket == 1)
        for spec in (*graph.inputs, *(w for w in graph.weights if w.name in shared)):
            assert inputs[spec.name] == (spec.dtype, dims(spec))
        assert outputs == {s.name: (s.dtype, dims(s)) for s in graph.outputs}
        constants = set(found["constants"])
        assert not constants & shared
        assert {w.name for w in graph.weights if len(w.shape) == 1} <= constants


@with_plugins
@pytest.mark.parametrize("kind", _BATCHES)
def test_engines_are_built_marked_and_listed(
    kind: str, offline: Offline, bundles: Callable[[str], Made]
) -> None:
    folder, bundle, plan = bundles(kind)
    said = build(offline, folder)
    assert "device memory for a run: weights" in said
    assert "this machine cannot run these engines" in said
    engines = load_bundle(folder).engines
    assert [(e.bucket, e.file, e.verified) for e in engines] == [
        (0, "tensorrt/bucket_0.engine", False), (1, "tensorrt/bucket_1.engine", False),
    ]  # fmt: skip
    for engine in engines:
        assert engine.versions["TensorRT-RTX"] == "1.7.1"
        assert engine.file is not None
        check_metadata(folder / engine.file, bundle, plan, engine)
    first, second = (folder / f"tensorrt/bucket_{bucket}.engine" for bucket in (0, 1))
    times = [path.stat().st_mtime_ns for path in (first, second)]
    second.write_bytes(second.read_bytes()[:-1])
    build(offline, folder)  # again: what is whole is kept
    assert first.stat().st_mtime_ns == times[0] and second.stat().st_mtime_ns != times[1]
    assert load_metadata(second).engine_bytes == second.stat().st_size
    rows = engine_rows(folder, "tensorrt")
    assert [row["graph"] for row in rows] == ["bucket_0.onnx", "bucket_1.onnx"]
    assert all(row["engine"] > 1000 and row["activations"] > 0 for row in rows)
    assert rows[1]["layers with full"] >= 1 and rows[1]["cached"] >= 2


def check_metadata(path: Path, bundle: Bundle, plan: Plan, engine: EngineSpec) -> None:
    metadata = load_metadata(path)
    assert metadata.engine_bytes == path.stat().st_size
    assert metadata.plan_sha256 == bundle.plan_sha256
    assert metadata.weights_sha256 == bundle.weights_sha256
    assert set(metadata.operators.values()) == {"plugin"}
    assert metadata.plugin is not None and len(metadata.plugin["build_id"]) == 16
    assert metadata.compute_capability is None and not metadata.verified
    assert metadata.weights == "shared" and metadata.weights_bytes is not None
    assert metadata.batch == list(bundle.batch_range or (bundle.batch,) * 3)
    assert metadata.builder["optimization_level"] == 0 and "TF32" not in metadata.builder["flags"]
    covered = [step for begin, end in metadata.steps for step in range(begin, end)]
    assert covered == [s for s, bucket in enumerate(plan.schedule) if bucket == engine.bucket]
    flow = cache_flow(plan)
    assert engine.bucket is not None
    assert {entry["name"] for entry in metadata.caches} == {
        *(f"cache_in.{group.name}" for group in flow.reads(engine.bucket)),
        *(f"cache_out.{group.name}" for group in flow.writes(engine.bucket)),
    }


@pytest.mark.parametrize("kind", ["sd3", "flux range"])
def test_a_body_builds_with_embedded_weights_and_says_that_it_is_one(
    kind: str, offline: Offline, bundles: Callable[[str], Made]
) -> None:
    folder, bundle, _ = bundles(kind)
    script = (
        "import sys; from pathlib import Path; from trt_runtime.bundles import open_bundle\n"
        "from trt_runtime.tensorrt_build import BuildSettings, build_engine\n"
        "folder = Path(sys.argv[1]); bundle, plan = open_bundle(folder)\n"
        "settings = BuildSettings(weights='embedded', optimization_level=0, plugins=False)\n"
        "build_engine(folder, bundle, plan, bundle.graph(1), settings)\n"
    )
    done = offline("-c", script, str(folder))
    assert done.returncode == 0, done.stderr
    metadata = load_metadata(folder / "tensorrt" / "bucket_1.engine")
    assert metadata.plugin is None and not metadata.capturable
    assert set(metadata.operators.values()) == {"function"}
    assert metadata.shared_weights == []
    assert metadata.batch == list(bundle.batch_range or (bundle.batch,) * 3)
    matrices = sum(w.nbytes for w in bundle.graph(1).weights if len(w.shape) > 1)
    assert metadata.weights_bytes is not None and metadata.weights_bytes > 0.9 * matrices


def test_refusals_before_the_work(offline: Offline, bundles: Callable[[str], Made]) -> None:
    folder, _, _ = bundles("sd3")
    build_verb = ("-m", "trt_runtime.cli", "build", str(folder), "--backend", "tensorrt")
    stripped = offline(*build_verb, "--strip-weights")
    assert stripped.returncode == 2
    assert "--strip-weights | got TensorRT-RTX 1.7.1; expected TensorRT" in stripped.stderr
    absent = offline(*build_verb, ARROWHEAD_TRT_LIBRARY="absent.so")
    assert absent.returncode == 2 and "plugin library | got no file at absent.so" in absent.stderr
    other = next(Path(tensorrt_offline.variables()["LD_LIBRARY_PATH"]).glob("libnvonnxparser*"))
    wrong = offline(*build_verb, ARROWHEAD_TRT_LIBRARY=str(other))
    assert wrong.returncode == 2 and "plugin library | got another kind of file" in wrong.stderr
    script = (
        "import sys; from pathlib import Path\n"
        "from trt_runtime.tensorrt_library import register, tensorrt\n"
        "register(tensorrt(), Path(sys.argv[1]))\n"
    )
    missed = offline("-c", script, str(other))
    assert "got no creator of ArrowAttention and CachedHead (registered: " in missed.stderr
    assert "ROIAlign_TRT version '2' namespace ''" in missed.stderr
    assert "expected each with version '1' and namespace 'arrowhead'" in missed.stderr
    load = "import sys, trt_runtime; trt_runtime.load_transformer(sys.argv[1], backend='tensorrt')"
    opened = offline("-c", load, str(folder))
    assert "backend tensorrt | got no NVIDIA GPU" in opened.stderr


def test_the_stand_in_asks_nothing_that_the_bindings_have_not(offline: Offline) -> None:
    """Names of methods, and of their parameters, of fake_tensorrt.py."""
    script = (
        "import inspect, tensorrt\n"
        "from tests.trt_runtime import fake_tensorrt as fake\n"
        "pairs = {'Context': 'IExecutionContext', 'Engine': 'ICudaEngine', 'Runtime': 'Runtime',\n"
        "         'Refitter': 'Refitter', 'OnnxParserRefitter': 'OnnxParserRefitter'}\n"
        "for ours, theirs in pairs.items():\n"
        "    real = getattr(tensorrt, theirs)\n"
        "    for name, method in inspect.getmembers(getattr(fake, ours), inspect.isfunction):\n"
        "        if name.startswith('_'): continue\n"
        "        said = getattr(real, name).__doc__\n"
        "        for parameter in list(inspect.signature(method).parameters)[1:]:\n"
        "            assert f'{parameter}:' in said, (theirs, name, parameter)\n"
        "        print(theirs, name)\n"
        "for name in ('device_memory_size_v2', 'num_io_tensors'):\n"
        "    assert isinstance(getattr(tensorrt.ICudaEngine, name), property)\n"
    )
    done = offline("-c", script)
    assert done.returncode == 0, done.stderr
    assert "IExecutionContext execute_async_v3" in done.stdout
    assert len(done.stdout.splitlines()) >= 12


def test_ctrl_c_leaves_nothing_that_looks_like_an_engine(
    offline: Offline, bundles: Callable[[str], Made]
) -> None:
    folder, _, _ = bundles("flux")
    engine = folder / "tensorrt" / "bucket_0.engine"
    for path in (engine, metadata_path(engine)):
        path.unlink(missing_ok=True)
    script = (
        "import sys; from pathlib import Path; from trt_runtime.bundles import open_bundle\n"
        "import os, signal\n"
        "from trt_runtime.tensorrt_build import BuildSettings, build_engine\n"
        "folder = Path(sys.argv[1]); bundle, plan = open_bundle(folder)\n"
        "press = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        "settings = BuildSettings(plugins=False)\n"
        "build_engine(folder, bundle, plan, bundle.graph(0), settings, press)\n"
    )
    started = time.monotonic()
    done = offline("-c", script, str(folder))
    assert done.returncode in (1, -signal.SIGINT, 128 + signal.SIGINT)
    assert done.stderr.strip().endswith("KeyboardInterrupt"), done.stderr
    assert time.monotonic() - started < 60
    assert not engine.exists() and not metadata_path(engine).exists()
    assert list((folder / "tensorrt").glob(".*")) == []


def test_the_estimate_adds_up(bundles: Callable[[str], Made]) -> None:
    folder, bundle, plan = bundles("sd3")
    shared, embedded = estimate(folder, "shared"), estimate(folder, "embedded")
    assert shared["weights"] < embedded["weights"]
    assert shared["weights"] <= (folder / bundle.weights_file).stat().st_size
    assert shared["together"] == sum(shared.values()) - shared["together"]
    # A block's own, and what the first bucket, all full, writes to caches.
    module, groups = plan.modules[0], cache_flow(plan).groups
    heads = sum(len(group.heads) for group in groups if 0 in group.writers)
    assert 0 < heads < sum(module.heads for module in plan.modules)
    item = ITEM_BYTES[bundle.dtype] * bundle.batch * module.layout.seq_len * module.head_dim
    assert shared["activations (about)"] == item * (20 * module.heads + heads)
    host = builder_memory(folder, "embedded") - builder_memory(folder, "shared")
    assert host > 3 * (embedded["weights"] / len(bundle.graphs))
