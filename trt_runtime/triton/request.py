"""One client's request, checked: every fault is an ArrowheadError that names the input."""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from plans.errors import ArrowheadError
from plans.plan import Plan

# Text encoders read at most some hundred tokens; more is a mistake, and costs the tokenizer time.
MAX_PROMPT_BYTES = 8192
MAX_GUIDANCE = 100.0
_EMBEDS = ("PROMPT_EMBEDS", "POOLED_PROMPT_EMBEDS")


@dataclass(frozen=True, eq=False)
class Asked:
    """The pictures of one request: as many as there are seeds.

    prompts, negatives: one a picture; None where embeddings or an empty text stand for them.
    embeddings: by the pipeline's argument, float32 [pictures, ...].
    """

    seeds: tuple[int, ...]
    guidance: float
    prompts: tuple[str, ...] | None = None
    negatives: tuple[str, ...] | None = None
    embeddings: Mapping[str, np.ndarray[Any, Any]] | None = None
    preview_every: int = 0

    @property
    def call(self) -> tuple[float, frozenset[str]]:
        """What requests must have in common to be drawn by one call of the pipeline."""
        return self.guidance, frozenset(self.embeddings or ())


def parse(plan: Plan, accepted: Collection[str], arrays: Mapping[str, Any]) -> Asked:
    """Check a request's tensors [pictures, ...], by input name, against the plan.

    accepted: the names the model's config lists. Triton has checked types and shapes.
    """
    count = next((len(array) for array in arrays.values()), 0)
    prompts = _texts(arrays, "PROMPT")
    embeddings = _embeddings(arrays, "")
    if (prompts is None) == (not embeddings):
        _refuse(
            "PROMPT",
            "nothing" if prompts is None else "both PROMPT and PROMPT_EMBEDS",
            "a text, or PROMPT_EMBEDS with POOLED_PROMPT_EMBEDS",
            "send PROMPT as BYTES of shape [pictures, 1]",
        )
    negatives = _texts(arrays, "NEGATIVE_PROMPT")
    against = _embeddings(arrays, "NEGATIVE_")
    if against and (negatives is not None or not embeddings):
        _refuse(
            "NEGATIVE_PROMPT_EMBEDS",
            "them beside a text prompt" if negatives is None else "NEGATIVE_PROMPT too",
            "embeddings for both prompts, or a negative text",
            "drop them, or send PROMPT_EMBEDS and no NEGATIVE_PROMPT",
        )
    _check_planned(plan, arrays)
    return Asked(
        seeds=_seeds(arrays, count),
        guidance=_guidance(plan, arrays) if "GUIDANCE" in accepted else _planned_guidance(plan),
        prompts=prompts,
        negatives=negatives,
        embeddings=(embeddings | against) or None,
        preview_every=_preview_every(plan, arrays),
    )


def _texts(arrays: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
    if name not in arrays:
        return None
    return tuple(_text(name, value) for value in arrays[name].reshape(-1))


def _text(name: str, value: bytes) -> str:
    if len(value) > MAX_PROMPT_BYTES:
        _refuse(
            name,
            f"{len(value)} bytes",
            f"at most {MAX_PROMPT_BYTES}",
            "shorten it: the text encoders read its first tokens only",
        )
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        _refuse(
            name,
            f"byte 0x{value[error.start]:02x} at {error.start}, which is not UTF-8",
            "UTF-8 text",
            "encode the text as UTF-8",
        )


def _seeds(arrays: Mapping[str, Any], count: int) -> tuple[int, ...]:
    if "SEED" not in arrays:
        return tuple(secrets.randbelow(2**32) for _ in range(count))
    seeds = tuple(int(seed) for seed in arrays["SEED"].reshape(-1))
    if min(seeds) < 0:
        _refuse("SEED", min(seeds), "0 or more", "send another, or none for a random one")
    return seeds


def _check_planned(plan: Plan, arrays: Mapping[str, Any]) -> None:
    for name, planned in (("STEPS", plan.steps), ("HEIGHT", plan.height), ("WIDTH", plan.width)):
        for got in arrays[name].reshape(-1) if name in arrays else ():
            if got != planned:
                _refuse(
                    name,
                    got,
                    f"{planned}, as planned",
                    f"send {planned} or leave {name} out; other values need a plan and a model of "
                    "their own (arrowhead plan search)",
                )


def _guidance(plan: Plan, arrays: Mapping[str, Any]) -> float:
    value = _one(arrays, "GUIDANCE", _planned_guidance(plan))
    # At 1 and below SD3's pipeline drops the negative rows, which the graphs have.
    least = "above 1" if plan.sampler.cfg else "0 or more"
    fits = value > 1 if plan.sampler.cfg else value >= 0
    if not math.isfinite(value) or not fits or value > MAX_GUIDANCE:
        _refuse(
            "GUIDANCE",
            f"{value:g}",
            f"{least}, at most {MAX_GUIDANCE:g}",
            f"leave GUIDANCE out: the plan was made with {_planned_guidance(plan):g}",
        )
    return value


def _planned_guidance(plan: Plan) -> float:
    return float(plan.sampler.guidance_scale)


def _preview_every(plan: Plan, arrays: Mapping[str, Any]) -> int:
    every = int(_one(arrays, "PREVIEW_EVERY", 0))
    if not 0 <= every <= plan.steps:
        _refuse("PREVIEW_EVERY", every, f"0 to {plan.steps}, the steps", "leave it out for none")
    return every


def _embeddings(arrays: Mapping[str, Any], sign: str) -> dict[str, np.ndarray[Any, Any]]:
    """Give embeddings by the pipeline's names; both of a pair or none."""
    names = [sign + name for name in _EMBEDS]
    # The pipeline says negative_pooled_prompt_embeds, as the inputs do.
    given = {name.lower(): arrays[name] for name in names if name in arrays}
    if len(given) == 1:
        missing = next(name for name in names if name not in arrays)
        _refuse(missing, "nothing", f"both of {' and '.join(names)}", f"send {missing} too")
    for name, array in given.items():
        if not np.isfinite(array).all():
            _refuse(name.upper(), "values that are not finite", "numbers", "check the encoder")
    return given


def _one(arrays: Mapping[str, Any], name: str, default: float) -> float:
    """Give the value that all pictures of a request share."""
    values = {float(value) for value in arrays[name].reshape(-1)} if name in arrays else {default}
    if len(values) > 1:
        _refuse(
            name,
            f"{sorted(values)} in one request",
            "one value for all of its pictures",
            "send a request for each value",
        )
    return values.pop()


def _refuse(name: str, got: object, expected: str, fix: str) -> NoReturn:
    raise ArrowheadError(name, got=got, expected=expected, fix=fix)
