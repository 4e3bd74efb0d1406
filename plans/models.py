"""What the planner knows of a transformer: its attention modules, fingerprints and FLOPs."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plans.errors import ArrowheadError
from plans.tiles import CACHED, FULL, TokenLayout, kept_pairs

SD3 = "SD3Transformer2DModel"
FLUX = "FluxTransformer2DModel"

# What diffusers fills in for keys that an older config.json lacks: a file and the live model
# made from it must have one fingerprint.
CONFIG_DEFAULTS: dict[str, dict[str, Any]] = {
    SD3: dict(
        sample_size=128, patch_size=2, in_channels=16, num_layers=18, attention_head_dim=64,
        num_attention_heads=18, joint_attention_dim=4096, caption_projection_dim=1152,
        pooled_projection_dim=2048, out_channels=16, pos_embed_max_size=96,
        dual_attention_layers=[], qk_norm=None,
    ),
    FLUX: dict(
        patch_size=1, in_channels=64, out_channels=None, num_layers=19, num_single_layers=38,
        attention_head_dim=128, num_attention_heads=24, joint_attention_dim=4096,
        pooled_projection_dim=768, guidance_embeds=False, axes_dims_rope=[16, 56, 56],
    ),
}  # fmt: skip


@dataclass(frozen=True)
class AttentionModule:
    """One attention module by its diffusers path.

    text_output is False where the text rows of the output are discarded; such query rows count
    in neither error nor cost.
    """

    name: str
    heads: int
    head_dim: int
    layout: TokenLayout
    text_output: bool


@dataclass(frozen=True)
class ModelSpec:
    """A transformer at one picture size and text length."""

    architecture: str
    config: dict[str, Any]
    height: int
    width: int
    text_tokens: int
    block: int
    modules: tuple[AttentionModule, ...]


def _architecture(config: Mapping[str, Any]) -> str:
    name = config.get("_class_name")
    if name not in CONFIG_DEFAULTS:
        raise ArrowheadError(
            "transformer class",
            got=name,
            expected=f"one of {', '.join(CONFIG_DEFAULTS)}",
            fix="plan an SD3, SD3.5 or FLUX.1 transformer from diffusers",
        )
    return str(name)


def complete_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with diffusers' defaults and without private keys.

    `_class_name` stays when present. JSON types only, so a live config and a file compare equal.
    """
    name = config.get("_class_name")
    public = {k: v for k, v in config.items() if not k.startswith("_")}
    full = {**CONFIG_DEFAULTS.get(str(name), {}), **public}
    if name is not None:
        full["_class_name"] = name
    return json.loads(json.dumps(full))


