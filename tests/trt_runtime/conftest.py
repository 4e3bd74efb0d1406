"""Saved tiny pipelines and bundles of them, made once a session."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
)

from plans.bundle import Bundle, save_bundle
from plans.plan import Plan, save_plan
from tests import tiny
from tests.trt_runtime.tiny_bundles import bundle_of, tiny_model, tiny_pipeline
from trt_runtime import pipeline
from trt_runtime.bundles import load_pretrained

Made = tuple[Path, Bundle, Plan]  # the bundle's folder; its model is beside it


def _embed(prompt: str | list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    texts = [prompt] if isinstance(prompt, str) else prompt
    rows = []
    for text in texts:
        generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        rows.append(torch.randn(tiny.TEXT_TOKENS * tiny.JOINT_DIM + tiny.POOLED_DIM,
                                generator=generator))  # fmt: skip
    both = torch.stack(rows)
    text, pooled = both.split([tiny.TEXT_TOKENS * tiny.JOINT_DIM, tiny.POOLED_DIM], dim=1)
    return text.reshape(len(texts), tiny.TEXT_TOKENS, tiny.JOINT_DIM), pooled


@pytest.fixture
def prompts_without_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let prompts stand for random embeddings of their own: the pipelines have no encoders."""

    def sd3(self: Any, prompt: Any, *_: Any, **options: Any) -> Any:
        if options.get("prompt_embeds") is not None:
            names = ("prompt_embeds", "pooled_prompt_embeds")
            (text, pooled), (none, none_pooled) = (
                [options.get(prefix + name) for name in names] for prefix in ("", "negative_")
            )
            return text, none, pooled, none_pooled
        text, pooled = _embed(prompt)
        none, none_pooled = _embed([""] * len(text))
        return text, none, pooled, none_pooled

    def flux(self: Any, prompt: Any, *_: Any, **options: Any) -> Any:
        if options.get("prompt_embeds") is not None:
            text, pooled = options["prompt_embeds"], options["pooled_prompt_embeds"]
        else:
            text, pooled = _embed(prompt)
        return text, pooled, torch.zeros(tiny.TEXT_TOKENS, 3)

    def load(kind: Any, source: str, **options: Any) -> Any:
        encoders = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        if (Path(source) / "model_index.json").read_text().count("StableDiffusion3Pipeline"):
            encoders = (*encoders, "text_encoder_3", "tokenizer_3")
        return load_pretrained(kind, source, **dict.fromkeys(encoders), **options)

    monkeypatch.setattr(pipeline, "load_pretrained", load)
    monkeypatch.setattr(StableDiffusion3Pipeline, "encode_prompt", sd3)
    monkeypatch.setattr(FluxPipeline, "encode_prompt", flux)


def save_pipeline(model: Any, folder: Path) -> None:
    """Save a tiny pipeline in diffusers' format, without text encoders."""
    pipe = tiny_pipeline(model)
    pipe.register_modules(vae=tiny.tiny_vae())
    pipe.save_pretrained(folder)


def sampled_plan(plan: Plan, kind: str) -> Plan:
    """The plan for the sigmas the pipeline takes by itself."""
    if kind == "flux":
        return plan
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(plan.steps)
    sigmas = tuple(scheduler.sigmas.tolist()[: plan.steps])
    return replace(plan, sampler=replace(plan.sampler, sigmas=sigmas))


def _torch_bundle(kind: str, root: Path) -> Made:
    model = tiny_model(kind)
    save_pipeline(model, root / "model")
    plan = sampled_plan(tiny.random_plan(model), kind)
    bundle = replace(
        bundle_of(model, plan, 2 if kind == "sd3" else 1),
        model=asdict(replace(plan.model, source="../model")),
    )
    folder = root / "bundle"
    folder.mkdir()
    for graph in bundle.all_graphs:
        (folder / graph.file).touch()  # backend torch reads none of them
    (folder / bundle.weights_file).touch()
    save_plan(plan, folder / bundle.plan_file)
    save_bundle(bundle, folder)
    return folder, bundle, plan


@pytest.fixture(scope="session")
def torch_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Bundle folders that hold all but graphs, by kind."""
    made: dict[str, Made] = {}

    def get(kind: str) -> Made:
        if kind not in made:
            made[kind] = _torch_bundle(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get


@pytest.fixture(scope="session")
def onnx_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Exported bundle folders, by kind, with the pipeline they came from beside them."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from exporter import export_bundle

    made: dict[str, Made] = {}

    def get(kind: str) -> Made:
        if kind not in made:
            root = tmp_path_factory.mktemp(f"onnx_{kind}")
            # Two modules and two buckets: tracing takes seconds a graph, whatever its width.
            if kind == "sd3":
                model = tiny.tiny_sd3(num_layers=2, dual_attention_layers=())
            else:
                model = tiny.tiny_flux(num_layers=1, num_single_layers=1)
            save_pipeline(model, root / "model")
            plan = sampled_plan(tiny.random_plan(model, buckets=2, steps=4), kind)
            batch = 2 if kind == "sd3" else 1
            bundle = export_bundle(
                model, plan, root / "bundle", dtype="fp32", batch=batch, source=str(root / "model")
            )
            made[kind] = (root / "bundle", bundle, plan)
        return made[kind]

    return get
