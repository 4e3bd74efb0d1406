"""Write a Triton model repository that holds all a server needs: bundle, checkpoint, config."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plans.bundle import Bundle, load_bundle, save_bundle
from plans.errors import ArrowheadError, atomic_write
from plans.plan import Plan
from trt_runtime.bundles import BACKENDS, TORCH_BACKENDS, model_source, open_bundle
from trt_runtime.live import rows_per_picture
from trt_runtime.triton.interface import KINDS, Field, inputs, outputs

_MODEL_PY = '''\
"""Arrowhead's model for Triton; the code is that of the installed package."""

from trt_runtime.triton.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
_BUNDLE, _CHECKPOINT = "bundle", "checkpoint"


@dataclass(frozen=True)
class Settings:
    """How a model is served; what else its config says follows from the bundle.

    instances: processes, each with engines and caches of its own. device: cpu or cuda.
    queue: requests that may wait; more are refused. queue_seconds: how long each may wait.
    gather_ms: how long a request waits for others to share its call, where a call has room.
    poison: fill the caches with NaN between calls, so that a leak shows in the picture (tests).
    """

    instances: int = 1
    backend: str = "onnxruntime"
    device: str = "cpu"
    threads: int = 0
    weights: str = "shared"
    queue: int = 64
    queue_seconds: float = 120.0
    gather_ms: float = 0.0
    warmup: bool = True
    poison: bool = False

    def __post_init__(self) -> None:
        for name, least in (("instances", 1), ("threads", 0), ("queue", 0), ("gather_ms", 0)):
            if getattr(self, name) < least:
                raise ArrowheadError(
                    name, got=getattr(self, name), expected=f"{least} or more", fix="change it"
                )
        if self.queue_seconds <= 0 or self.backend not in BACKENDS:
            raise ArrowheadError(
                "settings of the model",
                got=f"queue_seconds {self.queue_seconds:g}, backend {self.backend}",
                expected=f"more than 0 seconds, and one of {', '.join(BACKENDS)}",
                fix="change it",
            )


def write_model(
    bundle_folder: Path | str,
    repository: Path | str,
    *,
    name: str = "arrowhead",
    kind: str = "picture",
    version: int = 1,
    settings: Settings | None = None,
) -> Path:
    """Write one version of a model, and its config; give the model's folder.

    kind: "picture" answers once, "stream" after each step too. Files are linked where they can be,
    copied where not, and the version appears whole. An existing version is replaced. Raises
    ArrowheadError where the config of other versions, which all share, does not fit this bundle.
    """
    bundle_folder, folder = Path(bundle_folder), Path(repository) / name
    settings = settings or Settings()
    if kind not in KINDS or version < 1 or not name.replace("_", "").replace("-", "").isalnum():
        raise ArrowheadError(
            "Triton model",
            got=f"name {name!r}, kind {kind!r}, version {version}",
            expected=f"letters, digits, - and _; one of {KINDS}; 1 or more",
            fix="change the argument",
        )
    bundle, plan = open_bundle(bundle_folder)
    config = config_text(bundle, plan, name, kind, settings)
    _check_versions(folder, bundle, plan, kind, version)
    folder.mkdir(parents=True, exist_ok=True)
    with _aside(folder, str(version)) as version_folder:
        shutil.copytree(bundle_folder, version_folder / _BUNDLE, copy_function=_link_or_copy)
        _copy_checkpoint(bundle, bundle_folder, version_folder, settings.backend)
        (version_folder / "model.py").write_text(_MODEL_PY)
    atomic_write(folder / "config.pbtxt", config)
    return folder


def config_text(bundle: Bundle, plan: Plan, name: str, kind: str, settings: Settings) -> str:
    """Give config.pbtxt: Triton's view of the bundle under these settings."""
    pictures = bundle.batch // rows_per_picture(plan)
    parameters = {
        "bundle": _BUNDLE,
        "backend": settings.backend,
        "threads": str(settings.threads),
        "weights": settings.weights,
        "poison": str(settings.poison).lower(),
    }
    tensors = [
        *(_tensor("input", field, "optional: true") for field in inputs(bundle, plan, kind)),
        *(_tensor("output", field) for field in outputs(plan, kind)),
    ]
    gpu = settings.device.startswith("cuda")
    blocks = [
        f'name: "{name}"\nbackend: "python"\nmax_batch_size: {pictures}',
        *tensors,
        f"model_transaction_policy {{ decoupled: {str(kind == 'stream').lower()} }}",
        f"instance_group [{{ count: {settings.instances} kind: {'KIND_GPU' if gpu else 'KIND_CPU'}"
        " }]",
        _batching(settings, pictures),
        # A new version is loaded before the one it replaces is let go.
        "version_policy { latest { num_versions: 1 } }",
        *(_parameter(key, value) for key, value in parameters.items()),
    ]
    if settings.warmup:
        blocks.append(_WARMUP)
    return "# Written by `arrowhead triton`.\n" + "\n".join(blocks) + "\n"


