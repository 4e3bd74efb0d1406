"""Architectures by name, and plans of chosen heads."""

import math

import pytest

from plans.architectures import ARCHITECTURES, architecture_of
from plans.errors import ArrowheadError
from plans.plan import load_plan, save_plan
from plans.synthetic import Mix, mix_of_cut, parse_mix, synthetic_plan
from plans.tiles import CACHED, FULL, TokenLayout

FLUX_2K = TokenLayout(16384, 512, True)


def test_architectures_have_the_real_modules() -> None:
    modules = {name: a.spec(2048, 2048).modules for name, a in ARCHITECTURES.items()}
    assert {name: len(found) for name, found in modules.items()} == {
        "flux.1-dev": 57, "sd3-medium": 24, "sd3.5-medium": 37, "sd3.5-large": 38,
    }  # fmt: skip
    assert modules["sd3.5-large"][0].heads == 38
    assert modules["flux.1-dev"][0].layout == FLUX_2K
    assert modules["sd3-medium"][0].layout == TokenLayout(16384, 333, False)


def test_dual_attention_is_a_module_of_its_own_without_text() -> None:
    modules = ARCHITECTURES["sd3.5-medium"].spec(1024, 1024).modules
    dual = [module for module in modules if module.name.endswith("attn2")]
    assert [module.name for module in dual] == [f"transformer_blocks.{i}.attn2" for i in range(13)]
    assert all(module.layout == TokenLayout(4096, 0, False) for module in dual)


def test_configs_are_those_of_diffusers_classes() -> None:
    import diffusers
    import torch

    for architecture in ARCHITECTURES.values():
        config = {k: v for k, v in architecture.of_depth(1).config.items() if k[0] != "_"}
        with torch.device("meta"):
            model = getattr(diffusers, architecture.config["_class_name"])(**config)
        names = [name for name, part in model.named_modules() if hasattr(part, "set_processor")]
        spec = architecture.of_depth(1).spec(1024, 1024)
        assert [module.name for module in spec.modules] == names


def test_unknown_architectures_are_refused() -> None:
    with pytest.raises(ArrowheadError, match="sd3-medium"):
        architecture_of("sdxl")


@pytest.mark.parametrize(
    ("cut", "expected"),
    [(0.3, Mix(16, 6, 4, 2)), (0.5, Mix(11, 8, 4, 5)), (0.68, Mix(6, 12, 4, 6))],
)
def test_a_cut_becomes_a_mix_that_saves_it(cut: float, expected: Mix) -> None:
    mix = mix_of_cut(cut, FLUX_2K, 24)
    assert mix == expected
    assert mix.share_saved(FLUX_2K) == pytest.approx(cut, abs=0.02)


def test_a_mix_is_read_with_and_without_its_window() -> None:
    assert parse_mix("6/12/6", FLUX_2K, 24) == Mix(6, 12, 4, 6)
    assert parse_mix("6/12x8/6", FLUX_2K, 24) == Mix(6, 12, 8, 6)
    for mix in (Mix(6, 12, 8, 6), Mix(8, 0, 4, 16)):
        assert parse_mix(mix.code, FLUX_2K, 24) == mix


@pytest.mark.parametrize("text", ["6/12/5", "6/12", "a/b/c", "6/12x127/6"])
def test_other_mixes_are_refused(text: str) -> None:
    with pytest.raises(ArrowheadError, match="mix of heads"):
        parse_mix(text, FLUX_2K, 24)


def test_a_synthetic_plan_is_legal_counted_and_survives_its_file(tmp_path) -> None:
    architecture = ARCHITECTURES["sd3.5-medium"]
    mixes = [Mix(7, 8, 4, 9), Mix(5, 9, 4, 10)]
    plan = synthetic_plan(
        architecture, mixes, height=2048, width=2048, steps=9, full_every=4, seed=3
    )
    assert plan.schedule == (0, 1, 1, 1, 0, 2, 2, 2, 0)
    for bucket, mix in zip(plan.buckets[1:], mixes, strict=True):
        for modes in bucket.modes.values():
            assert [modes.count(m) for m in (FULL, 4, CACHED)] == [mix.full, mix.arrow, mix.cached]
    assert len(set(plan.buckets[1].modes.values())) > 30  # other heads in every module
    assert plan.accounting is not None and plan.accounting["batch"] == 2
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("name", "factor", "base"),
    [("flux.1-dev", math.exp(1.15), 0.75), ("sd3-medium", 3.0, 2 / 3)],
)
def test_sigmas_are_shifted_as_the_pipeline_does(name: str, factor: float, base: float) -> None:
    """FLUX by its 4096 tokens, from N even steps; SD3 by 3, from N steps that end near zero."""
    architecture = ARCHITECTURES[name].of_depth(1)
    plan = synthetic_plan(architecture, [Mix(24, 0, 0, 0)], height=1024, width=1024, steps=4)
    shifted = factor * base / (1 + (factor - 1) * base)
    assert plan.sampler.sigmas[0] == pytest.approx(1.0)
    assert plan.sampler.sigmas[1] == pytest.approx(shifted, abs=2e-3)
