"""The trained pipelines of the testbed, exported with their library plans."""

from __future__ import annotations

from pathlib import Path

from exporter import export_bundle
from plans.plan import load_plan
from tests.testbed import models
from trt_runtime.bundles import load_pretrained
from trt_runtime.pipeline import rows_per_picture

LIBRARY = Path(__file__).parents[3] / "plans" / "library"


def missing(name: str) -> str | None:
    """Say what a trained pipeline lacks; None if it can be exported."""
    if why := models.missing(name):
        return why
    if not (LIBRARY / f"{name}.json").is_file():
        return f"no plan for {name}: arrowhead plan search writes plans/library/{name}.json"
    return None


def export(name: str, folder: Path, *, pictures: int = 1) -> Path:
    """Export a trained pipeline for so many pictures a call; give the bundle's folder."""
    import diffusers

    plan = load_plan(LIBRARY / f"{name}.json")
    source = str(models.TESTBED / name)
    architecture = getattr(diffusers, plan.model.architecture)
    model = load_pretrained(architecture, source, subfolder="transformer")
    rows = pictures * rows_per_picture(plan)
    export_bundle(model, plan, folder, dtype="fp32", batch=rows, dense=False, source=source)
    return folder
