"""Which TensorRT is found, how the plugins are registered, and how the builder is asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from plans.bundle import BatchRange, GraphSpec, TensorSpec
from plans.errors import ArrowheadError
from trt_runtime import tensorrt_build, tensorrt_library
from trt_runtime.cli import parser
from trt_runtime.tensorrt_build import (
    BuildSettings,
    _check,
    _config,
    _said,
    _TimingCache,
    usable_tensorrt,
)
from trt_runtime.tensorrt_library import (
    TensorRT,
    find_plugin_library,
    load_plugins,
    plugin_identity,
    register,
    tensorrt,
)
from trt_runtime.tensorrt_progress import Phases, interrupt_noted, progress_monitor


def module(name: str, version: str) -> ModuleType:
    """As much of TensorRT's module as an import looks at."""
    made = ModuleType(name)
    severity = SimpleNamespace(VERBOSE=4, INFO=3, WARNING=2, ERROR=1, INTERNAL_ERROR=0)
    logger = type("ILogger", (), {"Severity": severity, "__init__": lambda self: None})
    vars(made).update(__version__=version, ILogger=logger)
    return made


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Say which modules can be imported; name None for one that cannot."""

    def install(**modules: ModuleType | None) -> None:
        for name in ("tensorrt", "tensorrt_rtx"):
            monkeypatch.setitem(sys.modules, name, modules.get(name))
        tensorrt.cache_clear()

    yield install
    tensorrt.cache_clear()


def test_nothing_installed_says_what_to_install(installed: Any) -> None:
    installed()
    with pytest.raises(ArrowheadError, match=r"backend tensorrt .*pip install 'arrowhead\[tens"):
        tensorrt()


def test_rtx_is_taken_where_it_is_what_there_is(installed: Any) -> None:
    installed(tensorrt_rtx=module("tensorrt_rtx", "1.2.0.54"))
    found = tensorrt()
    assert (found.flavour, found.version, found.is_rtx) == ("TensorRT-RTX", "1.2.0", True)


@pytest.mark.parametrize("version", ["8.6.1", "10.12.0.36"])
def test_an_old_tensorrt_is_refused(installed: Any, version: str) -> None:
    installed(tensorrt=module("tensorrt", version))
    with pytest.raises(ArrowheadError, match=rf"got TensorRT {version}; expected 10.13 or newer"):
        tensorrt()


def test_errors_are_kept_for_messages(installed: Any) -> None:
    installed(tensorrt=module("tensorrt", "10.13.0.35"))
    found = tensorrt()
    assert (found.flavour, found.version) == ("TensorRT", "10.13.0")
    found.logger.log(1, "first\n  line")
    found.logger.log(3, "Total Activation Memory: 4096 bytes")
    found.logger.log(2, "a warning")
    assert _said(found, "Total Activation Memory") == 4096
    assert _said(found, "Total Weights Memory") is None
    assert tensorrt_library.last_error(found) == "first line"
    assert tensorrt_library.last_error(found) == "no reason given"


class Registry:
    """Plugin creators by name; a library adds its own when it is loaded."""

    def __init__(self, adds: list[tuple[str, str, str]]) -> None:
        self.all_creators = [SimpleNamespace(name="ROIAlign", plugin_version="2",
                                             plugin_namespace="")]  # fmt: skip
        self.adds = adds
        self.loaded: list[str] = []

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        wanted = (name, version, namespace)
        for creator in self.all_creators:
            if (creator.name, creator.plugin_version, creator.plugin_namespace) == wanted:
                return creator
        return None

    def load_library(self, plugin_path: str) -> None:
        self.loaded.append(plugin_path)
        for name, version, namespace in self.adds:
            self.all_creators.append(
                SimpleNamespace(name=name, plugin_version=version, plugin_namespace=namespace)
            )


def with_registry(registry: Registry) -> TensorRT:
    api = SimpleNamespace(get_plugin_registry=lambda: registry)
    logger = SimpleNamespace(errors=["bad symbol"], clear=lambda: None)
    return TensorRT(api, "TensorRT", "11.4.0", logger)


def test_plugins_are_registered_once() -> None:
    registry = Registry([(name, "1", "arrowhead") for name in ("ArrowAttention", "CachedHead")])
    trt = with_registry(registry)
    register(trt, Path("libarrowhead_trt.so"))
    register(trt, Path("libarrowhead_trt.so"))
    assert registry.loaded == ["libarrowhead_trt.so"]


def test_a_miss_names_what_is_registered_and_what_was_looked_for() -> None:
    registry = Registry([("ArrowAttention", "1", ""), ("CachedHead", "1", "arrowhead")])
    with pytest.raises(ArrowheadError) as raised:
        register(with_registry(registry), Path("libarrowhead_trt.so"))
    assert "no creator of ArrowAttention (registered: ROIAlign version '2'" in str(raised.value)
    assert "ArrowAttention version '1' namespace ''" in str(raised.value)
    assert "bad symbol" in str(raised.value)
    assert "each with version '1' and namespace 'arrowhead'" in str(raised.value)


def test_the_library_is_found_by_variable_or_where_it_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "library.so"
    monkeypatch.setenv(tensorrt_library.VARIABLE, str(path))
    load_plugins.cache_clear()
    with pytest.raises(ArrowheadError, match="plugin library .* no file at .*library.so"):
        load_plugins()
    path.write_bytes(b"not a library")
    assert find_plugin_library() == path
    with pytest.raises(ArrowheadError, match="another kind of file"):
        plugin_identity(path)
    monkeypatch.delenv(tensorrt_library.VARIABLE)
    monkeypatch.setattr(tensorrt_library, "BUILT", tmp_path / "none.so")
    assert load_plugins() is None
    load_plugins.cache_clear()


@pytest.mark.parametrize(
    ("options", "device"),
    [([], "cpu"), (["--backend", "tensorrt"], "cuda"), (["--backend", "torch"], "cpu"),
     (["--backend", "tensorrt", "--device", "cuda:1"], "cuda:1"),
     (["--device", "cuda:1", "--backend", "tensorrt"], "cuda:1")],
)  # fmt: skip
def test_the_backend_brings_its_device(options: list[str], device: str) -> None:
    assert parser().parse_args(["build", "bundle", *options]).device == device


def graph_of(batch: int | str) -> GraphSpec:
    spec = TensorSpec("x", "float16", (batch, 4))
    return GraphSpec("g.onnx", 0, (spec,), (spec,), ())


class Config:
    """IBuilderConfig as far as it is asked; the methods are the bindings'."""

    def __init__(self) -> None:
        self.set: list[str] = []
        self.cleared: list[str] = []
        self.profiles: list[Any] = []
        self.builder_optimization_level = 3
        self.caches: list[bytes] = []
        self.accepts = [True]

    def set_flag(self, flag: str) -> None:
        self.set.append(flag)

    def clear_flag(self, flag: str) -> None:
        self.cleared.append(flag)

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(profile)
        return 0

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        return SimpleNamespace(serialize=lambda: serialized_timing_cache + b"+")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        accepted = self.accepts.pop(0)
        if accepted:
            self.cache = cache
        return accepted

    def get_timing_cache(self) -> Any:
        return self.cache


