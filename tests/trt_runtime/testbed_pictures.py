"""Pictures of the trained pipelines in PyTorch: the compiled backend beside the plain one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plans.architectures import Architecture
from plans.plan import Plan, load_plan
from plans.synthetic import Mix, synthetic_plan
from tests.testbed.models import T5_LENGTH, TESTBED
from tests.testbed.scenes import SIDE
from trt_runtime import attach, detach
from trt_runtime.pipeline import draw, load_source_pipeline

LIBRARY = Path(__file__).parents[2] / "plans" / "library"
CAPTION = "a red circle above a blue square on a grey ground"


def plan_of(name: str) -> Plan:
    """The library's plan, or one with as many heads of each mode for a pipeline without."""
    if (LIBRARY / f"{name}.json").is_file():
        return load_plan(LIBRARY / f"{name}.json")
    config = json.loads((TESTBED / name / "transformer" / "config.json").read_text())
    scheduler = json.loads((TESTBED / name / "scheduler" / "scheduler_config.json").read_text())
    architecture = Architecture(
        name, config, text_tokens=T5_LENGTH, cfg=False, guidance_scale=3.5, vae_scale_factor=4,
        scheduler={"use_dynamic_shifting": scheduler["use_dynamic_shifting"]},
    )  # fmt: skip
    return synthetic_plan(
        architecture, [Mix(1, 2, 4, 1)], height=SIDE, width=SIDE, steps=8, block=16, full_every=4
    )


def error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative."""
    return float((got.float() - expected.float()).norm() / expected.float().norm())


def both(
    name: str, *, device: str, dtype: torch.dtype, **options: Any
) -> tuple[list[Tensor], list[Tensor], list[Any]]:
    """Draw one caption twice on each backend; give the final latents, and pictures of the second.

    options go to the compiled backend. Caches are poisoned between the runs.
    """
    plan = plan_of(name)
    pipe = load_source_pipeline(str(TESTBED / name), dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    latents: list[list[Tensor]] = []
    images = []
    for backend, given in (("torch", {}), ("torch-compile", options)):
        attach(pipe, plan=plan, backend=backend, poison=True, **given)
        pipe.transformer.prepare()
        made = [draw(pipe, [CAPTION], [7])[0] for _ in range(2)]
        assert [bucket for bucket, _ in made[1].step_seconds] == list(plan.schedule)
        latents.append([picture.latents for picture in made])
        images.append(made[1].image)
        detach(pipe)
    return latents[0], latents[1], images
