"""The backend torch-compile in whole pipelines, from a plan alone and from a bundle's folder."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from plans.errors import ArrowheadError
from plans.plan import Plan, save_plan
from tests import tiny
from tests.trt_runtime.conftest import Made
from tests.trt_runtime.tiny_bundles import bundle_of, call, tiny_model, tiny_pipeline, torch_proxy
from trt_runtime import attach, attachment, bench, detach, load_transformer, verify
from trt_runtime.compiled_engine import CompiledEngine, CompiledModel
from trt_runtime.engine import CACHE_IN, CACHE_OUT, allocate
from trt_runtime.live import live_bundle
from trt_runtime.transformer import ArrowheadTransformer

UNCOMPILED: dict[str, Any] = {"backend": "torch-compile", "compile": "none"}


@pytest.fixture(params=["sd3", "flux"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def attached(kind: str, **options: Any) -> tuple[Any, Any, Plan]:
    """A pipeline with a plan on its own transformer, caches poisoned between runs."""
    model = tiny_model(kind)
    plan = tiny.with_first_arrows(tiny.random_plan(model))
    pipe = tiny_pipeline(model)
    attach(pipe, plan=plan, poison=True, **{**UNCOMPILED, **options})
    return pipe, model, plan


def by_processors(kind: str) -> Tensor:
    model = tiny_model(kind)
    pipe = tiny_pipeline(model)
    plan = tiny.with_first_arrows(tiny.random_plan(model))
    attach(pipe, torch_proxy(model, plan, 2 if kind == "sd3" else 1))
    return call(pipe)


@pytest.mark.parametrize("compile", ["none", "blocks", "model"])
def test_pictures_are_those_of_the_plain_backend(
    kind: str, compile: str, fresh_compiler: None
) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    pipe, model, plan = attached(kind, compile=compile, compiler=counter)
    first = call(pipe)
    torch.testing.assert_close(first, by_processors(kind), atol=1e-5, rtol=1e-5)
    graphs = counter.frame_count
    assert (graphs > 0) == (compile != "none")
    assert torch.equal(call(pipe), first)  # nothing of the first run is left
    assert counter.frame_count == graphs
    assert pipe.transformer.state.buckets_run == list(plan.schedule)
    assert detach(pipe) is model


def test_after_prepare_no_step_compiles_or_allocates(kind: str, fresh_compiler: None) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    pipe, _, _ = attached(kind, compile="blocks", compiler=counter)
    state = pipe.transformer.state
    pipe.transformer.prepare()
    graphs, nbytes = counter.frame_count, state.cache_bytes()
    (context,) = state._contexts.values()
    runs = dict(context.runs)
    call(pipe)
    assert graphs > 0 and counter.frame_count == graphs
    assert nbytes > 0 and state.cache_bytes() == nbytes
    assert state._contexts == {pipe.transformer.prompt_context: context} and context.runs == runs


def test_true_cfg_has_caches_and_counts_of_its_own() -> None:
    pipe, _, plan = attached("flux")
    generator = torch.Generator().manual_seed(9)
    text = torch.randn(1, tiny.TEXT_TOKENS, tiny.JOINT_DIM, generator=generator)
    single = call(pipe)
    nbytes = pipe.transformer.state.cache_bytes()
    both = call(
        pipe, true_cfg_scale=1.0 + 1e-6, negative_prompt_embeds=text,
        negative_pooled_prompt_embeds=torch.randn(1, tiny.POOLED_DIM, generator=generator),
    )  # fmt: skip
    assert pipe.transformer.state.cache_bytes() == 2 * nbytes
    assert pipe.transformer.state.buckets_run == [b for b in plan.schedule for _ in range(2)]
    torch.testing.assert_close(both, single, atol=1e-4, rtol=0)


def test_an_exception_in_mid_run_leaves_no_trace(kind: str) -> None:
    pipe, _, _ = attached(kind)
    expected = call(pipe)

    def cancel(_: Any, step: int, *__: Any) -> dict[str, Any]:
        if step == 2:
            raise RuntimeError("cancelled")
        return {}

    with pytest.raises(RuntimeError, match="cancelled"):
        call(pipe, callback_on_step_end=cancel)
    assert torch.equal(call(pipe), expected)


def test_on_mismatch_dense_runs_every_head_in_full(kind: str) -> None:
    model = tiny_model(kind)
    pipe = tiny_pipeline(model)
    expected = call(pipe, steps=4)
    attach(pipe, plan=tiny.random_plan(model), on_mismatch="dense", **UNCOMPILED)
    with pytest.warns(UserWarning, match="every head in full"):
        got = call(pipe, steps=4)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_two_plans_share_one_transformer(kind: str) -> None:
    model = tiny_model(kind)
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    plans = [tiny.random_plan(model, seed) for seed in (0, 1)]
    pipe = tiny_pipeline(model)
    batch = 2 if kind == "sd3" else 1
    alone = []
    for plan in plans:
        attach(pipe, torch_proxy(model, plan, batch))
        alone.append(call(pipe))
        detach(pipe)
    both = [load_transformer(plan=p, transformer=model, poison=True, **UNCOMPILED) for p in plans]
    for i in (0, 1, 0):
        attach(pipe, both[i])
        torch.testing.assert_close(call(pipe), alone[i], atol=1e-5, rtol=1e-5)
        detach(pipe)
    own = {w.data_ptr() for w in model.parameters()}
    for proxy in both:
        compiled = next(iter(proxy.engines.values()))._model._compiled  # type: ignore[attr-defined]
        assert {w.data_ptr() for w in model.parameters()} == own
        used = {w.data_ptr() for w in compiled._weights}
        assert own <= used
        copied = compiled.prepared.weight_bytes()
        assert copied < sum(w.nbytes for w in model.parameters())
        assert (copied == 0) == (proxy is both[0])  # heads lie in the order of the first plan
        proxy.close()
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())


def test_close_gives_the_memory_back(kind: str) -> None:
    pipe, model, _ = attached(kind)
    call(pipe)
    proxy: ArrowheadTransformer = pipe.transformer
    compiled = next(iter(proxy.engines.values()))._model._compiled  # type: ignore[attr-defined]
    pieces = [
        weakref.ref(piece.weight)
        for layer, piece in compiled.prepared._pieces._taken.values()
        if piece.weight.shape != layer.weight.shape
    ]
    (context,) = proxy.state._contexts.values()
    held = [*pieces, *(weakref.ref(cache) for cache in context.caches.values())]
    assert pieces and len(held) > len(pieces)
    del compiled, context
    detach(pipe)
    gc.collect()
    assert not [ref for ref in held if ref() is not None]
    assert not any("processor" in vars(m) and "Prepared" in type(m.processor).__name__
                   for m in model.modules())  # fmt: skip
    proxy.state.begin([1.0])
    with pytest.raises(ArrowheadError, match="outside its `with` block"):
        proxy.state.prepare("default")


def test_engines_declare_and_check_caches_of_their_own(kind: str) -> None:
    model = tiny_model(kind)
    plan = tiny.random_plan(model)
    bundle = bundle_of(model, plan, 2)
    shared = CompiledModel(model, plan, 2, compile="none")
    engine = CompiledEngine(shared, bundle.graphs[1])
    with engine:
        feeds, outputs = allocate(engine.inputs, 2), allocate(engine.outputs, 2)
        width = tiny.HEADS * tiny.HEAD_DIM
        caches = {**feeds, **outputs}
        caches = {n: t for n, t in caches.items() if n.startswith((CACHE_IN, CACHE_OUT))}
        assert caches and {tuple(t.shape[2:]) for t in caches.values()} == {(width,)}
        engine.run(feeds, outputs)
        name = next(name for name in caches if name in feeds)
        with pytest.raises(ArrowheadError, match=f"tensor {name} of bucket 1"):
            engine.bind(feeds | {name: torch.zeros(2, 3, width)}, outputs)
        with pytest.raises(ArrowheadError, match="second activation"):
            engine.__enter__()
    with pytest.raises(ArrowheadError, match="outside its `with` block"):
        engine.bind(feeds, outputs)


def test_an_engine_that_fails_to_start_puts_the_weights_back(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(kind)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    monkeypatch.setattr(CompiledModel, "cache_shapes", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_transformer(plan=tiny.random_plan(model), transformer=model, **UNCOMPILED)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


def test_a_bundle_folder_and_its_dense_graph(
    kind: str, torch_bundle: Callable[[str], Made], fresh_compiler: None
) -> None:
    folder, _, plan = torch_bundle(kind)
    model = tiny_model(kind)
    pipe = tiny_pipeline(model)
    stock = call(pipe, sigmas=list(plan.sampler.sigmas) if kind == "sd3" else None)
    for dense in (False, True):
        attach(pipe, folder, dense=dense, compiler="aot_eager", backend="torch-compile")
        got = call(pipe, sigmas=list(plan.sampler.sigmas) if kind == "sd3" else None)
        assert torch.isfinite(got).all()
        same = torch.allclose(got, stock, atol=1e-5)
        assert same == dense
        detach(pipe)


def test_a_plan_file_needs_no_bundle(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    save_plan(tiny.with_first_arrows(tiny.random_plan(model)), tmp_path / "plan.json")
    pipe = tiny_pipeline(model)
    proxy = attach(pipe, plan=tmp_path / "plan.json", poison=True)
    assert type(proxy.engines[0]).__name__ == "TorchEngine"  # on a CPU nothing is compiled
    torch.testing.assert_close(call(pipe), by_processors(kind), atol=0, rtol=0)
    with pytest.raises(ArrowheadError, match="rows of"):
        call(pipe, pictures=2)
    attach(pipe, plan=tmp_path / "plan.json", batch=2 * proxy.bundle.batch, **UNCOMPILED)
    assert torch.isfinite(call(pipe, pictures=2)).all()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = tiny_model("sd3")
    plan = tiny.random_plan(model)
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "what to run .* got neither"),
        ({"folder": tmp_path, "plan": plan}, "what to run .* got both"),
        ({"plan": plan}, "transformer of the plan .* got none"),
        ({"plan": plan, "transformer": model, "backend": "onnxruntime"}, "got a plan"),
        ({"plan": plan, "transformer": tiny_model("flux")}, "transformer class"),
        ({"plan": plan, "transformer": model, "batch": 3}, "batch .* multiple of 2 rows"),
        ({"plan": plan, "transformer": model, "compile": "none"}, "options compile"),
        ({"plan": plan, "transformer": model, **UNCOMPILED, "compile": "fast"}, "compile .* fast"),
        ({"plan": replace(plan, height=96), "transformer": model}, "attention module"),
    ]
    for options, message in cases:
        with pytest.raises(ArrowheadError, match=message):
            load_transformer(**options)


def test_live_io_is_that_of_an_export(onnx_bundle: Callable[[str], Made], kind: str) -> None:
    _, bundle, plan = onnx_bundle(kind)
    if kind == "sd3":
        model: Any = tiny.tiny_sd3(num_layers=2, dual_attention_layers=())
    else:
        model = tiny.tiny_flux(num_layers=1, num_single_layers=1)
    live = live_bundle(plan, model)
    assert live.batch == bundle.batch and live.dtype == bundle.dtype
    assert live.cache_groups == bundle.cache_groups
    for ours, exported in zip(live.all_graphs, bundle.all_graphs, strict=True):
        assert ours.bucket == exported.bucket
        assert set(ours.inputs) == set(exported.inputs)
        assert set(ours.outputs) == set(exported.outputs)


class _Recorded(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_step_loop_copies_the_inputs_and_does_nothing_else(kind: str) -> None:
    """What a replayed graph leaves to the host: one copy an input, at every step alike."""
    pipe, model, plan = attached(kind)
    call(pipe)
    state = pipe.transformer.state
    ((name, context),) = state._contexts.items()
    context.runs = {bucket: lambda: None for bucket in context.runs}  # as a graph: no operator
    inputs = {n: t.clone() for n, t in context.feeds.items()}
    timesteps = [1000 * (1 - i / plan.steps) for i in range(plan.steps)]
    state.begin(timesteps)
    scale = pipe.transformer.timestep_scale
    for step in range(plan.steps):
        inputs["timestep"].fill_(timesteps[step] * scale)
        if step in (0, plan.steps - 1):  # both ends are checked against the schedule
            state.run(name, inputs, timestep_scale=scale)
            continue
        buffers = [t.data_ptr() for t in (*context.feeds.values(), context.sample)]
        with _Recorded() as recorded, pytest.MonkeyPatch.context() as patch:
            patch.setattr(state, "_check_timestep", lambda *_: None)  # as on a GPU
            state.run(name, inputs, timestep_scale=scale)
        assert recorded.names == ["aten.copy_.default"] * len(context.feeds)
        assert buffers == [t.data_ptr() for t in (*context.feeds.values(), context.sample)]
    assert len(state.step_seconds) == plan.steps


def test_bench_and_verify_hold_it_against_the_others(
    kind: str,
    torch_bundle: Callable[[str], Made],
    prompts_without_encoders: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, _, plan = torch_bundle(kind)
    loaded: list[Any] = []

    def load(*args: Any, **options: Any) -> Any:
        if options.get("backend") == "torch-compile":
            options["compile"] = "none"
            loaded.append(options["transformer"])
        return load_transformer(*args, **options)

    monkeypatch.setattr(bench, "load_transformer", load)
    monkeypatch.setattr(attachment, "load_transformer", load)
    report = bench.end_to_end(folder, ["a cat"], backend="torch-compile", repeats=1, warmup=1)
    assert report["attention"] == "reference" and report["speedup"] > 0
    assert sum(report["plan"]["step_counts"].values()) == plan.steps
    assert len(loaded) == 2 and loaded[0] is loaded[1]  # one copy of the weights
    report = verify.verify(folder, ["a dog"], backend="torch-compile")
    assert report["passed"] and report["graphs"] == []
    assert report["run"]["max_abs_latent_diff"] < 1e-4
    with pytest.raises(ArrowheadError, match="no prompts"):
        verify.verify(folder, backend="torch-compile")
