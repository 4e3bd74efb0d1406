"""Plans of the DiTFastAttnV2 reference: two pickled tables, read without unpickling code."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plans.check import check_plan
from plans.errors import ArrowheadError
from plans.models import AttentionModule, ModelSpec, config_fingerprint
from plans.plan import Bucket, ModelRef, Plan, Sampler
from plans.tiles import CACHED, FULL, TokenLayout

# The reference's own codes for the half window in tokens.
_REFERENCE_FULL = -1
_REFERENCE_CACHED = 0


def import_reference(
    head_option_file: Path | str,
    outputshare_file: Path | str,
    *,
    spec: ModelSpec,
    sampler: Sampler,
    vae_scale_factor: int = 8,
    source: str | None = None,
    weights_sha256: str | None = None,
) -> Plan:
    """Translate a reference plan; every distinct table of modes becomes a bucket.

    head_option: {layer: {step: int32 [H, 2]}}, half windows in tokens, -1 full, 0 cached;
    outputshare: {layer: {step: [cached heads]}}. What a file does not name is full. Half windows
    round up to blocks. Raises ArrowheadError for unsafe pickles and for tables that do not fit.
    """
    windows = _by_module(_load(head_option_file), spec, f"head options {head_option_file}")
    shares = _by_module(_load(outputshare_file), spec, f"output shares {outputshare_file}")
    buckets, schedule = _buckets(spec, windows, shares, sampler.steps)
    for table, name in ((windows, "head options"), (shares, "output shares")):
        _check_steps(table, name, sampler.steps)
    config = {name: value for name, value in spec.config.items() if not name.startswith("_")}
    plan = Plan(
        model=ModelRef(
            spec.architecture,
            config_fingerprint(spec.config),
            source=source,
            weights_sha256=weights_sha256,
            config=config,
        ),
        height=spec.height,
        width=spec.width,
        vae_scale_factor=vae_scale_factor,
        text_tokens=spec.text_tokens,
        block=spec.block,
        modules=spec.modules,
        sampler=sampler,
        buckets=tuple(buckets),
        schedule=tuple(schedule),
    )
    check_plan(plan)
    return plan


def _buckets(
    spec: ModelSpec, windows: Mapping[str, Any], shares: Mapping[str, Any], steps: int
) -> tuple[list[Bucket], list[int]]:
    buckets: list[Bucket] = []
    schedule: list[int] = []
    for step in range(steps):
        modes = {
            module.name: _modes(
                module,
                windows.get(module.name, {}).get(step),
                shares.get(module.name, {}).get(step, ()),
                step,
            )
            for module in spec.modules
        }
        if Bucket(modes) not in buckets:
            buckets.append(Bucket(modes))
        schedule.append(buckets.index(Bucket(modes)))
    return buckets, schedule


def _load(path: Path | str) -> Mapping[str, Any]:
    import torch

    try:
        # The files are pickles whatever their names say; weights_only runs no code from them.
        table = torch.load(path, weights_only=True, map_location="cpu")
    except OSError as error:
        raise ArrowheadError(
            f"reference file {path}",
            got=error.strerror,
            expected="a readable file",
            fix="check the path",
        ) from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ArrowheadError(
            f"reference file {path}",
            got=str(error).splitlines()[0] if str(error) else type(error).__name__,
            expected="a torch.save of dictionaries, integers and tensors, and nothing else",
            fix="save the plain tables again with torch.save; other pickles are not read: they "
            "could run code",
        ) from error
    if not isinstance(table, dict) or not all(isinstance(v, dict) for v in table.values()):
        raise ArrowheadError(
            f"reference file {path}",
            got=type(table).__name__,
            expected="a table {layer: {step: ...}}",
            fix="give the head_option and the outputshare_option file, in this order",
        )
    return table


def _by_module(table: Mapping[str, Any], spec: ModelSpec, subject: str) -> dict[str, Any]:
    names = [module.name for module in spec.modules]
    found: dict[str, Any] = {}
    for layer, steps in table.items():
        # Layers may carry a prefix of the pipeline, or lack the attention's own name.
        matches = [n for n in names if f".{layer}".endswith(f".{n}") or f"{layer}.attn" == n]
        if len(matches) != 1 or matches[0] in found:
            raise ArrowheadError(
                f"{subject}, layer {layer}",
                got=f"matches {matches}" if len(matches) != 1 else f"{matches[0]} twice",
                expected=f"one of {names}",
                fix="give the plan of this model, with layers named by diffusers module path",
            )
        found[matches[0]] = {int(step): value for step, value in steps.items()}
    return found


def _modes(module: AttentionModule, windows: Any, shared: Any, step: int) -> tuple[int, ...]:
    subject = f"{module.name} at step {step}"
    rows = [[_REFERENCE_FULL] * 2] * module.heads if windows is None else windows.tolist()
    if len(rows) != module.heads or any(len(row) != 2 or row[0] != row[1] for row in rows):
        raise ArrowheadError(
            subject,
            got=f"{len(rows)} rows of windows, some uneven" if rows else "no windows",
            expected=f"{module.heads} heads with equal left and right half windows",
            fix="give the plan of this model",
        )
    cached = {head for head, row in enumerate(rows) if row[0] == _REFERENCE_CACHED}
    if cached != {int(head) for head in shared}:
        raise ArrowheadError(
            subject,
            got=f"heads {sorted(int(head) for head in shared)} shared",
            expected=f"the heads with window 0: {sorted(cached)}",
            fix="give the two files of one run",
        )
    return tuple(_mode(module.layout, row[0]) for row in rows)


def _mode(layout: TokenLayout, half_window_tokens: int) -> int:
    if half_window_tokens == _REFERENCE_CACHED:
        return CACHED
    blocks = -(-half_window_tokens // layout.block)
    return FULL if half_window_tokens < 0 or blocks >= layout.blocks - 1 else blocks


def _check_steps(table: Mapping[str, Mapping[int, Any]], name: str, steps: int) -> None:
    beyond = sorted({step for rows in table.values() for step in rows if step not in range(steps)})
    if beyond:
        raise ArrowheadError(
            f"{name} of the reference",
            got=f"step {beyond[-1]}",
            expected=f"steps 0..{steps - 1}",
            fix="give the sampler the number of steps the plan was made for",
        )
