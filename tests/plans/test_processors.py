from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plans import reference
from plans.errors import ArrowheadError
from plans.models import AttentionModule
from plans.plan import Plan, cache_flow, dense_plan
from plans.processors import BucketHeads, install
from tests.tiny import inputs_of, random_plan, spec_of, tiny_flux, tiny_sd3, with_modes

MODELS: dict[str, Callable[[], Any]] = {
    "sd3": lambda: tiny_sd3(qk_norm=None, dual_attention_layers=()),
    "sd3.5-medium": tiny_sd3,
    "flux": tiny_flux,
    "flux-schnell": lambda: tiny_flux(guidance_embeds=False),
}


@torch.no_grad()
def call(model: Any, step: int = 0) -> Tensor:
    return model(**inputs_of(model, seed=step), return_dict=False)[0]


class NaiveHeads:
    """Projects every head, keeps every head's last output, and follows the modes at a step."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.step = plan, 0
        self.last: dict[tuple[str, int], Tensor] = {}

    def computed_heads(self, module: AttentionModule) -> tuple[int, ...]:
        return tuple(range(module.heads))

    def attend(self, module: AttentionModule, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layout, heads = module.layout, []
        for head, mode in enumerate(self.plan.modes_at(self.step)[module.name]):
            if mode != -2:
                self.last[module.name, head] = reference.arrow_attention(
                    *(x[:, :, head : head + 1] for x in (q, k, v)),
                    scale=module.head_dim**-0.5,
                    text_tokens=layout.text_tokens,
                    text_first=layout.text_first,
                    block=layout.block,
                    half_windows=[mode],
                )
            heads.append(self.last[module.name, head])
        return torch.cat(heads, dim=2)


@pytest.mark.parametrize("name", MODELS)
def test_all_full_equals_the_stock_processors(name: str) -> None:
    model = MODELS[name]()
    want = call(model)
    before = {n: type(m.processor) for n, m in model.named_modules() if hasattr(m, "processor")}
    spec = spec_of(model)
    undo = install(model, spec.modules, BucketHeads(dense_plan(random_plan(model)), 0))
    torch.testing.assert_close(call(model), want, rtol=1e-5, atol=1e-6)
    undo()
    after = {n: type(m.processor) for n, m in model.named_modules() if hasattr(m, "processor")}
    assert after == before
    assert torch.equal(call(model), want)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_run_equals_the_last_output_of_every_head(name: str, seed: int) -> None:
    model = MODELS[name]()
    plan = random_plan(model, seed=seed, buckets=4, steps=9)
    naive = NaiveHeads(plan)
    buckets = [BucketHeads(plan, bucket) for bucket in range(len(plan.buckets))]
    flow = cache_flow(plan)
    caches: dict[str, Tensor] = {}
    for step, bucket in enumerate(plan.schedule):
        naive.step = step
        undo = install(model, plan.modules, naive)
        want = call(model, step)
        undo()
        heads = buckets[bucket]
        heads.cache_in = {group.name: caches[group.name] for group in flow.reads(bucket)}
        undo = install(model, plan.modules, heads)
        got = call(model, step)
        undo()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)
        assert set(heads.cache_out) == {group.name for group in flow.writes(bucket)}
        for group in flow.writes(bucket):
            kept = torch.cat([naive.last[group.module, h] for h in group.heads], dim=2)
            torch.testing.assert_close(heads.cache_out[group.name], kept, rtol=1e-5, atol=2e-6)
        caches.update(heads.cache_out)


def test_a_cached_head_projects_nothing() -> None:
    model = tiny_flux()
    plan = random_plan(model)
    plan = with_modes(plan, {plan.modules[0].name: (-2, -1, -2, 0)})
    attn = model.get_submodule(plan.modules[0].name)
    heads = BucketHeads(plan, 1)
    assert heads.computed_heads(plan.modules[0]) == (1, 3)
    install(model, plan.modules, heads)
    shape = (2, plan.modules[0].layout.seq_len, 1, 8)
    for group in cache_flow(plan).reads(1):
        heads.cache_in[group.name] = torch.zeros(*shape[:2], len(group.heads), 8)
    want = call(model)
    with torch.no_grad():
        for projection in (attn.to_q, attn.to_k, attn.to_v, attn.add_q_proj):
            projection.weight[0:8] = torch.nan
            projection.weight[16:24] = torch.nan
    assert torch.equal(call(model), want)


def test_missing_cache() -> None:
    model = tiny_sd3()
    plan = random_plan(model)
    install(model, plan.modules, BucketHeads(plan, 1))
    with pytest.raises(
        ArrowheadError, match=r"cache transformer_blocks.0.attn.0 \| got the caches"
    ):
        call(model)


def test_wrong_token_count() -> None:
    model = tiny_sd3()
    plan = dense_plan(random_plan(model))
    install(model, plan.modules, BucketHeads(plan, 0))
    inputs = inputs_of(model)
    inputs["hidden_states"] = inputs["hidden_states"][..., :8]
    with pytest.raises(ArrowheadError, match="got 21 tokens in all, 5 of them text; expected 24"):
        model(**inputs)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_unsupported_inputs(name: str) -> None:
    model = MODELS[name]()
    plan = dense_plan(random_plan(model))
    install(model, plan.modules, BucketHeads(plan, 0))
    for word in ("attention_mask", "ip_hidden_states"):
        with pytest.raises(ArrowheadError, match=f"got the inputs {word}"):
            model(**inputs_of(model), joint_attention_kwargs={word: torch.zeros(1)})


class LoraLinear(nn.Module):
    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer


def lora(model: Any) -> None:
    block = model.transformer_blocks[0]
    block.ff.net[2] = LoraLinear(block.ff.net[2])


def quantised(model: Any) -> None:
    model.transformer_blocks[0].attn.to_k.__class__ = type("Linear4bit", (nn.Linear,), {})


def adapter(model: Any) -> None:
    model.image_proj = nn.Linear(1, 1)


def other_processor(model: Any) -> None:
    processor = type("PAGJointAttnProcessor2_0", (), {"__call__": lambda self, attn: None})()
    model.transformer_blocks[1].attn.set_processor(processor)


def other_class(model: Any) -> None:
    model.transformer_blocks[0].attn.__class__ = type(
        "SageAttention", (type(model.transformer_blocks[0].attn),), {}
    )


def norm_across_heads(model: Any) -> None:
    model.transformer_blocks[0].attn.norm_q = nn.RMSNorm(32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lora, r"LoRA layers that are not fused \(transformer_blocks.0.ff.net.2 .*fuse_lora"),
        (quantised, "to_k of type Linear4bit; expected torch.nn.Linear"),
        (adapter, "got an IP-adapter; expected text conditioning only"),
        (
            other_processor,
            "transformer_blocks.1.attn .* got the processor PAGJointAttnProcessor2_0",
        ),
        (other_class, "got SageAttention; expected one of .'Attention', 'FluxAttention'."),
        (norm_across_heads, "got norm_q over all heads"),
        (lambda model: model.fuse_qkv_projections(), "got fused QKV projections; .*unfuse"),
    ],
)
def test_install_refuses(change: Callable[[Any], Any], message: str) -> None:
    model = tiny_sd3()
    plan = random_plan(model)
    change(model)
    with pytest.raises(ArrowheadError, match=message):
        install(model, plan.modules, BucketHeads(plan, 0))


def test_install_refuses_other_modules() -> None:
    model = tiny_sd3()
    plan = random_plan(tiny_sd3(dual_attention_layers=()))
    with pytest.raises(ArrowheadError, match="transformer_blocks.0.attn2.* the plan does not list"):
        install(model, plan.modules, BucketHeads(plan, 0))


def test_install_refuses_other_head_count() -> None:
    plan = random_plan(tiny_sd3())
    model = tiny_sd3(num_attention_heads=2, attention_head_dim=16)
    with pytest.raises(ArrowheadError, match="got 2 heads of 16; expected 4 heads of 8"):
        install(model, plan.modules, BucketHeads(plan, 0))
