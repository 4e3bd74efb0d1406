"""The ways to a plan: all of it at once from what runs record, or step by step in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from plans.bounds import Bounds, raise_offenders
from plans.buckets import Choice, choose_buckets, corrected, predicted_errors
from plans.denoising import Denoising, denoise
from plans.effort import AGES, Effort, search_memory
from plans.importance import GRADIENT, HEAD, check_error_weights, error_weights
from plans.plan import Bucket, Plan
from plans.pooled import choose_pooled
from plans.prices import Prices
from plans.recorder import Recorder, Savings, head_savings, pairs_saved, pooled_errors
from plans.runs import Moments, Progress, Run, Runs, Scratch
from plans.strategies import ChooseHeads, HeadErrors, errors_by_module
from plans.tables import Floats, HeadTables, check_first_step
from plans.tiles import FULL, kept_pairs

_AIM = 0.95  # of the bound, to the power of the attempts


class Found(NamedTuple):
    """A plan and its errors: measured on some prompts, or told from what was measured before."""

    plan: Plan
    errors: HeadErrors
    basis: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """Say in JSON what the errors are, summed over the heads of each step and module."""
        names = [module.name for module in self.plan.modules]
        sums = {n: [float(f"{sum(row[n]):.6g}") for row in self.errors] for n in names}
        return {**self.basis, "errors": sums}


class Search:
    """One search: what is asked, what its runs need, and the methods."""

    def __init__(
        self,
        pipe: Any,
        settings: Denoising,
        bare: Plan,
        candidates: Mapping[str, Sequence[int]],
        bounds: Bounds,
        effort: Effort,
        prices: Prices | None,
        report: Progress | None,
        first_step: str = "full",
        weighing: str = HEAD,
    ) -> None:
        self._pipe = pipe
        self._settings = settings
        self._bare = bare
        self._bounds = bounds
        self._effort = effort
        self._prices = prices
        self._report = report or (lambda *_: None)
        check_first_step(first_step)
        self._first_step = first_step
        check_error_weights(weighing)
        self._weighing = weighing
        self._weights: Floats = np.ones((1, 1))
        self._ran = np.zeros(settings.steps, dtype=bool)  # steps that a step cache does not skip
        self._candidates: dict[str, tuple[int, ...]] = {}
        self._savings: Savings = {}
        self.rows_per_picture = 2 if bare.sampler.cfg else 1
        self._settle(candidates)

    def _settle(self, asked: Mapping[str, Sequence[int]]) -> None:
        """Settle what is tried on each module, and what it saves: milliseconds, or pairs."""
        modules, rows, prices = self._bare.modules, self.rows_per_picture, self._prices
        if prices is None:
            self._candidates = {name: tuple(modes) for name, modes in asked.items()}
            self._savings = {m.name: head_savings(m, asked[m.name]) for m in modules}
            return
        self._candidates = {m.name: prices.worthwhile(m, rows, asked[m.name]) for m in modules}
        self._savings = {m.name: prices.savings(m, rows, self._candidates[m.name]) for m in modules}

    def memory(self) -> dict[str, int]:
        """Bytes needed beside the model."""
        rows = self.rows_per_picture * min(self._effort.pictures_per_run, self._settings.pictures)
        item = self._pipe.transformer.dtype.itemsize
        ages = min(AGES, self._settings.steps - 1)
        modules = self._bare.modules
        needed = search_memory(
            modules, self._candidates, rows, item, ages, self._effort.sample_tokens
        )
        if self._weighing == GRADIENT:  # the input of every block is kept for the way back
            tokens = sum(m.layout.seq_len * m.heads * m.head_dim for m in modules)
            needed["gradients"] = rows * tokens * item
        return needed

    def begin(self, scratch: Scratch) -> None:
        self.scratch = scratch
        self._runs = Runs(
            self._pipe, self._settings, self._effort, self._candidates, self._report, scratch
        )

    def _weigh(self, run: Run) -> None:
        """Learn from a run in full what errors are multiplied by."""
        if run.energies is not None:
            bare = self._bare
            sigmas = bare.sampler.sigmas
            self._weights = error_weights(self._weighing, run.energies, bare.modules, sigmas)

    def _weigh_first(self) -> None:
        """Run the first group in full where that is needed for the weights of errors."""
        if self._weighing != HEAD:
            self._weigh(self._runs.run(self._bare, "weigh", 0, False, self._weighing))

    def _measure(self, plan: Plan, stage: str) -> HeadErrors:
        """Run all groups with the plan: weighted errors over all prompts."""
        return errors_by_module(plan.modules, self._runs.errors(plan, stage) * self._weights)

    def _dense(self) -> float:
        """What a step in full costs, in the unit of the savings."""
        if self._prices is not None:
            return sum(
                m.heads * self._prices.find(m, self.rows_per_picture).of(FULL)
                for m in self._bare.modules
            )
        return float(
            sum(m.heads * kept_pairs(m.layout, FULL, m.text_output) for m in self._bare.modules)
        )

    def priced(self, plan: Plan) -> dict[str, Any]:
        """What the prices, where there are any, say of a plan's whole run; for the record."""
        if self._prices is None:
            return {}
        saved = sum(pairs_saved(self._savings, plan.modes_at(step)) for step in range(plan.steps))
        told = {
            "device": self._prices.device,
            "kernel": self._prices.kernel,
            "batch": self._prices.batch,
            "dense_ms": round(plan.steps * self._dense(), 3),
            "saved_ms": round(saved, 3),
        }
        return {"prices": told}

    def found(
        self, method: str, max_buckets: int, keep_tables: Callable[[HeadTables], None] | None
    ) -> Found:
        """Search by one of the methods, and forget its finished runs."""
        if method == "progressive":
            found = self.progressive()
        else:
            found = self.joint(max_buckets, keep_tables)
        self.scratch.clear()
        return found

    def joint(
        self, max_buckets: int, keep_tables: Callable[[HeadTables], None] | None = None
    ) -> Found:
        """Record a run in full, choose, and run that; choose again from what the run records.

        The first run is in full, the next ones follow their plan, each with the next group of
        prompts: errors are those of the activations the plan leads to. The search ends where a
        plan keeps the bounds once all prompts were seen. Where none of `rounds` does, the last is
        raised until it does; without a final check by what its run tells, and the errors are called
        what they are: predicted. Where one bound is for the whole run, a group's errors stay those
        of its first run, and delta is lowered until a plan keeps the bound.
        """
        groups, rounds = len(self._runs.groups), self._effort.rounds
        recorder = self._runs.recorder(self._bare)
        recorded: dict[int, Moments] = {}
        plan, choice, broken, aim = self._bare, None, 0, self._bounds.delta
        for turn in range(rounds + 1):
            group = turn % groups
            stage = f"measure {turn}" if turn else "record"
            run = self._runs.run(plan, stage, group, True, HEAD if turn else self._weighing)
            assert run.recorded is not None
            self._ran |= run.recorded["ran"] > 0
            self._weigh(run)
            if group not in recorded or not self._bounds.pooled:
                recorded[group] = run.recorded
            measured = pooled_errors([run.measured])[:, :, 0] * self._weights
            errors = errors_by_module(plan.modules, measured)
            kept = turn > 0 and not self._bounds.broken(plan.modules, errors)
            if kept and turn >= groups - 1:
                return Found(plan, errors, self._basis("measured", turn, [group]))
            if turn == rounds:
                break
            broken += turn > 0 and not kept
            aim = self._aim(aim, broken, errors)
            tables = self._tables(recorder, list(recorded.values()))
            if keep_tables is not None and turn < groups:
                keep_tables(tables)
            if choice is not None and not self._bounds.pooled:
                own = self._tables(recorder, [run.recorded])
                tables = replace(tables, drift=corrected(own, choice, measured).drift)
            choice = self._choose(tables, aim, max_buckets, choice)
            plan = _plan_of(self._bare, choice)
        if self._effort.final_check:
            plan = raise_offenders(plan, errors, self._bounds, self._candidates)
            return self.kept_within(plan, rounds)
        assert choice is not None and run.recorded is not None  # there is a round at least
        own = corrected(self._tables(recorder, [run.recorded]), choice, measured)
        return self._predicted(plan, own, measured, group)

    def _tables(self, recorder: Recorder, runs: Sequence[Moments]) -> HeadTables:
        return replace(recorder.tables(runs, self._savings), weights=self._weights)

    def _aim(self, before: float, broken: int, errors: HeadErrors) -> float:
        """Lower delta for the next choice, where one broke it: other activations follow again.

        A mean over the run follows what it aims at; a sum of one step and module need not.
        """
        if self._bounds.pooled:
            return before * min(1.0, _AIM / self._bounds.share(errors)) if broken else before
        return self._bounds.delta * (_AIM ** (broken + 1) if broken else 1)

    def _choose(
        self, tables: HeadTables, aim: float, max_buckets: int, before: Choice | None
    ) -> Choice:
        """Choose for the steps that were run; one that was left out is in the bucket before."""
        ran, all_steps = np.flatnonzero(self._ran).tolist(), self._settings.steps
        choose = choose_pooled if self._bounds.pooled else choose_buckets
        if self._bounds.pooled:
            aim *= all_steps / len(ran)  # of the mean over all steps
        dense = all_steps * self._dense()
        found = choose(
            tables.at_steps(ran).under(self._first_step), aim, self._bounds.cap_factor, max_buckets,
            start=None if before is None else tuple(before.schedule[step] for step in ran),
            progress=lambda i, n, saved: self._report("choose", i, n, saved / dense),
        )  # fmt: skip
        latest = np.searchsorted(ran, range(all_steps), side="right") - 1
        return found._replace(schedule=tuple(found.schedule[place] for place in latest))

    def _predicted(self, plan: Plan, own: HeadTables, measured: Floats, group: int) -> Found:
        """Raise heads until the bounds are kept, as the plan's last run tells; nothing is run.

        own: what that run recorded, corrected by what it measured.
        """
        errors = errors_by_module(plan.modules, measured)
        start, count = plan, 0
        while self._bounds.broken(plan.modules, errors):
            count += 1
            more = self._candidates if count < len(self._bare.schedule) else None
            plan = raise_offenders(plan, errors, self._bounds, more)
            told = predicted_errors(own, _choice_of(plan))
            errors = errors_by_module(plan.modules, told)
        basis = "measured" if plan is start else "predicted"
        return Found(plan, errors, self._basis(basis, self._effort.rounds, [group]))

    def _basis(self, basis: str, measurements: int, groups: Sequence[int]) -> dict[str, Any]:
        """What the errors of the record stand on, for the record."""
        per_run = self._effort.pictures_per_run
        pictures = range(self._settings.pictures)
        seen = sorted(i for group in groups for i in pictures[group * per_run :][:per_run])
        return {
            "basis": basis, "measurements": measurements, "measured_prompts": seen,
            "resumed_runs": self.scratch.resumed,
        }  # fmt: skip

    def progressive(self) -> Found:
        """Choose at every step as the run comes to it; then raise what a measurement asks for.

        Steps of equal choices share a bucket. All prompts are in one run, since each choice needs
        them all.
        """
        bare = self._bare
        self._weigh_first()
        weights = None
        if self._weighing != HEAD:
            weights = errors_by_module(bare.modules, self._weights)
        strategy = ChooseHeads(
            bare.modules, self._candidates, self._savings, self._bounds.delta,
            self._bounds.cap_factor, self._effort.sample_tokens, self._first_step, weights,
        )  # fmt: skip
        dense = self._dense()

        def step_done(step: int) -> None:
            saved = sum(pairs_saved(self._savings, modes) for modes in strategy.modes)
            self._report("search", step + 1, self._settings.steps, saved / ((step + 1) * dense))

        denoise(self._pipe, self._settings, bare.modules, strategy, step_done)
        distinct: list[dict[str, tuple[int, ...]]] = []
        for modes in strategy.modes:
            if modes not in distinct:
                distinct.append(modes)
        schedule = tuple(distinct.index(modes) for modes in strategy.modes)
        plan = replace(bare, buckets=tuple(Bucket(m) for m in distinct), schedule=schedule)
        return self.kept_within(plan, 0)

    def measured(self, plan: Plan) -> Found:
        """Measure a plan on all prompts, and leave it as it is."""
        self._weigh_first()
        errors = self._measure(plan, "measure")
        return Found(plan, errors, self._basis("measured", 1, range(len(self._runs.groups))))

    def repaired(self, plan: Plan) -> Found:
        """Measure a plan that this search did not make, and raise heads as `kept_within` does."""
        self._weigh_first()
        return self.kept_within(plan)

    def kept_within(self, plan: Plan, before: int = 0) -> Found:
        """Measure, raise the heads that break the bounds, and measure again until none does.

        From the last of `rounds` on they become full at once; each round then leaves fewer heads
        to raise, so it ends.
        """
        count = 0
        while True:
            count += 1
            errors = self._measure(plan, f"check {count}")
            if not self._bounds.broken(plan.modules, errors):
                everyone = range(len(self._runs.groups))
                return Found(plan, errors, self._basis("measured", before + count, everyone))
            more = self._candidates if count < self._effort.rounds else None
            plan = raise_offenders(plan, errors, self._bounds, more)


def _plan_of(bare: Plan, choice: Choice) -> Plan:
    ends = np.cumsum([module.heads for module in bare.modules])
    buckets = tuple(
        Bucket(
            {
                module.name: tuple(int(mode) for mode in row[end - module.heads : end])
                for module, end in zip(bare.modules, ends, strict=True)
            }
        )
        for row in choice.modes
    )
    return replace(bare, buckets=buckets, schedule=choice.schedule)


def _choice_of(plan: Plan) -> Choice:
    modes = [[m for module in plan.modules for m in b.modes[module.name]] for b in plan.buckets]
    return Choice(np.array(modes), plan.schedule, 0.0)
