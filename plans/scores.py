"""Head outputs under every candidate mode on live q, k, v, and how far off each is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from plans.models import AttentionModule
from plans.plan import Plan
from plans.solver import choose_modes
from plans.tiles import CACHED, FULL, TokenLayout, kept_pairs

HeadErrors = list[dict[str, list[float]]]  # per step, per module, per head

# Query rows attended at a time: enough to fill a matrix unit, few enough for a narrow key band.
_CHUNK_TOKENS = 128


def head_outputs(
    module: AttentionModule, q: Tensor, k: Tensor, v: Tensor, windows: Mapping[int, Sequence[int]]
) -> tuple[Tensor, dict[int, Tensor]]:
    """Attend in full with all heads, and in arrows with some.

    q, k, v: [B, S, H, D]; windows: half window in blocks -> heads, ascending. Returns the full
    output [B, S, H, D] and per half window the output [B, S, len(heads), D], in q's dtype.
    """
    # The arithmetic is fp32 either way: a GPU's kernels accumulate in it, a CPU's may not.
    on_cpu = q.device.type == "cpu"
    qt, kt, vt = ((x.float() if on_cpu else x).transpose(1, 2) for x in (q, k, v))
    full = F.scaled_dot_product_attention(qt, kt, vt)
    arrows = {}
    for half_window, heads in windows.items():
        pick = slice(None) if len(heads) == module.heads else list(heads)
        arrow = _arrow(
            module.layout, qt[:, pick], kt[:, pick], vt[:, pick], full[:, pick], half_window
        )
        arrows[half_window] = arrow.transpose(1, 2).to(q.dtype)
    return full.transpose(1, 2).to(q.dtype), arrows


def relative_squared_errors(
    module: AttentionModule, approximate: Tensor, full: Tensor
) -> list[float]:
    """Return per head mean (O_m - O)^2 / mean (O - mean O)^2, in fp32.

    Both [B, S, h, D]; rows of discarded text are left out. A constant output that is met exactly
    has error 0; one that is missed, or not finite, has error infinity.
    """
    layout = module.layout
    if not module.text_output:
        approximate = approximate.narrow(1, layout.image_offset, layout.image_tokens)
        full = full.narrow(1, layout.image_offset, layout.image_tokens)
    full = full.float()
    squared = (approximate.float() - full).square_().mean(dim=(0, 1, 3))
    spread = (full - full.mean(dim=(0, 1, 3), keepdim=True)).square_().mean(dim=(0, 1, 3))
    errors = torch.where(squared == 0, squared, squared / spread)
    return torch.nan_to_num(errors, nan=torch.inf).tolist()


def _arrow(
    layout: TokenLayout, q: Tensor, k: Tensor, v: Tensor, full: Tensor, half_window: int
) -> Tensor:
    """Arrow attention [B, h, S, D], a chunk of queries at a time on the keys it can see.

    Nothing of size S x S is made, so this serves the search at every picture size.
    """
    output = torch.empty_like(full)
    text = slice(layout.text_offset, layout.text_offset + layout.text_tokens)
    output[:, :, text] = full[:, :, text]  # text attends everything
    start = layout.image_offset
    rows = -(-_CHUNK_TOKENS // layout.block) * layout.block
    for first in range(0, layout.image_tokens, rows):
        end = min(first + rows, layout.image_tokens)
        keys, mask = _band(layout, first, end, half_window, q.device)
        k_seen, v_seen = (
            torch.cat([x[:, :, text], x[:, :, start + keys.start : start + keys.stop]], dim=2)
            for x in (k, v)
        )
        here = slice(start + first, start + end)
        output[:, :, here] = F.scaled_dot_product_attention(
            q[:, :, here], k_seen, v_seen, attn_mask=mask
        )
    return output


@lru_cache(maxsize=4096)  # 128 x a few hundred bytes each
def _band(
    layout: TokenLayout, first: int, end: int, half_window: int, device: torch.device
) -> tuple[slice, Tensor | None]:
    """Image keys that any of the queries first..end sees, and the mask over text and these keys.

    None where every query sees all of them.
    """
    q_block = torch.arange(first, end, device=device) // layout.block
    first_block, last_block = first // layout.block, (end - 1) // layout.block
    keys = slice(
        max(0, (first_block - half_window) * layout.block),
        min(layout.image_tokens, (last_block + half_window + 1) * layout.block),
    )
    k_block = torch.arange(keys.start, keys.stop, device=device) // layout.block
    seen = (q_block[:, None] - k_block[None, :]).abs() <= half_window
    if first_block == last_block or bool(seen.all()):
        return keys, None
    return keys, F.pad(seen, (layout.text_tokens, 0), value=True)


class _Heads:
    """Strategy that attends with all heads and keeps what flows on as the next step's cache."""

    def __init__(self, modules: Sequence[AttentionModule]) -> None:
        self.step = -1
        self.errors: HeadErrors = []
        self.modes: list[dict[str, tuple[int, ...]]] = []
        self._merged: dict[str, Tensor] = {}
        self._heads = {module.name: tuple(range(module.heads)) for module in modules}

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


class SearchHeads(_Heads):
    """Score every head and candidate at every step but the first, and take the best plan on.

    scores: per step, per module, per head: candidate mode -> error.
    """

    def __init__(
        self,
        modules: Sequence[AttentionModule],
        candidates: Mapping[str, Sequence[int]],
        delta: float,
        cap_factor: float,
    ) -> None:
        super().__init__(modules)
        self.scores: list[dict[str, list[dict[int, float]]]] = []
        self.savings = {m.name: head_savings(m, candidates[m.name]) for m in modules}
        self._candidates = candidates
        self._delta = delta
        self._cap_factor = cap_factor

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        self.scores.append({})

    def attend(
        self, module: AttentionModule, q: Tensor | None, k: Tensor | None, v: Tensor | None
    ) -> Tensor:
        assert q is not None and k is not None and v is not None
        scores: list[dict[int, float]] = [{} for _ in range(module.heads)]
        self.scores[self.step][module.name] = scores
        candidates = self._candidates[module.name] if self.step else ()
        windows = {mode: range(module.heads) for mode in candidates if mode >= 0}
        full, arrows = head_outputs(module, q, k, v, windows)
        outputs = {**arrows, CACHED: self._merged[module.name]} if CACHED in candidates else arrows
        for mode, output in outputs.items():
            for head, error in enumerate(relative_squared_errors(module, output, full)):
                scores[head][mode] = error
        cap = self._cap_factor * self._delta / module.heads
        modes = choose_modes(scores, self.savings[module.name], self._delta, cap)
        return self._flow_on(module, modes, full, arrows, windows)


class MeasureHeads(_Heads):
    """Do what a plan says and note how far each head's output is from its full attention."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan.modules)
        self._plan = plan

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
        self.errors[self.step][module.name] = relative_squared_errors(module, merged, full)
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
