"""How much a search runs, and the memory that takes: said before it starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from plans.errors import ArrowheadError
from plans.models import AttentionModule
from plans.sample import SAMPLE_TOKENS, sample_of
from plans.tiles import CACHED

AGES = 10  # steps that a cached head may be old
# Runs of a picture beyond this (SD3-medium at 1K and 28 steps takes 3e14) are counted.
_LARGE_FLOPS = 1e14
_BUDGET = 1.35  # of the plain runs of all prompts
# Of a plain run, in full and with a plan: 1.12 and 0.82 to 0.98 measured on an H100 at 2K; with the
# choice after it, which takes 0.25 of a plain run at first, then 0.07.
_RECORDING, _MEASURING = 1.4, 1.1


@dataclass(frozen=True)
class Effort:
    """How much is run.

    rounds: runs with a plan at most; pictures_per_run: prompts of one run; final_check: whether
    heads are raised and runs repeated until the errors of a plan are within the bounds on all
    prompts; sample_tokens: image rows of a module that errors are told from.
    """

    rounds: int
    pictures_per_run: int
    final_check: bool
    sample_tokens: int = SAMPLE_TOKENS

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.pictures_per_run < 1 or self.sample_tokens < 1:
            raise ArrowheadError(
                "effort of the search",
                got=f"{self.rounds} rounds, {self.pictures_per_run} prompts in a run, "
                f"{self.sample_tokens} sampled tokens",
                expected="at least one of each",
                fix="leave them out for defaults that fit the model's size",
            )


@dataclass(frozen=True)
class Wanted:
    """What is asked for of an Effort; None is by the size of the model."""

    rounds: int | None = None
    pictures_per_run: int | None = None
    final_check: bool | None = None
    sample_tokens: int | None = None


BY_SIZE = Wanted()


def effort_for(flops: float, pictures: int, wanted: Wanted = BY_SIZE) -> Effort:
    """Fill in what is not given by the FLOPs of one picture's run.

    Small models run all prompts together, and as often as it takes. Large ones run prompts one by
    one, each with the plan found so far, as often as the budget of 1.35 plain runs a prompt allows.
    """
    large = flops > _LARGE_FLOPS
    per_run, rounds = wanted.pictures_per_run, wanted.rounds
    if per_run is None:
        per_run = 1 if large else max(1, pictures)
    if rounds is None:
        groups = -(-pictures // max(1, per_run))
        rounds = max(1, int((_BUDGET * groups - _RECORDING) / _MEASURING)) if large else 6
    return Effort(
        rounds,
        per_run,
        not large if wanted.final_check is None else wanted.final_check,
        SAMPLE_TOKENS if wanted.sample_tokens is None else wanted.sample_tokens,
    )


def search_memory(
    modules: Sequence[AttentionModule],
    candidates: Mapping[str, Sequence[int]],
    rows: int,
    item: int,
    ages: int,
    sample_tokens: int = SAMPLE_TOKENS,
) -> dict[str, int]:
    """Bytes a search takes beside the model, for transformer calls of `rows` rows of `item` bytes.

    samples: what is kept of past outputs to tell errors from; outputs: of the step before, which a
    plan's caches read; working: of one module at a time, the transformer's own included.
    """
    samples = outputs = working = 0
    for module in modules:
        width = module.heads * module.head_dim
        windows = [mode for mode in candidates[module.name] if mode >= 0]
        caches = CACHED in candidates[module.name]
        sample = sample_of(module, torch.device("cpu"), windows, sample_tokens)
        sampled = rows * len(sample.rows) * width
        kept = ages if caches else 0
        samples += kept * sampled * item
        whole = rows * module.layout.seq_len * width * item
        outputs += whole if caches else 0
        keys = max((band.keys.numel() for band in sample.bands), default=0)
        # A FLUX single block holds some 24 tensors of the width of the model at its widest.
        differences = (4 * max(kept, len(windows)) + 12) * sampled
        near = 2 * rows * keys * width * item
        working = max(working, 24 * whole + near + differences)
    return {"samples": samples, "outputs": outputs, "working": working}


def check_memory(
    needed: Mapping[str, int], pipe: Any, announce: Callable[[str], None] | None = None
) -> None:
    """Say what a search needs; raise ArrowheadError where the pipeline's GPU has less free.

    Weights that a model offload moves there come on top; of a sequential one they are few.
    """
    device = torch.device(getattr(pipe, "_execution_device", pipe.transformer.device))
    weights = list(pipe.transformer.parameters())
    if device.type == "cuda" and weights[0].device.type == "cpu":
        needed = {**needed, "weights": sum(x.numel() * x.element_size() for x in weights)}
    if announce is not None:
        announce(memory_text(needed))
    if device.type != "cuda" or not torch.cuda.is_available():
        return
    free, _ = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    refuse_beyond(needed, free + reserved)


def refuse_beyond(needed: Mapping[str, int], free: int) -> None:
    """Raise ArrowheadError where more bytes are needed than are free."""
    total = sum(needed.values())
    if total <= free:
        return
    parts = ", ".join(f"{name} {count / 2**30:.1f} GiB" for name, count in needed.items())
    raise ArrowheadError(
        "memory of the search",
        got=f"{free / 2**30:.1f} GiB free on the GPU",
        expected=f"{total / 2**30:.1f} GiB ({parts})",
        fix="lower --prompts-per-run (with --method progressive: the number of prompts) or "
        "--sample-tokens, or pass --offload model or sequential",
    )


def memory_text(needed: Mapping[str, int]) -> str:
    """Say what a search needs."""
    parts = ", ".join(f"{name} {count / 2**30:.2f}" for name, count in needed.items())
    return f"memory beside the model: {sum(needed.values()) / 2**30:.2f} GiB ({parts})"
