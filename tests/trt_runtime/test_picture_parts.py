"""Text encoders and VAE of a picture: the real configs, measured small."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from plans.architectures import ARCHITECTURES
from plans.synthetic import Mix
from tests.trt_runtime.test_bench_steps import settings, tiny
from trt_runtime import cli_e2e, picture_parts
from trt_runtime.bench_steps import measure_steps
from trt_runtime.cli import main
from trt_runtime.picture_parts import Parts, _built, _make, measure_parts, parts_of, picture_ms

CLIP = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "projection_dim": 16, "vocab_size": 50, "max_position_embeddings": 77,
}  # fmt: skip
T5 = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
VAE = {"block_out_channels": (4, 4, 4, 4), "norm_num_groups": 2, "layers_per_block": 1}


def small(parts: Parts) -> Parts:
    """The same parts in the same places, a few channels wide."""
    return replace(
        parts,
        encoders=tuple(
            replace(e, config={**e.config, **(T5 if e.name == "T5-XXL" else CLIP)})
            for e in parts.encoders
        ),
        vae={**parts.vae, **VAE},
    )  # fmt: skip


def measured(parts: Parts, noting: Any = lambda what: nullcontext()) -> dict[str, Any]:
    return measure_parts(
        parts, height=128, width=192, device="cpu", dtype=torch.float32, repeats=1, noting=noting
    )


@pytest.mark.parametrize(
    ("name", "encoders", "tokens", "calls"),
    [
        ("sd3-medium", ["CLIP-L", "CLIP-G", "T5-XXL"], [77, 77, 256], 2),
        ("flux.1-dev", ["CLIP-L", "T5-XXL"], [77, 512], 1),
    ],
)
def test_parts_are_the_checkpoints(
    name: str, encoders: list[str], tokens: list[int], calls: int
) -> None:
    parts = parts_of(ARCHITECTURES[name])
    assert [e.name for e in parts.encoders] == encoders
    assert [e.tokens for e in parts.encoders] == tokens
    assert {e.calls for e in parts.encoders} == {calls}
    millions = {}
    for kind, config in [
        *((e.kind, e.config) for e in parts.encoders),
        ("AutoencoderKL", parts.vae),
    ]:
        model = _make(kind, config, "meta", torch.bfloat16)
        assert {w.dtype for w in model.parameters()} == {torch.bfloat16}
        millions[len(millions)] = round(sum(w.numel() for w in model.parameters()) / 1e6)
    # As published: CLIP-L 123 million, CLIP-G 695, T5-XXL's encoder 4762, the VAE 84.
    assert [millions[i] for i in range(len(millions))] in ([124, 695, 4762, 84], [123, 4762, 84])


@pytest.mark.parametrize("name", ["sd3-medium", "flux.1-dev"])
def test_every_part_is_timed(name: str) -> None:
    parts = small(parts_of(ARCHITECTURES[name]))
    report = measured(parts)
    assert set(report["encoders_ms"]) == {e.name for e in parts.encoders}
    assert set(report["vae_ms"]) == {"tiled", "at once"}
    ms = picture_ms(report, parts, 1000.0)
    assert ms is not None and ms["steps"] == 1000.0
    assert ms["total"] == pytest.approx(ms["text"] + 1000.0 + ms["vae"])
    assert min(ms.values()) > 0


def test_a_part_that_fails_leaves_the_others_and_no_picture() -> None:
    parts = small(parts_of(ARCHITECTURES["flux.1-dev"]))
    broken = replace(parts.encoders[0], kind="NoSuchModel")
    parts = replace(parts, encoders=(broken, parts.encoders[1]))
    seen: list[str] = []

    class Noting(AbstractContextManager[None]):
        def __init__(self, what: str) -> None:
            self.what = what

        def __exit__(self, kind: Any, *_: Any) -> bool:
            if kind is not None:
                seen.append(self.what)
            return True

    report = measured(parts, Noting)
    assert seen == ["CLIP-L"] and set(report["encoders_ms"]) == {"T5-XXL"}
    assert picture_ms(report, parts, 1.0) is None


def test_weights_are_freed_though_somebody_holds_the_model() -> None:
    config = {**parts_of(ARCHITECTURES["flux.1-dev"]).vae, **VAE}
    with _built("AutoencoderKL", config, "cpu", torch.float32) as model:
        assert {w.device.type for w in model.parameters()} == {"cpu"}
    assert {w.device.type for w in model.parameters()} == {"meta"}


def test_of_depth_keeps_the_widths() -> None:
    parts = parts_of(ARCHITECTURES["sd3-medium"]).of_depth(2)
    assert [e.config.get("num_layers", e.config.get("num_hidden_layers"))
            for e in parts.encoders] == [2, 2, 2]  # fmt: skip
    assert parts.encoders[2].config["d_model"] == 4096


def test_rows_hold_whole_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    architecture = tiny("sd3.5-medium")
    parts = small(parts_of(architecture))
    parts = replace(parts, encoders=tuple(replace(e, tokens=5) for e in parts.encoders))
    report = measure_steps(
        architecture, [("torch", (Mix(1, 2, 1, 1),))], settings(loop=True, parts=parts)
    )
    assert not report["failures"]
    row, baseline = report["rows"][0], report["baselines"][0]
    assert row["picture_ms"]["steps"] == pytest.approx(1000 * row["loop_seconds"])
    assert baseline["picture_ms"]["steps"] == pytest.approx(28 * baseline["ms"])
    assert row["picture_ms"]["text"] == sum(report["parts"]["encoders_ms"].values())
    cli_e2e.show_steps(report)
    shown = capsys.readouterr().out
    assert "T5-XXL" in shown and "picture" in shown


def test_the_command_measures_pictures_with_the_loop(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("the command takes the GPU where there is one, and tiny heads fit no kernel")
    architecture = tiny("sd3.5-medium")
    monkeypatch.setitem(ARCHITECTURES, architecture.name, architecture)
    encoders = parts_of(ARCHITECTURES["sd3-medium"])
    monkeypatch.setattr(picture_parts, "parts_of", lambda _: small(encoders))
    target = tmp_path / "steps.json"
    code = main(
        ["bench", "e2e", "--architecture", architecture.name, "--height", "128", "--width", "128",
         "--block", "16", "--mix", "1/2x1/1:torch", "--baseline", "eager", "--depth", "1",
         "--repeats", "1", "--steps-per-round", "1", "--loop", "--json", str(target)]
    )  # fmt: skip
    assert code == 0
    row = json.loads(target.read_text())["rows"][0]
    assert row["picture_ms"]["total"] > row["picture_ms"]["steps"] > 0
