"""What a served model takes and gives: the one table for its config, its checks and its clients."""

from __future__ import annotations

from dataclasses import dataclass

from plans.bundle import Bundle
from plans.plan import Plan
from trt_runtime.live import rows_per_picture

KINDS = ("picture", "stream")  # one answer a request, or one a step and then the picture


@dataclass(frozen=True)
class Field:
    """One tensor of a request or response; dims leave out the leading dimension, its pictures.

    datatype: Triton's, without TYPE_ in front.
    """

    name: str
    datatype: str
    dims: tuple[int, ...]
    says: str


def inputs(bundle: Bundle, plan: Plan, kind: str) -> tuple[Field, ...]:
    """List what a request may hold; nothing but a prompt, or its embeddings, must be there."""
    cfg = rows_per_picture(plan) == 2
    size = f"{plan.height} x {plan.width}"
    fields = [
        Field("PROMPT", "STRING", (1,), "UTF-8 text"),
        Field("SEED", "INT64", (1,), "of the noise, >= 0; default: a random one, told in TIMINGS"),
        Field("STEPS", "INT32", (1,), f"{plan.steps}, the plan's"),
        Field("HEIGHT", "INT32", (1,), f"{plan.height}: the plan is for {size} pixels"),
        Field("WIDTH", "INT32", (1,), f"{plan.width}: the plan is for {size} pixels"),
    ]
    if cfg:
        fields.insert(1, Field("NEGATIVE_PROMPT", "STRING", (1,), "UTF-8 text; default: empty"))
    if cfg or bundle.config.get("guidance_embeds"):
        says = f"guidance scale; default {plan.sampler.guidance_scale:g}"
        fields.append(Field("GUIDANCE", "FP32", (1,), says + (", above 1" if cfg else "")))
    text = (plan.text_tokens, bundle.config["joint_attention_dim"])
    pooled = (bundle.config["pooled_projection_dim"],)
    for sign in ("", "NEGATIVE_") if cfg else ("",):
        fields += [
            Field(f"{sign}PROMPT_EMBEDS", "FP32", text, f"in place of {sign}PROMPT"),
            Field(f"{sign}POOLED_PROMPT_EMBEDS", "FP32", pooled, f"with {sign}PROMPT_EMBEDS"),
        ]
    if kind == "stream":
        says = "a PREVIEW after every so many steps, from the second on; default 0: none"
        fields.append(Field("PREVIEW_EVERY", "INT32", (1,), says))
    return tuple(fields)


def outputs(plan: Plan, kind: str) -> tuple[Field, ...]:
    """List what a response may hold; the client names those it wants."""
    fields = [
        Field("PICTURE", "STRING", (1,), "PNG file"),
        Field("PIXELS", "UINT8", (plan.height, plan.width, 3), "RGB"),
        Field("TIMINGS", "STRING", (1,), "JSON: seed, seconds, bucket and seconds of each step"),
    ]
    if kind == "stream":
        fields += [
            Field("STEP", "INT32", (1,), "steps done"),
            Field("PREVIEW", "STRING", (1,), "PNG file: the picture as this step foresees it"),
        ]
    return tuple(fields)