class Profile:
    def __init__(self) -> None:
        self.shapes: list[Any] = []

    def set_shape(self, name: str, *shapes: Any) -> None:
        self.shapes.append((name, *shapes))


def asked(
    settings: BuildSettings, batch: int | str = 2, batches: BatchRange | None = None
) -> Config:
    config = Config()
    builder = SimpleNamespace(
        create_builder_config=lambda: config, create_optimization_profile=Profile
    )
    flags = SimpleNamespace(TF32="TF32", STRIP_PLAN="STRIP", REFIT_IDENTICAL="IDENTICAL")
    trt = TensorRT(SimpleNamespace(BuilderFlag=flags), "TensorRT", "11.4.0", None)
    assert _config(trt, builder, settings, graph_of(batch), batches) is config
    return config


def test_flags_and_the_profile() -> None:
    plain = asked(BuildSettings())
    assert (plain.set, plain.cleared, plain.profiles) == ([], ["TF32"], [])
    assert plain.builder_optimization_level == 3
    assert asked(BuildSettings(optimization_level=5)).builder_optimization_level == 5
    assert asked(BuildSettings(weights="stripped")).set == ["STRIP", "IDENTICAL"]
    (profile,) = asked(BuildSettings(), "B", BatchRange(1, 2, 8)).profiles
    assert profile.shapes == [("x", (1, 4), (2, 4), (8, 4))]


