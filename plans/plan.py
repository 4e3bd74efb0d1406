"""The plan: what every head does at every denoising step, and its JSON file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from plans.cache_flow import CacheFlow, CacheGroup, cache_flow
from plans.check import check_plan
from plans.errors import ArrowheadError, atomic_write
from plans.json_files import check_format, dump_json, read_json
from plans.models import AttentionModule
from plans.tiles import FULL, TokenLayout

__all__ = [
    "Bucket", "CacheFlow", "CacheGroup", "ModelRef", "Plan", "Sampler", "cache_flow", "check_plan",
    "dense_plan", "join_equal", "load_plan", "plan_from_json", "plan_to_json", "resolve_source",
    "save_plan",
]  # fmt: skip

FORMAT = "arrowhead.plan/1"


@dataclass(frozen=True)
class ModelRef:
    """The model a plan was made for.

    source is a hub id or a path relative to the plan file's folder; config, when kept, lets a
    mismatch be named key by key.
    """

    architecture: str
    config_sha256: str
    source: str | None = None
    revision: str | None = None
    weights_sha256: str | None = None
    config: dict[str, Any] | None = None


@dataclass(frozen=True)
class Sampler:
    """The denoising schedule: N sigmas, without the trailing zero."""

    scheduler: str
    steps: int
    sigmas: tuple[float, ...]
    cfg: bool
    guidance_scale: float

    @property
    def sigmas_sha256(self) -> str:
        text = ",".join(f"{sigma:.6f}" for sigma in self.sigmas)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Bucket:
    """One graph's modes: per module H ints, CACHED (-2), FULL (-1) or a half window in blocks."""

    modes: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Plan:
    """A per-head plan; `schedule` maps each of the N steps to a bucket."""

    model: ModelRef
    height: int
    width: int
    vae_scale_factor: int
    text_tokens: int
    block: int
    modules: tuple[AttentionModule, ...]
    sampler: Sampler
    buckets: tuple[Bucket, ...]
    schedule: tuple[int, ...]
    search: dict[str, Any] | None = None
    accounting: dict[str, Any] | None = None

    @property
    def steps(self) -> int:
        return len(self.schedule)

    def modes_at(self, step: int) -> Mapping[str, tuple[int, ...]]:
        return self.buckets[self.schedule[step]].modes

    @property
    def full_bucket(self) -> int | None:
        """The first bucket that computes every head in full; None where there is none."""
        for index, bucket in enumerate(self.buckets):
            if all(mode == FULL for modes in bucket.modes.values() for mode in modes):
                return index
        return None

    @property
    def sha256(self) -> str:
        """Hash of what the plan does: not of its search record, accounting or model location."""
        bare = replace(
            self,
            model=replace(self.model, source=None, revision=None, config=None),
            search=None,
            accounting=None,
        )
        canonical = json.dumps(plan_to_json(bare), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def dense_plan(plan: Plan) -> Plan:
    """Return the plan of the same model and sampler that computes every head in full."""
    full = Bucket({module.name: (FULL,) * module.heads for module in plan.modules})
    return replace(plan, buckets=(full,), schedule=(0,) * plan.steps, search=None, accounting=None)


def join_equal(plan: Plan) -> Plan:
    """Return the plan with buckets of equal modes made one."""
    distinct: list[Bucket] = []
    index = []
    for bucket in plan.buckets:
        if bucket not in distinct:
            distinct.append(bucket)
        index.append(distinct.index(bucket))
    schedule = tuple(index[bucket] for bucket in plan.schedule)
    return replace(plan, buckets=tuple(distinct), schedule=schedule)


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON types."""
    sampler = asdict(plan.sampler)
    return {
        "format": FORMAT,
        "model": asdict(plan.model),
        "picture": {
            "height": plan.height,
            "width": plan.width,
            "vae_scale_factor": plan.vae_scale_factor,
        },
        "text_tokens": plan.text_tokens,
        "block": plan.block,
        "sampler": {
            **{name: sampler[name] for name in ("scheduler", "steps", "cfg", "guidance_scale")},
            "sigmas_sha256": plan.sampler.sigmas_sha256,
            "sigmas": list(plan.sampler.sigmas),
        },
        "modules": [_module_to_json(module) for module in plan.modules],
        "schedule": list(plan.schedule),
        "buckets": [
            {name: list(modes) for name, modes in bucket.modes.items()} for bucket in plan.buckets
        ],
        "search": plan.search,
        "accounting": plan.accounting,
    }


def _module_to_json(module: AttentionModule) -> dict[str, Any]:
    return {
        "name": module.name,
        "heads": module.heads,
        "head_dim": module.head_dim,
        "image_tokens": module.layout.image_tokens,
        "text_tokens": module.layout.text_tokens,
        "text_first": module.layout.text_first,
        "text_output": module.text_output,
    }


def plan_from_json(data: Mapping[str, Any], subject: str = "plan") -> Plan:
    """Build and check a plan; raise ArrowheadError naming what in the JSON is wrong."""
    check_format(data, FORMAT, "plan-1.schema.json", subject)
    sampler = dict(data["sampler"])
    stored = sampler.pop("sigmas_sha256")
    sampler["sigmas"] = tuple(sampler["sigmas"])
    modules = []
    for entry in data["modules"]:
        layout = TokenLayout(
            entry["image_tokens"], entry["text_tokens"], entry["text_first"], data["block"]
        )
        modules.append(
            AttentionModule(
                entry["name"], entry["heads"], entry["head_dim"], layout, entry["text_output"]
            )
        )
    plan = Plan(
        model=ModelRef(**data["model"]),
        **data["picture"],
        text_tokens=data["text_tokens"],
        block=data["block"],
        modules=tuple(modules),
        sampler=Sampler(**sampler),
        buckets=tuple(
            Bucket({name: tuple(modes) for name, modes in bucket.items()})
            for bucket in data["buckets"]
        ),
        schedule=tuple(data["schedule"]),
        search=data.get("search"),
        accounting=data.get("accounting"),
    )
    if plan.sampler.sigmas_sha256 != stored:
        raise ArrowheadError(
            f"{subject}, sampler.sigmas",
            got=f"sha256 {plan.sampler.sigmas_sha256[:12]}",
            expected=f"{stored[:12]} as its sigmas_sha256 says",
            fix="restore the sigmas; to plan for other sigmas, search anew",
        )
    check_plan(plan)
    return plan


def load_plan(path: Path | str) -> Plan:
    """Read and check a plan file."""
    subject = f"plan file {path}"
    return plan_from_json(read_json(Path(path), subject), subject)


def save_plan(plan: Plan, path: Path | str) -> None:
    """Check and write a plan file; an absolute model.source becomes relative to its folder."""
    check_plan(plan)
    source = plan.model.source
    if source is not None and os.path.isabs(source):
        relative = Path(os.path.relpath(source, Path(path).resolve().parent)).as_posix()
        plan = replace(plan, model=replace(plan.model, source=relative))
    atomic_write(Path(path), dump_json(plan_to_json(plan)))


def resolve_source(plan: Plan, folder: Path) -> str | None:
    """Return model.source as an absolute path if it is one from `folder`, else as the hub id."""
    source = plan.model.source
    if source is not None and (Path(folder) / source).exists():
        return str((Path(folder) / source).resolve())
    return source
