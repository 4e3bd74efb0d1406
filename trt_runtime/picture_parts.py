"""What a picture costs beside its transformer steps: text encoders and VAE, as they are.

Built with random weights from the configs of the real checkpoints, one after the other, so that no
more than the largest of them is in memory.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from plans.architectures import Architecture
from plans.models import SD3

_CLIP_TOKENS = 77

_CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "projection_dim": 768, "hidden_act": "quick_gelu",
    "vocab_size": 49408, "max_position_embeddings": _CLIP_TOKENS,
}  # fmt: skip
_CLIP_G = {
    **_CLIP_L, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
    "num_attention_heads": 20, "projection_dim": 1280, "hidden_act": "gelu",
}  # fmt: skip
_T5_XXL = {
    "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64,
    "vocab_size": 32128, "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 32,
    "is_encoder_decoder": False, "use_cache": False,
}  # fmt: skip
_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16,
    "norm_num_groups": 32, "sample_size": 1024, "use_quant_conv": False,
    "use_post_quant_conv": False,
}  # fmt: skip


@dataclass(frozen=True)
class Encoder:
    """A text encoder of transformers, and how a pipeline calls it for one picture."""

    name: str
    kind: str
    config: Mapping[str, Any]
    tokens: int
    calls: int  # prompt, and under classifier-free guidance the negative one by itself


@dataclass(frozen=True)
class Parts:
    """All that a picture takes but the transformer."""

    encoders: tuple[Encoder, ...]
    vae: Mapping[str, Any] = field(default_factory=lambda: _VAE)

    def of_depth(self, depth: int) -> Parts:
        """Keep at most `depth` layers of each encoder; the VAE stays as it is."""
        return replace(
            self,
            encoders=tuple(
                replace(
                    encoder,
                    config={
                        name: min(depth, value) if name in ("num_layers", "num_hidden_layers")
                        else value for name, value in encoder.config.items()
                    },
                )
                for encoder in self.encoders
            ),
        )  # fmt: skip


def parts_of(architecture: Architecture) -> Parts:
    """Give the text encoders and the VAE of an architecture's checkpoint."""
    calls = architecture.rows
    if architecture.config["_class_name"] == SD3:
        clip = "CLIPTextModelWithProjection"
        return Parts(
            (
                Encoder("CLIP-L", clip, _CLIP_L, _CLIP_TOKENS, calls),
                Encoder("CLIP-G", clip, _CLIP_G, _CLIP_TOKENS, calls),
                Encoder("T5-XXL", "T5EncoderModel", _T5_XXL,
                        architecture.text_tokens - _CLIP_TOKENS, calls),
            )
        )  # fmt: skip
    return Parts(
        (
            Encoder("CLIP-L", "CLIPTextModel", _CLIP_L, _CLIP_TOKENS, calls),
            Encoder("T5-XXL", "T5EncoderModel", _T5_XXL, architecture.text_tokens, calls),
        )
    )


def measure_parts(
    parts: Parts,
    *,
    height: int,
    width: int,
    device: str,
    dtype: torch.dtype,
    repeats: int = 3,
    noting: Callable[[str], Any],
) -> dict[str, Any]:
    """Milliseconds for one picture: encoders_ms by name, vae_ms decoding at once and in tiles.

    Uncompiled, as pipelines run them; medians after one call that is not counted. noting: a context
    around each part, which decides what becomes of a failure. A part that failed has no entry.
    """
    report: dict[str, Any] = {"encoders_ms": {}, "vae_ms": {}, "peak_bytes": {}}

    def timed(target: str, name: str, run: Callable[[], Any], calls: int = 1) -> None:
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        report[target][name] = calls * _median_ms(run, repeats, device)
        if device.startswith("cuda"):
            report["peak_bytes"][name] = torch.cuda.max_memory_allocated()

    for encoder in parts.encoders:
        with noting(encoder.name), _built(encoder.kind, encoder.config, device, dtype) as model:
            ids = torch.randint(0, encoder.config["vocab_size"], (1, encoder.tokens), device=device)
            timed("encoders_ms", encoder.name, functools.partial(model, ids), encoder.calls)
    with noting("VAE"), _built("AutoencoderKL", parts.vae, device, dtype) as vae:
        levels = len(parts.vae["block_out_channels"]) - 1
        size = (height >> levels, width >> levels)
        latents = torch.randn(1, parts.vae["latent_channels"], *size, device=device, dtype=dtype)
        vae.enable_tiling()
        timed("vae_ms", "tiled", lambda: vae.decode(latents, return_dict=False))
        vae.disable_tiling()
        with noting("VAE at once"):
            timed("vae_ms", "at once", lambda: vae.decode(latents, return_dict=False))
    return report


def picture_ms(report: Mapping[str, Any], parts: Parts, steps_ms: float) -> dict[str, float] | None:
    """Give text, steps, vae and their sum; None where a part was not measured.

    The VAE decodes at once where that was possible, as pipelines do by default.
    """
    encoders, vae = report["encoders_ms"], report["vae_ms"]
    if len(encoders) != len(parts.encoders) or not vae:
        return None
    ms = {
        "text": sum(encoders.values()),
        "steps": steps_ms,
        "vae": vae.get("at once", vae.get("tiled")),
    }
    return ms | {"total": sum(ms.values())}


@contextmanager
def _built(kind: str, config: Mapping[str, Any], device: str, dtype: torch.dtype) -> Iterator[Any]:
    """Make a model with random weights on the device; free it at the end."""
    model: Any = _make(kind, config, device, dtype)
    try:
        with torch.no_grad():
            yield model
    finally:
        # The caller may still hold the model: its memory must go all the same.
        nn.Module.to(model, "meta")
        del model
        gc.collect()
        if device.startswith("cuda"):
            torch.cuda.empty_cache()


def _make(kind: str, config: Mapping[str, Any], device: str, dtype: torch.dtype) -> nn.Module:
    import diffusers
    import transformers

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            if kind == "AutoencoderKL":
                model = getattr(diffusers, kind)(**config)
            else:
                known = (
                    transformers.T5Config
                    if kind.startswith("T5")
                    else (transformers.CLIPTextConfig)
                )
                model = getattr(transformers, kind)(known(**config))
    finally:
        torch.set_default_dtype(before)
    return nn.Module.to(model, dtype).eval().requires_grad_(False)


def _median_ms(run: Callable[[], Any], repeats: int, device: str) -> float:
    times = []
    for i in range(repeats + 1):
        begin = time.perf_counter()
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        if i:
            times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)
