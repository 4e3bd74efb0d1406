"""Attention per head, put into a diffusers MMDiT from outside.

`install` swaps the attention processors of an SD3 or FLUX transformer for one that projects only
the heads a strategy wants computed, and asks the strategy for the merged output of all heads.
`BucketHeads` is the strategy that does what one bucket of a plan says, caches included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plans import ops
from plans.errors import ArrowheadError
from plans.models import AttentionModule
from plans.plan import CacheFlow, CacheGroup, Plan, cache_flow
from plans.reordered import orders_of
from plans.stock import check_stock
from plans.tiles import CACHED


class HeadStrategy(Protocol):
    """What is done with the heads of each attention module."""

    def computed_heads(self, module: AttentionModule) -> tuple[int, ...]:
        """Name the heads, ascending, whose q, k, v `attend` wants."""

    def attend(
        self, module: AttentionModule, q: Tensor | None, k: Tensor | None, v: Tensor | None
    ) -> Tensor:
        """Turn the computed heads' q, k, v [B, S, h, D] (None if h is 0) into [B, S, H, D]."""


class HeadwiseProcessor:
    """Diffusers attention processor for SD3's Attention and for FluxAttention.

    Raises ArrowheadError for inputs it has no meaning for: masks, IP-adapter embeddings, other
    token counts than the plan's. order: where the module's heads lie, if a compiled plan of the
    same transformer has moved them; strategies count them as ever.
    """

    def __init__(
        self, module: AttentionModule, strategy: HeadStrategy, order: Sequence[int] | None = None
    ) -> None:
        self.module = module
        self.strategy = strategy
        self._places: dict[int, int] | None = None  # of each head
        if order is not None:
            self._places = {head: place for place, head in enumerate(order)}
        self._order = None if order is None else torch.tensor(order)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        ip_hidden_states: Any = None,
        ip_adapter_masks: Any = None,
        temb: Tensor | None = None,
        **others: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        self._refuse(
            attention_mask=attention_mask,
            ip_hidden_states=ip_hidden_states,
            ip_adapter_masks=ip_adapter_masks,
            temb=temb,
            **others,
        )
        self._check_tokens(hidden_states, encoder_hidden_states)
        heads = self.strategy.computed_heads(self.module)
        q = k = v = None
        if heads:
            places = self._places
            own = heads if places is None else tuple(places[head] for head in heads)
            q, k, v = self._qkv(attn, hidden_states, encoder_hidden_states, own)
            if image_rotary_emb is not None:
                q, k = _rotate(q, image_rotary_emb), _rotate(k, image_rotary_emb)
        merged = self.strategy.attend(self.module, q, k, v)
        if self._order is not None:
            self._order = self._order.to(merged.device)  # once
            merged = merged.index_select(2, self._order)
        merged = merged.flatten(2, 3).to(hidden_states.dtype)
        return self._project_out(attn, merged, encoder_hidden_states is not None)

    def _qkv(
        self, attn: Any, image: Tensor, text: Tensor | None, heads: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            _project(getattr(attn, name), image, heads, self.module.head_dim)
            for name in ("to_q", "to_k", "to_v")
        )
        q, k = _normalise(attn, "norm_q", q), _normalise(attn, "norm_k", k)
        if text is None:
            return q, k, v
        tq, tk, tv = (
            _project(getattr(attn, name), text, heads, self.module.head_dim)
            for name in ("add_q_proj", "add_k_proj", "add_v_proj")
        )
        tq, tk = _normalise(attn, "norm_added_q", tq), _normalise(attn, "norm_added_k", tk)
        if self.module.layout.text_first:
            q, k, v, tq, tk, tv = tq, tk, tv, q, k, v
        return torch.cat([q, tq], 1), torch.cat([k, tk], 1), torch.cat([v, tv], 1)

    def _project_out(
        self, attn: Any, merged: Tensor, joint: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        if getattr(attn, "pre_only", False):
            return merged  # FLUX single block: its own proj_out follows, on text and image alike
        if not joint:
            return attn.to_out[1](attn.to_out[0](merged))
        layout = self.module.layout
        image = merged.narrow(1, layout.image_offset, layout.image_tokens)
        text = merged.narrow(1, layout.text_offset, layout.text_tokens)
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[1](attn.to_out[0](image)), text

    def _refuse(self, **inputs: Any) -> None:
        given = sorted(name for name, value in inputs.items() if value is not None)
        if given:
            raise ArrowheadError(
                f"attention module {self.module.name}",
                got=f"the inputs {', '.join(given)}",
                expected="hidden states and rotary embedding only",
                fix="unload the IP-adapter and pass no attention mask or joint_attention_kwargs",
            )

    def _check_tokens(self, image: Tensor, text: Tensor | None) -> None:
        layout = self.module.layout
        got = image.shape[1] + (text.shape[1] if text is not None else 0)
        if got != layout.seq_len or (text is not None and text.shape[1] != layout.text_tokens):
            text_got = text.shape[1] if text is not None else "its own"
            raise ArrowheadError(
                f"attention module {self.module.name}",
                got=f"{got} tokens in all, {text_got} of them text",
                expected=f"{layout.image_tokens} image tokens and {layout.text_tokens} text tokens",
                fix="use the picture size and max_sequence_length the plan was made for",
            )


class BucketHeads:
    """Run one bucket of a plan; flow: who writes which cache, if not cache_flow(plan).

    cache_in: "<module>.<group>" -> [B, S, Hg, D], set by the caller before a forward.
    cache_out: the same names, filled by the forward with what this bucket writes.
    """

    def __init__(
        self,
        plan: Plan,
        bucket: int,
        device: torch.device | str = "cpu",
        flow: CacheFlow | None = None,
    ) -> None:
        self.cache_in: dict[str, Tensor] = {}
        self.cache_out: dict[str, Tensor] = {}
        flow = flow or cache_flow(plan)
        reads, writes = _by_module(flow.reads(bucket)), _by_module(flow.writes(bucket))
        modes = plan.buckets[bucket].modes
        self._work = {
            module.name: _ModuleWork(
                modes[module.name], reads.get(module.name, ()), writes.get(module.name, ()), device
            )
            for module in plan.modules
        }

    def computed_heads(self, module: AttentionModule) -> tuple[int, ...]:
        return self._work[module.name].computed

    def attend(
        self, module: AttentionModule, q: Tensor | None, k: Tensor | None, v: Tensor | None
    ) -> Tensor:
        work = self._work[module.name]
        merged = self._merge(module, work, q, k, v)
        for name, runs in work.writes.items():
            # Slices, not an index: TensorRT-RTX puts a Gather off to the end of the graph, and
            # holds what it reads until then.
            parts = [merged[:, :, first:end] for first, end in runs]
            self.cache_out[name] = torch.cat(parts, dim=2)
        return merged

    def _merge(
        self,
        module: AttentionModule,
        work: _ModuleWork,
        q: Tensor | None,
        k: Tensor | None,
        v: Tensor | None,
    ) -> Tensor:
        layout = module.layout
        shape = (layout.text_tokens, layout.text_first, layout.block, list(work.half_windows))
        scale = module.head_dim**-0.5
        if not work.reads:
            return ops.arrow_attention(q, k, v, scale, *shape)
        cache = self._cache(work.reads)
        if q is not None:
            return ops.cached_head(q, k, v, cache, scale, *shape, list(work.source))
        if work.source == tuple(range(module.heads)):
            return cache
        return cache.index_select(2, work.source_on(cache.device))

    def _cache(self, names: Sequence[str]) -> Tensor:
        missing = [name for name in names if name not in self.cache_in]
        if missing:
            raise ArrowheadError(
                f"cache {missing[0]}",
                got=f"the caches {sorted(self.cache_in)}",
                expected=f"every cache the bucket reads: {list(names)}",
                fix="run the steps of the schedule in order, from step 0",
            )
        parts = [self.cache_in[name] for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class _ModuleWork:
    """What one bucket does with the heads of one module; worked out once, used at every step."""

    def __init__(
        self,
        modes: Sequence[int],
        reads: Sequence[CacheGroup],
        writes: Sequence[CacheGroup],
        device: torch.device | str,
    ) -> None:
        self.computed = tuple(head for head, mode in enumerate(modes) if mode != CACHED)
        self.half_windows = tuple(modes[head] for head in self.computed)
        self.reads = tuple(group.name for group in reads)
        self.writes = {group.name: runs_of(group.heads) for group in writes}
        order = self.computed + tuple(head for group in reads for head in group.heads)
        self.source = tuple(order.index(head) for head in range(len(modes)))
        self._source = torch.tensor(self.source, device=device)

    def source_on(self, device: torch.device) -> Tensor:
        """Give `source` as a tensor on `device`, moved there once."""
        if self._source.device != device:
            self._source = self._source.to(device)
        return self._source


def install(
    transformer: nn.Module, modules: Sequence[AttentionModule], strategy: HeadStrategy
) -> Callable[[], None]:
    """Set a HeadwiseProcessor on every attention module; return the function that undoes it.

    Raises ArrowheadError, naming the module, where the transformer is not a stock SD3 or FLUX one:
    attention modules the plan does not list, fused projections, LoRA layers that are not fused,
    IP-adapters, quantised projections.
    """
    found = check_stock(transformer, modules)
    by_name, orders = {module.name: module for module in modules}, orders_of(transformer)
    before = {name: attn.processor for name, attn in found.items()}
    for name, attn in found.items():
        attn.set_processor(HeadwiseProcessor(by_name[name], strategy, orders.get(name)))

    def undo() -> None:
        for name, processor in before.items():
            found[name].set_processor(processor)

    return undo


def _project(layer: nn.Linear, x: Tensor, heads: tuple[int, ...], head_dim: int) -> Tensor:
    """Project onto the rows of `heads` only: [B, S, C] -> [B, S, h, D]."""
    if heads == tuple(range(layer.out_features // head_dim)):
        return layer(x).unflatten(-1, (-1, head_dim))
    weight = _rows(layer.weight, heads, head_dim)
    bias = None if layer.bias is None else _rows(layer.bias, heads, head_dim)
    return F.linear(x, weight, bias).unflatten(-1, (-1, head_dim))


def _rows(weight: Tensor, heads: tuple[int, ...], head_dim: int) -> Tensor:
    # Slices of contiguous rows, not an index: in a graph each is a byte range of the weights file.
    parts = [weight[first * head_dim : end * head_dim] for first, end in runs_of(heads)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def runs_of(heads: Sequence[int]) -> list[tuple[int, int]]:
    """Cut ascending numbers into runs without a gap: the first of each, and one past the last."""
    starts = [i for i, head in enumerate(heads) if i == 0 or head != heads[i - 1] + 1]
    ends = [*starts[1:], len(heads)]
    return [(heads[a], heads[b - 1] + 1) for a, b in zip(starts, ends, strict=True)]


def _normalise(attn: Any, name: str, x: Tensor) -> Tensor:
    norm = getattr(attn, name, None)
    if norm is None:
        return x
    if torch.compiler.is_exporting() and isinstance(norm, _rms_norm()):
        assert norm.bias is None
        return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)
    return norm(x)


def _rms_norm() -> Any:
    """Give diffusers' own, SD3.5's: written out in Python, where FLUX's is one operator."""
    from diffusers.models.normalization import RMSNorm

    return RMSNorm


def _rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    if torch.compiler.is_exporting():
        return ops.rotary_embedding(x, *tables)
    from diffusers.models.embeddings import apply_rotary_emb

    return apply_rotary_emb(x, tables, sequence_dim=1)


def _by_module(groups: Sequence[CacheGroup]) -> dict[str, tuple[CacheGroup, ...]]:
    result: dict[str, tuple[CacheGroup, ...]] = {}
    for group in groups:
        result[group.module] = (*result.get(group.module, ()), group)
    return result
