"""What the attention of a run does: measure every mode, choose as it goes, or follow a plan."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from plans.buckets import HeadTables
from plans.models import AttentionModule
from plans.plan import Plan
from plans.scores import counted, head_outputs, relative_squared_errors, sample_rows
from plans.solver import choose_modes
from plans.tiles import CACHED, FULL, kept_pairs

HeadErrors = list[dict[str, list[float]]]  # per step, per module, per head

# Image rows that errors are told from: enough for 1 %, few beside the 16384 of a 2K picture.
_SAMPLE_TOKENS = 2048


class Recorder:
    """Notes what every arrow, and every full output of 1..ages steps ago, would err at each step.

    What is kept of the past is a sample of rows: ages x about 2048 x H x D items a module.
    """

    def __init__(
        self,
        modules: Sequence[AttentionModule],
        candidates: Mapping[str, Sequence[int]],
        steps: int,
        ages: int,
    ) -> None:
        self._modules = modules
        self._candidates = candidates
        cached = any(CACHED in modes for modes in candidates.values())
        self._ages = min(ages, steps - 1) if cached else 0
        self._past: dict[str, deque[Tensor]] = {
            module.name: deque(maxlen=self._ages) for module in modules
        }
        windows = {mode for modes in candidates.values() for mode in modes if mode >= 0}
        self._windows = tuple(sorted(windows))
        # Errors stay on the device until the run is over: [W + ages, H] a step and module.
        self._errors: list[dict[str, Tensor]] = [{} for _ in range(steps)]

    def note(
        self, step: int, module: AttentionModule, q: Tensor, k: Tensor, v: Tensor, full: Tensor
    ) -> None:
        """Take down a module's errors at a step; q, k, v and full attention [B, S, H, D]."""
        sample = sample_rows(module, _SAMPLE_TOKENS, full.device)
        seen = full.index_select(1, sample.rows)
        past = self._past[module.name]
        missing = torch.full((module.heads,), torch.inf, device=full.device)
        errors = [
            relative_squared_errors(sample.arrow(q, k, v, seen, window), seen, sample.weights)
            if window in self._candidates[module.name]
            else missing
            for window in self._windows
        ]
        errors += [relative_squared_errors(old, seen, sample.weights) for old in past]
        errors += [missing] * (self._ages - len(past))
        nothing = missing.new_empty(0, module.heads)
        self._errors[step][module.name] = torch.stack(errors) if errors else nothing
        past.appendleft(seen)

    def tables(self) -> HeadTables:
        """Return what the run showed."""
        rows = [
            torch.cat([row[module.name] for module in self._modules], dim=1).cpu().numpy()
            for row in self._errors
        ]
        errors = np.stack(rows).astype(np.float64).transpose(0, 2, 1)  # [N, R, W + A]
        savings = {m.name: head_savings(m, self._candidates[m.name]) for m in self._modules}
        table = [head for module in self._modules for head in savings[module.name]]
        arrow = [[head.get(window, 0.0) for window in self._windows] for head in table]
        return HeadTables(
            heads=tuple(module.heads for module in self._modules),
            windows=self._windows,
            arrow=errors[:, :, : len(self._windows)],
            cached=errors[:, :, len(self._windows) :],
            arrow_saving=np.array(arrow).reshape(len(table), len(self._windows)),
            cached_saving=np.array([head.get(CACHED, 0.0) for head in table]),
        )


class _Heads:
    """Attends with all heads and keeps what flows on as the next step's cache."""

    def __init__(self, modules: Sequence[AttentionModule]) -> None:
        self.step = -1
        self._heads = {module.name: tuple(range(module.heads)) for module in modules}
        self.errors: HeadErrors = []
        self.modes: list[dict[str, tuple[int, ...]]] = []
        self._merged: dict[str, Tensor] = {}

    def begin_step(self, step: int) -> None:
        self.step = step
        self.errors.append({})
        self.modes.append({})

    def computed_heads(self, module: AttentionModule) -> tuple[int, ...]:
        return self._heads[module.name]

    def _flow_on(
        self,
        module: AttentionModule,
        modes: Sequence[int],
        full: Tensor,
        arrows: Mapping[int, Tensor],
        windows: Mapping[int, Sequence[int]],
    ) -> Tensor:
        """Merge each head's output in its mode; the merged output is the next step's cache."""
        merged = full.clone(memory_format=torch.contiguous_format)
        cached = [head for head, mode in enumerate(modes) if mode == CACHED]
        if cached:
            merged[:, :, cached] = self._merged[module.name][:, :, cached]
        for half_window, heads in windows.items():
            chosen = [head for head in heads if modes[head] == half_window]
            if chosen:
                rows = [heads.index(head) for head in chosen]
                merged[:, :, chosen] = arrows[half_window][:, :, rows]
        self._merged[module.name] = merged
        self.modes[self.step][module.name] = tuple(modes)
        return merged


