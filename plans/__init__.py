"""Per-head plans for MMDiT attention: what they say, whether they hold, what they save."""

from __future__ import annotations

from plans.bundle import Bundle, load_bundle, save_bundle
from plans.errors import ArrowheadError
from plans.models import AttentionModule, ModelSpec, model_spec
from plans.plan import (
    Bucket,
    CacheFlow,
    CacheGroup,
    ModelRef,
    Plan,
    Sampler,
    cache_flow,
    check_plan,
    dense_plan,
    load_plan,
    save_plan,
)
from plans.tiles import CACHED, FULL, TokenLayout

__all__ = [
    "CACHED", "FULL", "ArrowheadError", "AttentionModule", "Bucket", "Bundle", "CacheFlow",
    "CacheGroup", "ModelRef", "ModelSpec", "Plan", "Sampler", "TokenLayout", "cache_flow",
    "check_plan", "dense_plan", "load_bundle", "load_plan", "model_spec", "save_bundle",
    "save_plan",
]  # fmt: skip
