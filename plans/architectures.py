"""The transformers plans are made for, by name: configs as their checkpoints have them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from plans.errors import ArrowheadError
from plans.models import FLUX, SD3, ModelSpec, model_spec


@dataclass(frozen=True)
class Architecture:
    """A transformer's config, and what its pipeline does by default."""

    name: str
    config: dict[str, Any]
    text_tokens: int
    cfg: bool  # two rows a picture in one call
    guidance_scale: float
    scheduler: dict[str, Any]
    vae_scale_factor: int = 8

    @property
    def rows(self) -> int:
        """Rows of a transformer call for one picture."""
        return 2 if self.cfg else 1

    def spec(self, height: int, width: int, block: int = 128) -> ModelSpec:
        return model_spec(
            self.config, height=height, width=width, vae_scale_factor=self.vae_scale_factor,
            text_tokens=self.text_tokens, block=block,
        )  # fmt: skip

    def of_depth(self, depth: int) -> Architecture:
        """Keep at most `depth` blocks of each kind; everything else stays as it is."""
        config = dict(self.config)
        for name in ("num_layers", "num_single_layers"):
            if name in config:
                config[name] = min(depth, config[name])
        if "dual_attention_layers" in config:
            dual = config["dual_attention_layers"]
            config["dual_attention_layers"] = [i for i in dual if i < config["num_layers"]]
        return replace(self, config=config)


def _sd3(name: str, layers: int, heads: int, guidance: float, **config: Any) -> Architecture:
    full = {
        "_class_name": SD3, "sample_size": 128, "patch_size": 2, "in_channels": 16,
        "num_layers": layers, "attention_head_dim": 64, "num_attention_heads": heads,
        "joint_attention_dim": 4096, "caption_projection_dim": 64 * heads,
        "pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": 192,
        "dual_attention_layers": [], "qk_norm": None, **config,
    }  # fmt: skip
    scheduler = {"shift": 3.0}
    return Architecture(name, full, 77 + 256, True, guidance, scheduler)


_FLUX_DEV = Architecture(
    "flux.1-dev",
    {
        "_class_name": FLUX, "patch_size": 1, "in_channels": 64, "num_layers": 19,
        "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
        "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
        "axes_dims_rope": [16, 56, 56],
    },
    text_tokens=512,
    cfg=False,
    guidance_scale=3.5,
    scheduler={"shift": 3.0, "use_dynamic_shifting": True},
)  # fmt: skip
ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        _FLUX_DEV,
        _sd3("sd3-medium", 24, 24, 7.0),
        _sd3(
            "sd3.5-medium", 24, 24, 4.5, pos_embed_max_size=384, qk_norm="rms_norm",
            dual_attention_layers=list(range(13)),
        ),
        _sd3("sd3.5-large", 38, 38, 3.5, qk_norm="rms_norm"),
    )
}  # fmt: skip


def architecture_of(name: str) -> Architecture:
    """Return an architecture by name; ArrowheadError lists them."""
    if name not in ARCHITECTURES:
        raise ArrowheadError(
            "architecture", got=name, expected=f"one of {', '.join(ARCHITECTURES)}",
            fix="pass one of them",
        )  # fmt: skip
    return ARCHITECTURES[name]