class ChooseHeads(_Heads):
    """Score every head and candidate at every step but the first, and go on with the best choice.

    This is DiTFastAttnV2's own search (arXiv 2503.22796): step by step, in execution order.
    """

    def __init__(
        self,
        modules: Sequence[AttentionModule],
        candidates: Mapping[str, Sequence[int]],
        delta: float,
        cap_factor: float,
    ) -> None:
        super().__init__(modules)
        self.savings = {m.name: head_savings(m, candidates[m.name]) for m in modules}
        self._candidates = candidates
        self._delta = delta
        self._cap_factor = cap_factor

    def attend(
        self, module: AttentionModule, q: Tensor | None, k: Tensor | None, v: Tensor | None
    ) -> Tensor:
        assert q is not None and k is not None and v is not None
        scores: list[dict[int, float]] = [{} for _ in range(module.heads)]
        candidates = self._candidates[module.name] if self.step else ()
        windows = {mode: range(module.heads) for mode in candidates if mode >= 0}
        full, arrows = head_outputs(module, q, k, v, windows)
        outputs = {**arrows, CACHED: self._merged[module.name]} if CACHED in candidates else arrows
        for mode, output in outputs.items():
            errors = relative_squared_errors(counted(module, output), counted(module, full))
            for head, error in enumerate(errors.tolist()):
                scores[head][mode] = error
        return self._flow_on(module, self._choose(module, scores), full, arrows, windows)

    def _choose(self, module: AttentionModule, scores: list[dict[int, float]]) -> Sequence[int]:
        cap = self._cap_factor * self._delta / module.heads
        return choose_modes(scores, self.savings[module.name], self._delta, cap)


class MeasureHeads(_Heads):
    """Do what a plan says and note how far each head's output is from its full attention."""

    def __init__(self, plan: Plan, recorder: Recorder | None = None) -> None:
        super().__init__(plan.modules)
        self._plan = plan
        self._recorder = recorder

    def attend(
        self, module: AttentionModule, q: Tensor | None, k: Tensor | None, v: Tensor | None
    ) -> Tensor:
        assert q is not None and k is not None and v is not None
        modes = self._plan.modes_at(self.step)[module.name]
        windows = {
            mode: [head for head, own in enumerate(modes) if own == mode]
            for mode in sorted(set(modes))
            if mode >= 0
        }
        full, arrows = head_outputs(module, q, k, v, windows)
        merged = self._flow_on(module, modes, full, arrows, windows)
        errors = relative_squared_errors(counted(module, merged), counted(module, full))
        self.errors[self.step][module.name] = errors.tolist()
        if self._recorder is not None:
            self._recorder.note(self.step, module, q, k, v, full)
        return merged


def head_savings(module: AttentionModule, candidates: Sequence[int]) -> list[dict[int, float]]:
    """Return per head the query/key pairs that each candidate mode saves."""
    full = kept_pairs(module.layout, FULL, module.text_output)
    saved = {
        mode: float(full - kept_pairs(module.layout, mode, module.text_output))
        for mode in candidates
    }
    return [saved] * module.heads


def pairs_saved(
    savings: Mapping[str, list[dict[int, float]]], modes: Mapping[str, Sequence[int]]
) -> float:
    """Return the query/key pairs that one step's modes save."""
    return sum(
        savings[name][head].get(mode, 0.0)
        for name, row in modes.items()
        for head, mode in enumerate(row)
    )
