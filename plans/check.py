"""Whether a plan is legal, and whether it fits a model and a sampler."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from plans.errors import ArrowheadError
from plans.models import AttentionModule, ModelSpec, complete_config, config_fingerprint
from plans.tiles import CACHED

if TYPE_CHECKING:
    from plans.plan import Plan, Sampler

# Samplers agree when their sigmas do to this; fp32 schedules differ between devices by 1e-7.
SIGMA_TOLERANCE = 1e-5


def check_plan(plan: Plan, spec: ModelSpec | None = None, sampler: Sampler | None = None) -> None:
    """Raise ArrowheadError if the plan is illegal or does not fit the model or the sampler.

    Another guidance scale or scheduler class with the same sigmas only warns.
    """
    _check_modules(plan)
    _check_buckets(plan)
    _check_schedule(plan)
    if spec is not None:
        _check_model(plan, spec)
    if sampler is not None:
        _check_sampler(plan, sampler)


def _check_modules(plan: Plan) -> None:
    names = [module.name for module in plan.modules]
    if not names or len(set(names)) != len(names):
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise ArrowheadError(
            "plan modules",
            got=f"repeated {repeated}" if names else "none",
            expected="one or more attention modules, each once",
            fix="search the plan anew or remove the repeated entry",
        )
    for module in plan.modules:
        layout = module.layout
        if layout.block != plan.block or layout.text_tokens not in (0, plan.text_tokens):
            raise ArrowheadError(
                f"plan module {module.name}",
                got=f"block {layout.block}, text_tokens {layout.text_tokens}",
                expected=f"block {plan.block} and text_tokens {plan.text_tokens} or 0",
                fix="give all modules the plan's block and text length",
            )


def _check_buckets(plan: Plan) -> None:
    names = {module.name for module in plan.modules}
    for index, bucket in enumerate(plan.buckets):
        if set(bucket.modes) != names:
            missing, unknown = names - set(bucket.modes), set(bucket.modes) - names
            raise ArrowheadError(
                f"plan bucket {index}",
                got=f"missing {sorted(missing)}, unknown {sorted(unknown)}",
                expected="modes for exactly the plan's modules",
                fix="add the missing modules and remove the unknown ones",
            )
        for module in plan.modules:
            modes, blocks = bucket.modes[module.name], module.layout.blocks
            subject = f"plan bucket {index}, {module.name}"
            if len(modes) != module.heads:
                raise ArrowheadError(
                    subject,
                    got=f"{len(modes)} modes",
                    expected=f"{module.heads}, one per head",
                    fix="give one mode per head",
                )
            wrong = [mode for mode in modes if not CACHED <= mode < blocks]
            if wrong:
                raise ArrowheadError(
                    subject,
                    got=f"mode {wrong[0]}",
                    expected=f"-2 cached, -1 full, or a half window of 0..{blocks - 1} blocks",
                    fix="use -1 where the window would cover the whole picture",
                )


def _check_schedule(plan: Plan) -> None:
    if not plan.schedule or not plan.steps == plan.sampler.steps == len(plan.sampler.sigmas):
        raise ArrowheadError(
            "plan schedule",
            got=f"{plan.steps} entries, {len(plan.sampler.sigmas)} sigmas",
            expected=f"one of each for the sampler's {plan.sampler.steps} steps",
            fix="give the schedule one bucket per step",
        )
    used, known = set(plan.schedule), set(range(len(plan.buckets)))
    if used != known:
        raise ArrowheadError(
            "plan schedule",
            got=f"no such bucket: {sorted(used - known)}, never used: {sorted(known - used)}",
            expected=f"every bucket of 0..{len(plan.buckets) - 1} used, and no other",
            fix="remove unused buckets and renumber the schedule",
        )
    # What step 0 computes every later step can read: no other step has to be looked at.
    for name, modes in plan.modes_at(0).items():
        if CACHED in modes:
            raise ArrowheadError(
                f"plan step 0, {name}",
                got=f"head {modes.index(CACHED)} reads its cache",
                expected="a cache that an earlier step wrote",
                fix="let step 0 use a bucket without cached heads (-2)",
            )


def _check_model(plan: Plan, spec: ModelSpec) -> None:
    ref = plan.model
    facts: list[tuple[str, object, object, str]] = [
        ("transformer class", spec.architecture, ref.architecture, "search a plan for this model"),
        (
            "picture size",
            f"{spec.height}x{spec.width}",
            f"{plan.height}x{plan.width}",
            "use the plan's picture size or search a plan for this one",
        ),
        (
            "text tokens",
            spec.text_tokens,
            plan.text_tokens,
            "set max_sequence_length to the plan's or search a plan for this text length",
        ),
    ]
    for subject, got, expected, fix in facts:
        if got != expected:
            raise ArrowheadError(subject, got=got, expected=f"{expected}, as planned", fix=fix)
    check_config(plan, spec)
    for module, planned in zip(spec.modules, plan.modules, strict=False):
        if _geometry(module) != _geometry(planned):
            raise ArrowheadError(
                f"attention module {module.name}",
                got=_geometry(module),
                expected=f"{_geometry(planned)}, as planned",
                fix="search a plan for this model",
            )
    if len(spec.modules) != len(plan.modules):
        raise ArrowheadError(
            "attention modules",
            got=len(spec.modules),
            expected=f"{len(plan.modules)}, as planned",
            fix="search a plan for this model",
        )


def check_config(plan: Plan, spec: ModelSpec) -> None:
    """Raise ArrowheadError, key by key, if a transformer's config is not the plan's."""
    if config_fingerprint(spec.config) == plan.model.config_sha256:
        return
    got: object = "another config"
    expected: object = f"sha256 {plan.model.config_sha256[:12]}"
    if plan.model.config is not None:
        planned = complete_config({"_class_name": spec.architecture, **plan.model.config})
        live = complete_config({"_class_name": spec.architecture, **spec.config})
        differ = [k for k in sorted({*planned, *live}) if planned.get(k) != live.get(k)]
        got = {key: live.get(key) for key in differ}
        expected = {key: planned.get(key) for key in differ}
    raise ArrowheadError(
        "transformer config",
        got=got,
        expected=f"{expected}, as planned",
        fix="load the checkpoint the plan was made for or search a plan for this one",
    )


def _geometry(module: AttentionModule) -> str:
    layout = module.layout
    order = "text first" if layout.text_first else "image first"
    return (
        f"{module.name}: {module.heads} heads x {module.head_dim}, {layout.image_tokens} image and "
        f"{layout.text_tokens} text tokens, {order}, text output {module.text_output}"
    )


def _check_sampler(plan: Plan, sampler: Sampler) -> None:
    planned = plan.sampler
    if sampler.steps != planned.steps:
        raise ArrowheadError(
            "denoising steps",
            got=sampler.steps,
            expected=f"{planned.steps}, as planned",
            fix=f"pass num_inference_steps={planned.steps} or search a plan for {sampler.steps}",
        )
    gaps = [abs(a - b) for a, b in zip(sampler.sigmas, planned.sigmas, strict=True)]
    if max(gaps) > SIGMA_TOLERANCE:
        step = gaps.index(max(gaps))
        raise ArrowheadError(
            "sigmas",
            got=f"{sampler.sigmas[step]:.6f} at step {step}",
            expected=f"{planned.sigmas[step]:.6f}, as planned",
            fix="use the scheduler config and picture size of the plan, or search a plan anew",
        )
    if sampler.cfg != planned.cfg:
        raise ArrowheadError(
            "classifier-free guidance",
            got="on" if sampler.cfg else "off",
            expected=("on" if planned.cfg else "off") + ", as planned",
            fix=f"pass guidance_scale={planned.guidance_scale} or search a plan anew",
        )
    for what, got, expected in (
        ("guidance_scale", sampler.guidance_scale, planned.guidance_scale),
        ("scheduler", sampler.scheduler, planned.scheduler),
    ):
        if got != expected:
            warnings.warn(
                f"{what} {got} differs from the {expected} the plan was measured with; "
                "its errors may be larger",
                stacklevel=3,
            )
