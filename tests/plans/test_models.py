from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from plans.errors import ArrowheadError
from plans.models import (
    config_fingerprint,
    model_spec,
    transformer_flops,
    weights_fingerprint,
)
from plans.tiles import CACHED, FULL
from tests.tiny import inputs_of, spec_of, tiny_flux, tiny_sd3

SD3_MEDIUM = dict(
    _class_name="SD3Transformer2DModel", num_layers=24, num_attention_heads=24,
    attention_head_dim=64, caption_projection_dim=1536, pos_embed_max_size=192,
)  # fmt: skip
FLUX_DEV = dict(_class_name="FluxTransformer2DModel", guidance_embeds=True)


def _spec(config: Any, size: int = 1024, text: int = 333) -> Any:
    return model_spec(config, height=size, width=size, vae_scale_factor=8, text_tokens=text)


def test_sd3_medium() -> None:
    spec = _spec(SD3_MEDIUM)
    assert [m.name for m in spec.modules] == [f"transformer_blocks.{i}.attn" for i in range(24)]
    layout = spec.modules[0].layout
    assert (layout.image_tokens, layout.text_tokens, layout.text_first) == (4096, 333, False)
    assert [m.text_output for m in spec.modules] == [True] * 23 + [False]


def test_sd35_medium_has_dual_attention_without_text() -> None:
    spec = _spec({**SD3_MEDIUM, "dual_attention_layers": list(range(13))})
    assert len(spec.modules) == 37
    assert spec.modules[1].name == "transformer_blocks.0.attn2"
    assert spec.modules[1].layout.text_tokens == 0


def test_flux_packs_latents_and_puts_text_first() -> None:
    spec = _spec(FLUX_DEV, size=2048, text=512)
    assert len(spec.modules) == 57
    assert {(m.heads, m.head_dim) for m in spec.modules} == {(24, 128)}
    assert {m.layout.image_tokens for m in spec.modules} == {16384}
    assert all(m.layout.text_first for m in spec.modules)
    assert [m.name for m in spec.modules if not m.text_output] == [
        "single_transformer_blocks.37.attn"
    ]


@pytest.mark.parametrize("make", [tiny_sd3, tiny_flux])
def test_modules_are_those_of_the_live_model(make: Any) -> None:
    model = make()
    names = [name for name, module in model.named_modules() if hasattr(module, "set_processor")]
    assert sorted(module.name for module in spec_of(model).modules) == sorted(names)


def test_unsupported_class_is_refused_by_name() -> None:
    with pytest.raises(ArrowheadError, match="got PixArt.*expected one of SD3Transformer2DModel"):
        _spec({"_class_name": "PixArtTransformer2DModel"})


@pytest.mark.parametrize("config", [SD3_MEDIUM, FLUX_DEV])
def test_odd_picture_size_is_refused(config: Any) -> None:
    with pytest.raises(ArrowheadError, match="picture size .* got 1000x1024.*multiples of 16"):
        model_spec(config, height=1000, width=1024, vae_scale_factor=8, text_tokens=77)


def test_bad_block_is_refused() -> None:
    with pytest.raises(ArrowheadError, match="token layout .* block 0"):
        model_spec(SD3_MEDIUM, height=64, width=64, vae_scale_factor=8, text_tokens=77, block=0)


@pytest.mark.parametrize("make", [tiny_sd3, tiny_flux])
def test_fingerprint_of_file_and_live_config_agree(make: Any, tmp_path: Path) -> None:
    model = make()
    model.save_config(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    live = {**model.config, "_class_name": type(model).__name__}
    assert config_fingerprint(stored) == config_fingerprint(live)
    stored.pop("out_channels")  # an older file lacks keys that have the default
    live["out_channels"] = 16 if "SD3" in stored["_class_name"] else None
    assert config_fingerprint(stored) == config_fingerprint(live)
    assert config_fingerprint({**live, "num_layers": 9}) != config_fingerprint(live)


def test_weights_fingerprint_tells_weights_not_shards(tmp_path: Path) -> None:
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    for folder in (one, two, other):
        folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(40, 40, generator=generator) for name in "abc"}
    name = "diffusion_pytorch_model.safetensors"
    save_file(tensors, one / name)
    save_file({"c": tensors["c"]}, two / "first.safetensors")
    save_file({k: tensors[k] for k in "ab"}, two / "second.safetensors")
    index = {"weight_map": {k: f"{'first' if k == 'c' else 'second'}.safetensors" for k in "abc"}}
    (two / f"{name}.index.json").write_text(json.dumps(index))
    changed = {**tensors, "b": tensors["b"].clone()}
    changed["b"][-1, -1] += 1
    save_file(changed, other / name)
    assert weights_fingerprint(one) == weights_fingerprint(two)
    assert weights_fingerprint(one) != weights_fingerprint(other)


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArrowheadError, match="no .*safetensors file"):
        weights_fingerprint(tmp_path)


@pytest.mark.parametrize("make", [tiny_sd3, tiny_flux])
def test_dense_flops_match_torchs_own_count(make: Any) -> None:
    model, spec = make(), spec_of(make())
    counter = FlopCounterMode(display=False)
    with (
        counter,
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model(**inputs_of(model, batch=2))
    flops = transformer_flops(spec, None, batch=2)
    # torch counts the discarded text queries, which cost nothing here.
    last = spec.modules[-1]
    discarded = 4 * last.head_dim * last.heads * last.layout.text_tokens * last.layout.seq_len
    assert flops["total"] + 2 * discarded == counter.get_total_flops()


def test_cached_heads_save_attention_and_their_projections() -> None:
    spec = spec_of(tiny_sd3())
    dense = transformer_flops(spec, None, 1)
    cached = transformer_flops(spec, {m.name: (CACHED,) * m.heads for m in spec.modules}, 1)
    assert cached["attention"] == 0
    assert 0 < cached["projections"] < dense["projections"] / 2
    assert cached["rest"] == dense["rest"]
    full = transformer_flops(spec, {m.name: (FULL,) * m.heads for m in spec.modules}, 3)
    assert full == {name: 3 * count for name, count in dense.items()}