_WARMUP = """\
# One picture of an empty prompt: buffers, kernels and tokenizers are ready when the model is.
model_warmup [{
  name: "picture" batch_size: 1
  inputs { key: "PROMPT" value { data_type: TYPE_STRING dims: [1] zero_data: true } }
}]"""


def _tensor(what: str, field: Field, more: str = "") -> str:
    dims = ", ".join(str(dim) for dim in field.dims)
    facts = f'name: "{field.name}" data_type: TYPE_{field.datatype} dims: [{dims}] {more}'
    return f"{what} [{{ {facts.rstrip()} }}]  # {field.says}"


def _parameter(key: str, value: str) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'


def _batching(settings: Settings, pictures: int) -> str:
    # Waiting for others is paid by every lone request, and useless where a call has one picture.
    gather_us = round(settings.gather_ms * 1000) if pictures > 1 else 0
    return f"""\
dynamic_batching {{
  max_queue_delay_microseconds: {gather_us}
  default_queue_policy {{
    timeout_action: REJECT
    default_timeout_microseconds: {round(settings.queue_seconds * 1e6)}
    allow_timeout_override: true
    max_queue_size: {settings.queue}
  }}
}}"""


def _check_versions(folder: Path, bundle: Bundle, plan: Plan, kind: str, version: int) -> None:
    """Refuse a bundle whose config differs from that of the versions beside it."""

    def shape(bundle: Bundle, plan: Plan) -> tuple[Any, ...]:
        pictures = bundle.batch // rows_per_picture(plan)
        facts = {f.name: f.dims for f in (*inputs(bundle, plan, kind), *outputs(plan, kind))}
        return pictures, facts

    for other in versions(folder):
        if other == version:
            continue
        if shape(*open_bundle(folder / str(other) / _BUNDLE)) != shape(bundle, plan):
            raise ArrowheadError(
                f"version {version} of {folder}",
                got=f"another picture size, text length, guidance or --batch than version {other}",
                expected="the same: the versions of a model share one config.pbtxt",
                fix="write it under another --name",
            )


def versions(folder: Path) -> list[int]:
    """List the versions a model's folder holds."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


@contextmanager
def _aside(folder: Path, name: str) -> Iterator[Path]:
    """Give a folder to fill that takes the place of folder/name when it is whole.

    It lies beside the model's folder's versions: Triton looks only at names that are numbers.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        new.mkdir()
        yield new
        if (folder / name).exists():
            (folder / name).rename(old)
        new.rename(folder / name)


def _copy_checkpoint(bundle: Bundle, folder: Path, target: Path, backend: str) -> None:
    """Copy what the pipeline needs of a local checkpoint, and let the bundle name it."""
    source = Path(model_source(bundle, folder))
    if not source.is_dir():
        return  # a hub id: the server fetches it, or finds it in its cache
    index = json.loads((source / "model_index.json").read_text())
    parts = [name for name, value in index.items() if isinstance(value, list) and value[0]]
    # Copied, not linked: others may write a checkpoint's files in place.
    (target / _CHECKPOINT).mkdir()
    shutil.copy2(source / "model_index.json", target / _CHECKPOINT)
    for part in parts:
        if part != "transformer" or backend in TORCH_BACKENDS:
            shutil.copytree(source / part, target / _CHECKPOINT / part)
    placed = load_bundle(target / _BUNDLE)
    model = {**placed.model, "source": f"../{_CHECKPOINT}"}
    save_bundle(replace(placed, model=model), target / _BUNDLE)


def _link_or_copy(source: str, target: str) -> str:
    """Link a bundle's file: they are never written in place."""
    try:
        os.link(Path(source).resolve(), target)
    except OSError:
        shutil.copy2(source, target)
    return target
