"""Plans that nothing was measured for: chosen numbers of heads in each mode, for speed alone.

Random weights have no locality to find, and the speed of a plan does not depend on what its heads
see. Which head has which mode is drawn anew for each module, as in a searched plan.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from plans.accounting import account
from plans.architectures import Architecture
from plans.errors import ArrowheadError
from plans.models import ModelSpec, config_fingerprint
from plans.plan import Bucket, ModelRef, Plan, Sampler, check_plan, dense_plan
from plans.tiles import CACHED, FULL, TokenLayout, kept_pairs


@dataclass(frozen=True)
class Mix:
    """How many heads are in which mode."""

    full: int
    arrow: int
    half_window: int
    cached: int

    @property
    def name(self) -> str:
        groups = ((self.full, "full"), (self.arrow, f"hw{self.half_window}"),
                  (self.cached, "cached"))  # fmt: skip
        used = [(n, what) for n, what in groups if n]
        return f"all {used[0][1]}" if len(used) == 1 else " + ".join(f"{n} {w}" for n, w in used)

    @property
    def code(self) -> str:
        """The mix as parse_mix reads it."""
        window = f"x{self.half_window}" if self.arrow else ""
        return f"{self.full}/{self.arrow}{window}/{self.cached}"

    @property
    def computed(self) -> int:
        return self.full + self.arrow

    @property
    def heads(self) -> int:
        return self.full + self.arrow + self.cached

    def modes(self, seed: int = 0) -> list[int]:
        """One mode per head; which head has which is shuffled, as in a searched plan."""
        modes = [FULL] * self.full + [self.half_window] * self.arrow + [CACHED] * self.cached
        random.Random(seed).shuffle(modes)
        return modes

    def share_saved(self, layout: TokenLayout) -> float:
        """Share of attention's query/key pairs that the mix leaves out."""
        kept = sum(kept_pairs(layout, mode) for mode in self.modes())
        return 1 - kept / (self.heads * layout.seq_len**2)


def parse_mix(text: str, layout: TokenLayout, heads: int) -> Mix:
    """Read FULL/ARROW/CACHED or FULL/ARROWxHALF_WINDOW/CACHED; the window is V / 32 by default."""
    match = re.fullmatch(r"(\d+)/(\d+)(?:x(\d+))?/(\d+)", text)
    if match is None or sum(int(match[i]) for i in (1, 2, 4)) != heads:
        raise ArrowheadError(
            "mix of heads",
            got=text,
            expected=f"full/arrow/cached, {heads} heads in all, as {heads // 4}/{heads // 2}x4/"
            f"{heads - heads // 4 - heads // 2} (x4: half windows of 4 blocks)",
            fix="give numbers that sum to the model's heads",
        )
    window = default_half_window(layout) if match[3] is None else int(match[3])
    if window >= layout.blocks - 1:
        raise ArrowheadError(
            "mix of heads", got=f"half windows of {window} blocks",
            expected=f"less than {layout.blocks - 1}: wider ones keep the whole picture",
            fix="count these heads as full",
        )  # fmt: skip
    return Mix(int(match[1]), int(match[2]), window, int(match[4]))


def default_half_window(layout: TokenLayout) -> int:
    """V / 32 image tokens, in blocks."""
    return max(1, layout.image_tokens // (32 * layout.block))


def mix_of_cut(cut: float, layout: TokenLayout, heads: int) -> Mix:
    """Choose the mix that leaves out a share `cut` of attention, with two arrows a cached head."""
    if not 0 < cut < 1:
        raise ArrowheadError(
            "cut", got=cut, expected="a share between 0 and 1", fix="pass 0.5 for half"
        )
    window = default_half_window(layout)
    mixes = [
        Mix(heads - arrow - cached, arrow, window, cached)
        for cached in range(heads + 1)
        for arrow in range(heads - cached + 1)
    ]

    def distance(mix: Mix) -> float:
        uneven = abs(mix.arrow - 2 * mix.cached) / heads
        return abs(mix.share_saved(layout) - cut) + 0.05 * uneven

    return min(mixes, key=distance)


def synthetic_plan(
    architecture: Architecture,
    mixes: Sequence[Mix],
    *,
    height: int,
    width: int,
    steps: int = 28,
    block: int = 128,
    full_every: int = 0,
    seed: int = 0,
) -> Plan:
    """Make a legal plan: step 0 full, then the mixes, each for an equal share of the steps.

    full_every: every so many steps is full again (0: only step 0), and fills the caches.
    """
    if not mixes or not len(mixes) < steps:
        raise ArrowheadError(
            "synthetic plan", got=f"{len(mixes)} mixes in {steps} steps",
            expected="at least one mix, and a step for each after step 0", fix="pass more steps",
        )  # fmt: skip
    spec = architecture.spec(height, width, block)
    config = {key: value for key, value in spec.config.items() if not key.startswith("_")}
    buckets = [Bucket({module.name: (FULL,) * module.heads for module in spec.modules})]
    for i, mix in enumerate(mixes):
        rows = {
            module.name: tuple(mix.modes(seed + 1000 * i + j))
            for j, module in enumerate(spec.modules)
        }
        buckets.append(Bucket(rows))
    schedule = [1 + (step - 1) * len(mixes) // (steps - 1) for step in range(1, steps)]
    schedule.insert(0, 0)
    if full_every:
        schedule = [0 if step % full_every == 0 else own for step, own in enumerate(schedule)]
    plan = Plan(
        model=ModelRef(spec.architecture, config_fingerprint(spec.config), config=config),
        height=height,
        width=width,
        vae_scale_factor=architecture.vae_scale_factor,
        text_tokens=architecture.text_tokens,
        block=block,
        modules=spec.modules,
        sampler=Sampler(
            "FlowMatchEulerDiscreteScheduler",
            steps,
            _sigmas(architecture, spec, steps),
            architecture.cfg,
            architecture.guidance_scale,
        ),
        buckets=tuple(buckets),
        schedule=tuple(schedule),
        search={"method": "synthetic", "mixes": [mix.name for mix in mixes], "seed": seed},
    )
    check_plan(plan, spec)
    return replace(plan, accounting=account(plan, architecture.rows))


def dense_of(
    architecture: Architecture, height: int, width: int, steps: int, block: int = 128
) -> Plan:
    """The plan that computes every head in full."""
    spec = architecture.spec(height, width, block)
    heads = spec.modules[0].heads
    mix = Mix(heads, 0, 0, 0)
    plan = synthetic_plan(architecture, [mix], height=height, width=width, steps=steps, block=block)
    return dense_plan(plan)


def _sigmas(architecture: Architecture, spec: ModelSpec, steps: int) -> tuple[float, ...]:
    """The sigmas that the architecture's pipeline asks its scheduler for."""
    import numpy as np
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(**architecture.scheduler)
    if architecture.scheduler.get("use_dynamic_shifting"):
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        mu = calculate_shift(spec.modules[0].layout.image_tokens)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    else:
        scheduler.set_timesteps(steps)
    return tuple(round(float(sigma), 9) for sigma in scheduler.sigmas[:steps])
