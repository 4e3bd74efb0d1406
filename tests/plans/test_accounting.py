from __future__ import annotations

from dataclasses import replace

import pytest

from plans.accounting import account
from plans.models import transformer_flops
from plans.plan import Bucket, Plan, cache_flow, dense_plan
from plans.tiles import CACHED, FULL, kept_pairs
from tests.tiny import random_plan, spec_of, tiny_flux, tiny_sd3


def _uniform(plan: Plan, mode: int) -> Plan:
    """Step 0 full, every other step `mode` in every head."""
    full = Bucket({m.name: (FULL,) * m.heads for m in plan.modules})
    other = Bucket({m.name: (mode,) * m.heads for m in plan.modules})
    return replace(plan, buckets=(full, other), schedule=(0,) + (1,) * (plan.steps - 1))


def test_dense_saves_nothing() -> None:
    facts = account(dense_plan(random_plan(tiny_sd3())), batch=2)
    assert facts["attention_flops_saved"] == facts["paper_formula_saved"] == 0
    assert facts["cache_bytes"] == {"2": 0, "4": 0}
    assert facts["attention_pairs_kept"] == facts["attention_pairs_full"]


def test_all_cached_saves_all_but_the_first_step() -> None:
    plan = _uniform(random_plan(tiny_flux()), CACHED)
    facts = account(plan, batch=3)
    assert facts["attention_flops_saved"] == pytest.approx(1 - 1 / plan.steps)
    assert facts["paper_formula_saved"] == pytest.approx(1 - 1 / plan.steps)
    assert facts["per_step"] == [0.0] + [1.0] * (plan.steps - 1)
    items = 3 * sum(m.layout.seq_len * m.heads * m.head_dim for m in plan.modules)
    assert facts["cache_bytes"] == {"2": 2 * items, "4": 4 * items}


def test_arrows_are_priced_by_block_and_by_the_papers_formula() -> None:
    plan = _uniform(random_plan(tiny_sd3(dual_attention_layers=())), 1)
    layout = plan.modules[0].layout
    facts = account(plan, batch=1)
    kept = sum(
        m.heads * kept_pairs(layout, 1, m.text_output) * (plan.steps - 1)
        + m.heads * kept_pairs(layout, FULL, m.text_output)
        for m in plan.modules
    )
    assert facts["attention_pairs_kept"] == kept
    benefit = ((layout.image_tokens - layout.block) / layout.seq_len) ** 2
    assert facts["paper_formula_saved"] == pytest.approx(benefit * (plan.steps - 1) / plan.steps)


def test_transformer_flops_need_the_config() -> None:
    model = tiny_sd3()
    plan = random_plan(model)
    assert account(plan, 2)["transformer_flops"] is None
    spec = spec_of(model)
    facts = account(replace(plan, model=replace(plan.model, config=spec.config)), 2)
    dense = transformer_flops(spec, None, 2)["total"]
    assert facts["transformer_flops_dense"] == plan.steps * dense
    planned = [transformer_flops(spec, plan.modes_at(s), 2)["total"] for s in range(plan.steps)]
    assert facts["transformer_flops"] == sum(planned)


def test_cache_bytes_are_those_of_the_groups() -> None:
    plan = random_plan(tiny_sd3(), seed=3)
    modules = {m.name: m for m in plan.modules}
    items = sum(
        len(g.heads) * modules[g.module].layout.seq_len * modules[g.module].head_dim
        for g in cache_flow(plan).groups
    )
    assert account(plan, 2)["cache_bytes"]["4"] == 2 * items * 4