def test_what_cannot_be_built_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    full = TensorRT(None, "TensorRT", "11.4.0", None)
    rtx = TensorRT(None, "TensorRT-RTX", "1.7.1", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tensorrt_build, "tensorrt", lambda: full)
    with pytest.raises(ArrowheadError, match="building with TensorRT . got no NVIDIA GPU"):
        usable_tensorrt()
    monkeypatch.setattr(tensorrt_build, "tensorrt", lambda: rtx)
    assert usable_tensorrt() is rtx
    _check(rtx, BuildSettings())
    _check(full, BuildSettings(weights="stripped"))
    with pytest.raises(ArrowheadError, match="--strip-weights . got TensorRT-RTX 1.7.1"):
        _check(rtx, BuildSettings(weights="stripped"))
    with pytest.raises(ArrowheadError, match="weights . got packed"):
        BuildSettings(weights="packed")


def test_the_timing_cache_is_kept_and_one_that_does_not_fit_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for accepts, written in (([True], b"+"), ([True], b"++"), ([False, True], b"+")):
        config = Config()
        config.accepts = accepts
        digest = _TimingCache(config, tmp_path).save()
        assert (tmp_path / "timing_sm90.cache").read_bytes() == written
        assert len(digest) == 64


def test_nested_phases_make_one_share_that_never_falls() -> None:
    phases = Phases()
    phases.start("Building engine", 2)
    phases.start("Optimizing", 4)
    shares = []
    for _ in range(4):
        phases.step("Optimizing")
        shares.append(phases.share)
    assert shares == [0.125, 0.25, 0.375, 0.5]
    phases.finish("Optimizing")
    phases.step("Building engine")
    phases.start("Timing", 10)
    phases.step("Timing")
    assert phases.share == pytest.approx(0.55)
    assert phases.innermost == "Timing"
    phases.finish("Timing")
    phases.start("Timing", 10)  # names come again
    phases.step("Timing")
    assert phases.share == pytest.approx(0.55)


def test_the_monitor_stops_the_builder_when_it_is_told_to() -> None:
    shown: list[float] = []
    stop = [False, True]
    api = SimpleNamespace(IProgressMonitor=type("IProgressMonitor", (), {}))
    monitor = progress_monitor(api, lambda p: shown.append(p.share), lambda: stop.pop(0))
    monitor.phase_start("Building engine", None, 2)
    assert monitor.step_complete("Building engine", 0) is True
    assert monitor.step_complete("Building engine", 1) is False
    monitor.phase_finish("Building engine")
    assert shown == [0.5, 1.0]


def test_ctrl_c_waits_for_the_end_of_the_build() -> None:
    before = signal.getsignal(signal.SIGINT)
    reached = []
    with pytest.raises(KeyboardInterrupt), interrupt_noted() as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(stopped())
    assert reached == [True]
    assert signal.getsignal(signal.SIGINT) is before


def test_the_drivers_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*_: Any, **__: Any) -> Any:
        return subprocess.CompletedProcess([], 0, "580.82.07\n580.82.07\n", "")

    monkeypatch.setattr(tensorrt_build.subprocess, "run", answer)
    assert tensorrt_build._driver_version() == "580.82.07"

    def absent(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(tensorrt_build.subprocess, "run", absent)
    assert tensorrt_build._driver_version() is None
