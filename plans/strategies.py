"""What the attention of a run does: choose modes as it goes, or follow a plan and measure it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from plans import ops
from plans.importance import Energies
from plans.models import AttentionModule
from plans.plan import Plan
from plans.recorder import Recorder, Savings
from plans.sample import SAMPLE_TOKENS, sample_of
from plans.scores import Moments, attention, latest, moments
from plans.solver import choose_modes
from plans.tiles import CACHED, FULL

HeadErrors = list[dict[str, list[float]]]  # per step, per module, per head


class _Heads:
    """Projects all heads, and keeps what flows on where a later step may read it."""

    def __init__(self, modules: Sequence[AttentionModule], kept: frozenset[str]) -> None:
        self.step = -1
        self._heads = {module.name: tuple(range(module.heads)) for module in modules}
        self._kept = kept
        self._merged: dict[str, Tensor] = {}

    def begin_step(self, step: int) -> None:
        self.step = step

    def computed_heads(self, module: AttentionModule) -> tuple[int, ...]:
        return self._heads[module.name]

    def _merge(
        self, module: AttentionModule, modes: Sequence[int], q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """Do what a bucket with these modes does; a cache is the step before's merged output."""
        merged = self._attend(module, modes, q, k, v)
        if module.name in self._kept:
            self._merged[module.name] = merged
        return merged

    def _attend(
        self, module: AttentionModule, modes: Sequence[int], q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        if all(mode == FULL for mode in modes):
            return attention(q, k, v)
        computed = [head for head, mode in enumerate(modes) if mode != CACHED]
        if not computed:
            return self._merged[module.name]
        if len(computed) < len(modes):
            heads = _index(tuple(computed), q.device)
            q, k, v = (x.index_select(2, heads) for x in (q, k, v))
        layout = module.layout
        shape = (
            module.head_dim**-0.5, layout.text_tokens, layout.text_first, layout.block,
            [modes[head] for head in computed],
        )  # fmt: skip
        if len(computed) == len(modes):
            return ops.arrow_attention(q, k, v, *shape)
        place = {head: i for i, head in enumerate(computed)}
        source = [place.get(head, len(computed) + head) for head in range(len(modes))]
        return ops.cached_head(q, k, v, self._merged[module.name], *shape, source)


@lru_cache(maxsize=4096)  # one of each module and bucket: saves a copy to the device a call
def _index(heads: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(heads, device=device)


class ChooseHeads(_Heads):
    """Score every head and candidate at every step but the first, and go on with the best choice.

    This is DiTFastAttnV2's own search (arXiv 2503.22796): step by step, in execution order. With
    first_step "arrow" arrows are tried at the first step too. weights: what errors are multiplied
    by, where not by 1.
    """

    def __init__(
        self,
        modules: Sequence[AttentionModule],
        candidates: Mapping[str, Sequence[int]],
        savings: Savings,
        delta: float,
        cap_factor: float,
        image_tokens: int = SAMPLE_TOKENS,
        first_step: str = "full",
        weights: HeadErrors | None = None,
    ) -> None:
        super().__init__(
            modules, frozenset(n for n, modes in candidates.items() if CACHED in modes)
        )
        self.modes: list[dict[str, tuple[int, ...]]] = []
        self._candidates = candidates
        self.savings = savings
        self._delta = delta
        self._cap_factor = cap_factor
        self._tokens = image_tokens
        self._first_step = first_step
        self._weights = weights

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        self.modes.append({})

    def attend(
        self, module: AttentionModule, q: Tensor | None, k: Tensor | None, v: Tensor | None
    ) -> Tensor:
        assert q is not None and k is not None and v is not None
        modes: Sequence[int] = [FULL] * module.heads
        candidates = self._tried(module)
        if candidates:
            errors = self._errors(module, candidates, q, k, v)
            weights = [1.0] * module.heads
            if self._weights is not None:
                weights = self._weights[self.step][module.name]
            scores = [{mode: row[head] * weight for mode, row in errors.items()} for head, weight in
                      enumerate(weights)]  # fmt: skip
            modes = self._choose(module, scores)
        self.modes[self.step][module.name] = tuple(modes)
        return self._merge(module, modes, q, k, v)

    def _tried(self, module: AttentionModule) -> Sequence[int]:
        """Candidates of this step: at the first there is no cache to read."""
        candidates = self._candidates[module.name]
        if self.step:
            return candidates
        arrows = [mode for mode in candidates if mode != CACHED]
        return arrows if self._first_step == "arrow" else ()

    def _errors(
        self, module: AttentionModule, candidates: Sequence[int], q: Tensor, k: Tensor, v: Tensor
    ) -> dict[int, list[float]]:
        """Mode -> what it would err at this step, per head."""
        windows = sorted(mode for mode in candidates if mode >= 0)
        sample = sample_of(module, q.device, windows, self._tokens)
        seen = sample.full(q, k, v)
        order = [*windows, *([CACHED] if CACHED in candidates else [])]
        outputs = seen.new_empty(len(order), *seen.shape)
        sample.arrows(q, k, v, seen, outputs)
        if CACHED in candidates:
            outputs[-1] = sample.of(self._merged[module.name])
        errors = moments([outputs], seen, sample.weights).errors().tolist()
        return dict(zip(order, errors, strict=True))

    def _choose(self, module: AttentionModule, scores: list[dict[int, float]]) -> Sequence[int]:
        cap = self._cap_factor * self._delta / module.heads
        return choose_modes(scores, self.savings[module.name], self._delta, cap)


class MeasureHeads(_Heads):
    """Do what a plan says and note how far each head's output is from its full attention.

    energies: takes down what heads add to the residual streams, of a plan that is all full.
    """

    def __init__(
        self,
        plan: Plan,
        recorder: Recorder | None = None,
        image_tokens: int = SAMPLE_TOKENS,
        energies: Energies | None = None,
    ) -> None:
        cached = {n for b in plan.buckets for n, modes in b.modes.items() if CACHED in modes}
        super().__init__(plan.modules, frozenset(cached))
        self._plan = plan
        self._recorder = recorder
        self._energies = energies
        self._tokens = image_tokens
        self._moments: list[dict[str, Moments]] = [{} for _ in range(plan.steps)]

    def attend(
        self, module: AttentionModule, q: Tensor | None, k: Tensor | None, v: Tensor | None
    ) -> Tensor:
        assert q is not None and k is not None and v is not None
        modes = self._plan.modes_at(self.step)[module.name]
        merged = self._merge(module, modes, q, k, v)
        if self._recorder is None:
            sample = sample_of(module, q.device, (), self._tokens)
        else:
            sample = self._recorder.sample(module, q.device)
        ours = sample.of(merged)
        full = all(mode == FULL for mode in modes)
        seen = ours if full else sample.full(q, k, v)
        self._moments[self.step][module.name] = moments([ours[None]], seen, sample.weights)
        if self._recorder is not None:
            self._recorder.note(self.step, module, q, k, v, seen)
        if self._energies is not None:
            self._energies.note(self.step, module, sample, seen)
        return merged

    def measured(self) -> dict[str, NDArray[np.float64]]:
        """Return the finished run's "mean" and "spread" [N, R] and "squared" [N, R, 1].

        What is full errs by nothing, whichever kernel computed it, nor does what was left out.
        """
        found = [[latest(self._moments, step, module.name) for module in self._plan.modules] for
                 step in range(self._plan.steps)]  # fmt: skip
        rows = [
            torch.cat([torch.stack([m.mean, m.spread, m.squared[0]]) for m in step], dim=1)
            for step in found
        ]
        table = torch.stack(rows).cpu().numpy().astype(np.float64)
        squared = np.where(self._is_full(), 0.0, table[:, 2])
        return {"mean": table[:, 0], "spread": table[:, 1], "squared": squared[:, :, None]}

    def _is_full(self) -> NDArray[np.bool_]:
        modes = [
            [mode for module in self._plan.modules for mode in
             self._plan.modes_at(step)[module.name]] for step in range(self._plan.steps)
        ]  # fmt: skip
        return np.array(modes) == FULL


def errors_by_module(modules: Sequence[AttentionModule], errors: NDArray[np.float64]) -> HeadErrors:
    """Split errors [N, R] by module."""
    ends = np.cumsum([module.heads for module in modules])
    return [
        {
            module.name: row[end - module.heads : end].tolist()
            for module, end in zip(modules, ends, strict=True)
        }
        for row in errors
    ]