def config_fingerprint(config: Mapping[str, Any]) -> str:
    """Return the sha256 over the canonical JSON of the config's public keys."""
    public = {k: v for k, v in complete_config(config).items() if not k.startswith("_")}
    canonical = json.dumps(public, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def model_spec(
    config: Mapping[str, Any],
    *,
    height: int,
    width: int,
    vae_scale_factor: int,
    text_tokens: int,
    block: int = 128,
) -> ModelSpec:
    """List the attention modules of a transformer config at one picture size (pixels).

    Raises ArrowheadError for an unsupported class and a size the latents cannot have.
    """
    architecture = _architecture(config)
    full = complete_config(config)
    # FLUX packs 2x2 latents into one token in the pipeline; its patch_size of 1 comes after.
    side = vae_scale_factor * (full["patch_size"] if architecture == SD3 else 2)
    if min(height, width) < side or height % side or width % side:
        raise ArrowheadError(
            "picture size",
            got=f"{height}x{width}",
            expected=f"height and width in multiples of {side} pixels",
            fix="choose a size that divides into whole tokens",
        )
    if block < 1 or text_tokens < 0:
        raise ArrowheadError(
            "token layout",
            got=f"block {block}, text_tokens {text_tokens}",
            expected="block >= 1 and text_tokens >= 0",
            fix="give the block in image tokens, 128 unless the picture is small",
        )
    image_tokens = (height // side) * (width // side)
    joint = TokenLayout(image_tokens, text_tokens, architecture == FLUX, block)
    modules = tuple(
        _sd3_modules(full, joint) if architecture == SD3 else _flux_modules(full, joint)
    )
    return ModelSpec(architecture, full, height, width, text_tokens, block, modules)


def _sd3_modules(config: Mapping[str, Any], joint: TokenLayout) -> Iterator[AttentionModule]:
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    image_only = TokenLayout(joint.image_tokens, 0, False, joint.block)
    for i in range(config["num_layers"]):
        name = f"transformer_blocks.{i}.attn"
        yield AttentionModule(name, heads, head_dim, joint, i < config["num_layers"] - 1)
        if i in config["dual_attention_layers"]:
            yield AttentionModule(f"{name}2", heads, head_dim, image_only, True)


def _flux_modules(config: Mapping[str, Any], joint: TokenLayout) -> Iterator[AttentionModule]:
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    names = [f"transformer_blocks.{i}.attn" for i in range(config["num_layers"])]
    names += [f"single_transformer_blocks.{i}.attn" for i in range(config["num_single_layers"])]
    for i, name in enumerate(names):
        yield AttentionModule(name, heads, head_dim, joint, i < len(names) - 1)


def weights_fingerprint(folder: Path) -> str:
    """Return a sha256 that tells one set of weights from another without reading it whole.

    Covers every tensor's name, dtype, shape and first and last 512 bytes in the safetensors files
    of a diffusers transformer folder, in order of tensor name, however they are sharded.
    """
    lines: dict[str, bytes] = {}
    for path in _weight_files(Path(folder)):
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_bytes))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
                file.seek(begin)
                head = file.read(min(512, end - begin))
                file.seek(max(begin, end - 512))
                tail = file.read(min(512, end - begin))
                lines[name] = f"{name} {entry['dtype']} {entry['shape']} ".encode() + head + tail
    digest = hashlib.sha256()
    for name in sorted(lines):
        digest.update(lines[name])
    return digest.hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    single = folder / "diffusion_pytorch_model.safetensors"
    index = folder / f"{single.name}.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        return [
            folder / name
            for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))
        ]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise ArrowheadError(
            f"weights in {folder}",
            got="no *.safetensors file",
            expected="a diffusers transformer folder",
            fix="point to the folder that holds config.json and the weights",
        )
    return found


def transformer_flops(
    spec: ModelSpec, modes: Mapping[str, Sequence[int]] | None, batch: int
) -> dict[str, int]:
    """Count the FLOPs of one transformer call of `batch` rows; a multiply-add is two.

    `modes` gives each module's H modes at that step (None: all full). A cached head saves its
    attention and its rows of the Q, K and V projections. Keys: attention, projections (Q, K, V
    and the attention output), rest, total.
    """
    attention = projections = 0
    for module in spec.modules:
        width = module.heads * module.head_dim
        layout = module.layout
        head_modes = [FULL] * module.heads if modes is None else modes[module.name]
        for mode in head_modes:
            attention += 4 * module.head_dim * kept_pairs(layout, mode, module.text_output)
            if mode != CACHED:
                projections += 6 * layout.seq_len * width * module.head_dim
        out_rows = layout.seq_len
        if spec.architecture == SD3 and not module.text_output:
            out_rows = layout.image_tokens
        projections += 2 * out_rows * width * width
    rest = _rest_flops(spec)
    counts = {"attention": attention, "projections": projections, "rest": rest}
    counts["total"] = attention + projections + rest
    return {name: batch * count for name, count in counts.items()}


def _rest_flops(spec: ModelSpec) -> int:
    """FLOPs per row outside attention and its projections: MLPs, modulations, embedders."""
    config = spec.config
    width = config["num_attention_heads"] * config["attention_head_dim"]
    layout = spec.modules[0].layout
    image, text = layout.image_tokens, layout.text_tokens
    out_channels = config["out_channels"] or config["in_channels"]
    patch = config["patch_size"] ** 2
    flops = 2 * image * patch * width * (config["in_channels"] + out_channels)
    flops += 2 * text * config["joint_attention_dim"] * width
    # Timestep (256 sinusoidal features) and pooled text, two linears each; guidance likewise.
    flops += 2 * width * (256 + config["pooled_projection_dim"] + 2 * width)
    if config.get("guidance_embeds"):
        flops += 2 * width * (256 + width)
    modulation = 2 * width * width
    flops += 2 * modulation
    mlp = 16 * width * width  # per token: width -> 4 width -> width
    if spec.architecture == SD3:
        layers, dual = config["num_layers"], len(config["dual_attention_layers"])
        flops += (layers * image + (layers - 1) * text) * mlp
        return flops + modulation * (6 * layers + 3 * dual + 6 * (layers - 1) + 2)
    double, single = config["num_layers"], config["num_single_layers"]
    flops += (double + single) * (image + text) * mlp
    return flops + modulation * (12 * double + 3 * single)
