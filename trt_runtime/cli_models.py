"""Find and load the checkpoint that a verb is about, and tell whether it is the plan's."""

from __future__ import annotations

import argparse
import inspect
import warnings
from pathlib import Path
from typing import Any

from plans.errors import ArrowheadError
from plans.models import weights_fingerprint
from plans.plan import Plan, check_plan, resolve_source
from trt_runtime.bundles import load_pretrained
from trt_runtime.cli_common import dtype_of
from trt_runtime.engine import DTYPES
from trt_runtime.live import spec_of
from trt_runtime.pipeline import load_source_pipeline


def load_for_planning(arguments: argparse.Namespace) -> Any:
    """Load the pipeline that --model, --revision, --dtype and --device name."""
    dtype = DTYPES[dtype_of(arguments.dtype)]
    offload = getattr(arguments, "offload", "none")
    if offload != "none" and not arguments.device.startswith("cuda"):
        raise ArrowheadError(
            "--offload",
            got=f"{offload} with device {arguments.device}",
            expected="a GPU to move weights to",
            fix="add --device cuda, or leave it out",
        )
    pipe = load_source_pipeline(arguments.model, dtype=dtype, revision=arguments.revision)
    if offload == "none":
        return pipe.to(arguments.device)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=arguments.device)
    else:
        pipe.enable_sequential_cpu_offload(device=arguments.device)
    return pipe


def sampling_of(pipe: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Give what the arguments say of sampling, and the pipeline's own defaults for the rest."""
    defaults = inspect.signature(type(pipe).__call__).parameters
    size = pipe.default_sample_size * pipe.vae_scale_factor
    return {
        "steps": arguments.num_inference_steps or defaults["num_inference_steps"].default,
        "height": arguments.height or size,
        "width": arguments.width or size,
        "guidance_scale": defaults["guidance_scale"].default
        if arguments.guidance_scale is None
        else arguments.guidance_scale,
        "max_sequence_length": arguments.max_sequence_length,
    }


def bare_plan(pipe: Any, arguments: argparse.Namespace) -> Plan:
    """Give the all-full plan of the pipeline as the arguments would call it."""
    from plans.denoising import Denoising, dense_plan_of

    sampling = sampling_of(pipe, arguments)
    settings = Denoising(["a picture"], seed=0, **sampling)
    return dense_plan_of(pipe, settings, arguments.block, arguments.model, arguments.revision)


def plan_source(plan: Plan, plan_file: Path, model: str | None) -> str:
    """Give the checkpoint to export: --model, or what the plan names; check it is the plan's."""
    source = source_of(plan, plan_file, model)
    _check_weights(plan, source, overridden=model is not None)
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def source_of(plan: Plan, plan_file: Path, model: str | None) -> str:
    """Give --model, or the checkpoint that the plan names."""
    source = model or resolve_source(plan, plan_file.resolve().parent)
    if source is None:
        raise ArrowheadError(
            f"model of plan {plan_file}",
            got="no source in the plan",
            expected="a folder in diffusers' format, or a hub id",
            fix="pass --model",
        )
    return source


def local_fingerprint(source: str) -> str | None:
    """Fingerprint the transformer weights of a checkpoint folder; None for a hub id."""
    folder = Path(source) / "transformer"
    return weights_fingerprint(folder) if folder.is_dir() else None


def _check_weights(plan: Plan, source: str, *, overridden: bool) -> None:
    found = local_fingerprint(source)
    if plan.model.weights_sha256 is None or found is None:
        return
    if found == plan.model.weights_sha256:
        return
    if not overridden:
        raise ArrowheadError(
            f"weights of {source}",
            got=f"fingerprint {found[:12]}",
            expected=f"{plan.model.weights_sha256[:12]}, those the plan was measured on",
            fix="search a plan for these weights, or pass --model to use the plan all the same",
        )
    warnings.warn(
        f"the weights of {source} are not those the plan was measured on: its measured errors "
        "do not hold for them; check quality with `arrowhead verify`",
        stacklevel=2,
    )


def load_plan_transformer(plan: Plan, source: str, dtype: str, revision: str | None) -> Any:
    """Load the diffusers transformer of a checkpoint in the dtype of the export."""
    import diffusers

    kind = getattr(diffusers, plan.model.architecture)
    return load_pretrained(
        kind, source, subfolder="transformer", torch_dtype=DTYPES[dtype], revision=revision
    ).eval()


def check_against_model(plan: Plan, source: str, revision: str | None) -> None:
    """Hold a plan against a checkpoint's config and, where it lies here, its weights."""
    import diffusers

    kind = getattr(diffusers, plan.model.architecture)
    try:
        config = kind.load_config(source, subfolder="transformer", revision=revision)
    except OSError as error:
        raise ArrowheadError(
            f"model {source}",
            got=str(error).strip().splitlines()[0][:200],
            expected="a folder in diffusers' format, or a hub id",
            fix="check --model; a gated model needs `hf auth login`",
        ) from error
    spec = spec_of(plan, plan.model.architecture, config)
    check_plan(plan, spec)
    _check_weights(plan, source, overridden=False)
