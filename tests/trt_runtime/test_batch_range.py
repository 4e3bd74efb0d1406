"""Bundles that take a range of rows: exported, compared, run, served, refused outside of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from exporter import export_bundle
from plans.bundle import BatchRange, load_bundle, save_bundle
from plans.errors import ArrowheadError
from plans.plan import save_plan
from tests import tiny
from tests.trt_runtime.conftest import Made, sampled_plan, save_pipeline
from trt_runtime import load_pipeline, load_transformer
from trt_runtime.build import build
from trt_runtime.cli import main
from trt_runtime.engine import DTYPES, shape_of
from trt_runtime.parity import compare_graphs, first_departure
from trt_runtime.pipeline import draw, fill, generate, pictures_per_call
from trt_runtime.triton.request import Asked
from trt_runtime.triton.service import PictureService

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

Bundles = Callable[[str], Made]
# One to three pictures a call, of two rows each under classifier-free guidance.
RANGES = {"sd3": BatchRange(2, 4, 6), "flux": BatchRange(1, 2, 3)}
PROMPTS = ["a cat", "a dog", "a red circle", "two squares", "a star"]


@pytest.fixture(params=RANGES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def ranged(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """Exported bundles by kind, each beside its pipeline; buckets of every mode, and the dense."""
    made: dict[str, Made] = {}

    def get(kind: str) -> Made:
        if kind not in made:
            root = tmp_path_factory.mktemp(f"range_{kind}")
            if kind == "sd3":
                model = tiny.tiny_sd3(num_layers=2)
            else:
                model = tiny.tiny_flux(num_layers=1, num_single_layers=1)
            save_pipeline(model, root / "model")
            plan = sampled_plan(tiny.random_plan(model, buckets=2, steps=4), kind)
            plan = tiny.with_modes(plan, {plan.modules[-1].name: (-2, 0, -2, -1)})
            bundle = export_bundle(
                model, plan, root / "bundle", dtype="fp32", batch=RANGES[kind],
                source=str(root / "model"),
            )  # fmt: skip
            made[kind] = (root / "bundle", bundle, plan)
        return made[kind]

    return get


def pipeline_of(folder: Path, **options: Any) -> Any:
    pipe = load_pipeline(folder, poison=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def rows_run(pipe: Any) -> int:
    """Rows of the last run; FLUX names its one context."""
    (context,) = pipe.transformer.state._contexts.values()
    return context.rows


def test_graphs_and_bundle_say_the_range(kind: str, ranged: Bundles) -> None:
    folder, bundle, _ = ranged(kind)
    rows = RANGES[kind]
    assert (bundle.batch_range, bundle.batch) == (rows, rows.max)
    assert load_bundle(folder) == bundle
    assert bundle.rows == range(rows.min, rows.max + 1)
    data = json.loads((folder / "bundle.json").read_text())
    assert data["batch_range"] == list(rows)
    for graph in bundle.all_graphs:
        model = onnx.load(folder / graph.file, load_external_data=False)
        for spec, value in zip(
            (*graph.inputs, *graph.outputs), (*model.graph.input, *model.graph.output), strict=True
        ):
            dims = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            assert dims == list(spec.shape) and dims.count("B") == 1 and dims[0] == "B"
        if graph.bucket is not None:  # Reshape works the batch out: nothing asks for shapes
            assert "Shape" not in {node.op_type for node in model.graph.node}
    assert all(spec.shape[0] == "B" for spec in bundle.cache_groups)


def test_every_graph_agrees_with_pytorch_at_both_ends(kind: str, ranged: Bundles) -> None:
    folder, bundle, _ = ranged(kind)
    ends = [bundle.rows[0], bundle.rows[-1]]
    found = compare_graphs(folder, threads=1)
    assert [(row.bucket, row.rows) for row in found] == [(b, n) for b in (0, 1, None) for n in ends]
    assert all(row.passed for row in found), found
    assert max(row.max_abs for row in found) < 1e-4


@pytest.mark.parametrize(
    ("backend", "options"), [("onnxruntime", {}), ("torch-compile", {"compile": "none"})]
)
def test_runs_of_every_size_agree_with_pytorch(
    kind: str,
    backend: str,
    options: dict[str, str],
    ranged: Bundles,
    prompts_without_encoders: None,
) -> None:
    """Larger, smaller and larger again, on the same buffers; no row of another run shows."""
    reference = pipeline_of(ranged(kind)[0], backend="torch")
    ours = pipeline_of(ranged(kind)[0], backend=backend, **options)
    for pictures in (2, 1, 3, 1):
        seeds = list(range(pictures))
        got, expected = (
            [p.latents for p in draw(x, PROMPTS[:pictures], seeds)] for x in (ours, reference)
        )
        assert rows_run(ours) == pictures * RANGES[kind].min
        assert len(got) == pictures
        for mine, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-3)


def test_the_dense_graph_takes_the_range_too(
    kind: str, ranged: Bundles, prompts_without_encoders: None
) -> None:
    pipes = [pipeline_of(ranged(kind)[0], backend=x, dense=True) for x in ("onnxruntime", "torch")]
    for pictures in (1, 3):
        ours, theirs = (draw(x, PROMPTS[:pictures], list(range(pictures))) for x in pipes)
        torch.testing.assert_close(ours[-1].latents, theirs[-1].latents, rtol=0, atol=1e-3)


def test_calls_are_not_filled_up(
    kind: str, ranged: Bundles, prompts_without_encoders: None
) -> None:
    pipe = pipeline_of(ranged(kind)[0])
    assert pictures_per_call(pipe.transformer) == 3
    assert fill(pipe.transformer, ["a"]) == ["a"]
    state, counted = pipe.transformer.state, []
    run = state.run
    state.run = lambda *a, **k: counted.append(len(a[1]["timestep"])) or run(*a, **k)
    made = generate(pipe, PROMPTS, seed=1)
    assert [picture.seed for picture in made] == [1, 2, 3, 4, 5]
    assert counted == [3 * RANGES[kind].min] * 4 + [2 * RANGES[kind].min] * 4
    alone = draw(pipe, [PROMPTS[4]], [5])[0]
    torch.testing.assert_close(alone.latents, made[4].latents, rtol=0, atol=1e-4)


def test_a_call_that_is_too_small_is_filled_up(
    ranged: Bundles, prompts_without_encoders: None
) -> None:
    folder, bundle, _ = ranged("flux")
    pipe = pipeline_of(folder)
    pipe.transformer.bundle = replace(bundle, batch_range=BatchRange(2, 2, 3))
    assert fill(pipe.transformer, ["a"]) == ["a", "a"]
    assert len(generate(pipe, PROMPTS[:4])) == 4
    assert rows_run(pipe) == 2


def test_a_size_is_bound_once_and_nothing_allocated_after(
    ranged: Bundles, prompts_without_encoders: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trt_runtime import denoise

    pipe = pipeline_of(ranged("sd3")[0])
    engines = pipe.transformer.engines
    bound: list[int] = []
    for engine in engines.values():

        def bind(feeds: Any, outputs: Any, engine: Any = engine) -> Any:
            bound.append(len(feeds["timestep"]))
            return type(engine).bind(engine, feeds, outputs)

        monkeypatch.setattr(engine, "bind", bind)
    draw(pipe, PROMPTS[:1], [0])
    assert bound == [2, 2]  # each bucket, though the largest call may have six rows
    monkeypatch.setattr(denoise, "allocate", lambda *_: pytest.fail("a buffer was allocated"))
    draw(pipe, PROMPTS[:3], [0, 1, 2])
    assert bound == [2, 2, 6, 6]
    for pictures in (1, 3, 1):
        draw(pipe, PROMPTS[:pictures], list(range(pictures)))
    assert len(bound) == 4
    state = pipe.transformer.state
    caches = [spec for spec in pipe.transformer.bundle.cache_groups]
    assert state.cache_bytes() == sum(4 * 6 * _row_items(spec.shape) for spec in caches)


def _row_items(shape: tuple[Any, ...]) -> int:
    return int(torch.Size(shape[1:]).numel())


def arguments_of(proxy: Any, rows: int, step: int) -> dict[str, torch.Tensor]:
    plan = proxy.plan
    arguments = {
        spec.name: torch.ones(shape_of(spec, rows), dtype=DTYPES[spec.dtype])
        for spec in proxy.bundle.dense.inputs
    }
    arguments["timestep"] = torch.full((rows,), plan.sampler.sigmas[step] * 1000)
    return arguments


def test_rows_outside_the_range_and_within_a_run_are_refused(ranged: Bundles) -> None:
    proxy = load_transformer(ranged("sd3")[0], threads=1, poison=True)
    timesteps = [sigma * 1000 for sigma in proxy.plan.sampler.sigmas]
    message = "rows of hidden_states . got {}; expected 2 to 6: two a picture .* --batch-range"
    for rows in (1, 7):
        proxy.state.begin(timesteps)
        with pytest.raises(ArrowheadError, match=message.format(rows)):
            proxy(**arguments_of(proxy, rows, 0))
    proxy.state.begin(timesteps)
    with pytest.raises(
        ArrowheadError, match="rows of timestep . got .4.; expected .2.. Fix: pass as"
    ):
        proxy(**arguments_of(proxy, 2, 0) | {"timestep": torch.ones(4)})
    proxy.state.begin(timesteps)
    proxy(**arguments_of(proxy, 4, 0))
    with pytest.raises(ArrowheadError, match="rows of step 1 . got 2; expected 4, as the run's"):
        proxy(**arguments_of(proxy, 2, 1))
    proxy.state.begin(timesteps)  # after the refusal any number may begin
    assert torch.isfinite(proxy(**arguments_of(proxy, 2, 0), return_dict=False)[0]).all()
    proxy.close()


def test_a_served_call_has_the_rows_of_its_requests(
    kind: str, ranged: Bundles, prompts_without_encoders: None
) -> None:
    service = PictureService(ranged(kind)[0], threads=1, poison=True)
    assert service.pictures_per_call == 3
    asked = [
        Asked(seeds=(seed,), guidance=4.0, prompts=(text,)) for seed, text in enumerate(PROMPTS[:2])
    ]
    for requests in (asked, asked[:1]):
        drawn = service.draw(requests, lambda done, preview: None)
        assert [len(pictures) for pictures in drawn] == [1] * len(requests)
        assert rows_run(service.pipe) == len(requests) * RANGES[kind].min
    service.close()


def test_departures_are_looked_for_at_the_rows_that_failed(ranged: Bundles) -> None:
    from exporter.debug import MERGED, exposed_graph
    from trt_runtime.bundles import open_engine
    from trt_runtime.engine import allocate

    folder, bundle, _ = ranged("sd3")
    for rows in (2, 6):
        with (
            exposed_graph(folder, 1) as graph,
            open_engine(folder, bundle, graph, threads=1) as engine,
        ):

            def run(feeds: Any, rows: int = rows, graph: Any = graph, engine: Any = engine) -> Any:
                outputs = allocate(graph.outputs, rows)
                engine.run(feeds, outputs)
                merged = {n: t for n, t in outputs.items() if n.startswith(MERGED)}
                assert merged and all(len(t) == rows for t in merged.values())
                return {n.removeprefix(MERGED): t for n, t in merged.items()}

            assert first_departure(folder, 1, run, rows=rows) is None


def test_build_runs_each_engine_at_both_ends(
    ranged: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trt_runtime import build as builder

    ran: list[tuple[str, int]] = []
    make = builder.random_feeds

    def feeds_of(plan: Any, graph: Any, batch: int, **options: Any) -> Any:
        ran.append((graph.file, batch))
        return make(plan, graph, batch, **options)

    monkeypatch.setattr(builder, "random_feeds", feeds_of)
    folder, bundle, _ = ranged("flux")
    build(folder, threads=1)
    assert ran == [(graph.file, rows) for graph in bundle.all_graphs for rows in (1, 3)]


def test_the_command_line(
    ranged: Bundles,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import exporter

    folder, bundle, plan = ranged("sd3")
    asked: list[Any] = []

    def export(model: Any, plan: Any, output: Path, **options: Any) -> Any:
        asked.append(options["batch"])
        return bundle

    monkeypatch.setattr(exporter, "export_bundle", export)
    save_plan(plan, tmp_path / "plan.json")
    command = ["build", "--plan", str(tmp_path / "plan.json"), "--threads", "1",
               "--model", str(folder.parent / "model"), "--output", str(folder)]  # fmt: skip
    assert main([*command, "--batch-range", "2", "4", "6", "--verify"]) == 0
    assert asked == []  # it is there
    assert "bucket 1" in capsys.readouterr().out
    assert main([*command, "--batch-range", "2", "2", "6"]) == 0
    assert main([*command, "--batch-range", "6", "6", "6"]) == 0
    assert main(command) == 0
    assert asked == [(2, 2, 6), 6, 2]
    with pytest.raises(SystemExit):
        main([*command, "--batch", "2", "--batch-range", "2", "2", "6"])
    assert "not allowed with argument --batch" in capsys.readouterr().err
    assert main(["inspect", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["batch_range"] == {"min": 2, "opt": 4, "max": 6}
    assert report["batch"] == 6
    assert report["cache_bytes"] == sum(4 * 6 * _row_items(g.shape) for g in bundle.cache_groups)
    assert main(["inspect", str(folder)]) == 0
    assert "2 to 6 rows (tuned for 4, sizes at 6)" in capsys.readouterr().out


def test_ranges_that_are_none_are_refused(ranged: Bundles, tmp_path: Path) -> None:
    _, bundle, plan = ranged("flux")
    model = tiny.tiny_flux(num_layers=1, num_single_layers=1)
    for batch in ((0, 1, 2), (2, 1, 3), (1, 4, 3)):
        with pytest.raises(ArrowheadError, match="min <= opt <= max"):
            export_bundle(model, plan, tmp_path / "new", dtype="fp32", batch=batch)
    save_bundle(replace(bundle, batch_range=BatchRange(1, 2, 4)), tmp_path)
    with pytest.raises(ArrowheadError, match=r"batch_range \[1, 2, 4\] and batch 3; expected 1 <="):
        load_bundle(tmp_path)


def test_a_bundle_of_one_number_says_nothing_of_a_range(ranged: Bundles, tmp_path: Path) -> None:
    """As bundles were before there were ranges, which are read as they were."""
    fixed = replace(ranged("flux")[1], batch=2, batch_range=None)
    save_bundle(fixed, tmp_path)
    assert "batch_range" not in json.loads((tmp_path / "bundle.json").read_text())
    assert load_bundle(tmp_path) == fixed
    assert load_bundle(tmp_path).rows == range(2, 3)
