"""How much the prediction moves with each head's output, told by one backward pass a step.

What the energy of a contribution leaves out is what later blocks make of it. To first order an
error e of a head's output moves the prediction by J e. For a random probe r of the prediction's
shape the gradient J^T r is J's energy on every item of the output at once, so that errors spread
over all items like the output itself move the prediction by |J^T r|^2 times their energy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from plans.errors import ArrowheadError
from plans.models import AttentionModule
from plans.processors import install
from plans.scores import BACKENDS, attention, counted, moments

# cuDNN's way back has no plan for some shapes whose way forward it takes.
_BACKENDS = [backend for backend in BACKENDS if backend != SDPBackend.CUDNN_ATTENTION]


class Gradients:
    """Runs every transformer call of a run once more, forward and back, for the heads' gradients.

    guidance_scale: of classifier-free guidance, whose rows are weighted as in the prediction; None
    without it. Blocks are recomputed on the way back, so that one block's tensors are kept at once.
    """

    def __init__(
        self, transformer: nn.Module, modules: Sequence[AttentionModule],
        guidance_scale: float | None, seed: int = 0,
    ) -> None:  # fmt: skip
        self._transformer: Any = transformer
        self._modules = tuple(modules)
        self._guidance_scale = guidance_scale
        self._seed = seed
        self._found: list[dict[str, Tensor]] = []  # by step and module: [H]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Follow the transformer's calls inside the `with`."""
        handle = self._transformer.register_forward_hook(self._after, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def energies(self) -> dict[str, NDArray[np.float64]]:
        """Return the finished run's "gradient", [N, R]."""
        rows = [torch.cat([step[m.name] for m in self._modules]) for step in self._found]
        found = torch.stack(rows).cpu().numpy().astype(np.float64)
        if not np.isfinite(found).all():
            raise ArrowheadError(
                "gradients of the heads' outputs",
                got=f"values that are not finite in {self._transformer.dtype}",
                expected="finite gradients",
                fix="search in bfloat16 or float32",
            )
        return {"gradient": found}

    def computed_heads(self, module: AttentionModule) -> tuple[int, ...]:
        return tuple(range(module.heads))

    def attend(
        self, module: AttentionModule, q: Tensor | None, k: Tensor | None, v: Tensor | None
    ) -> Tensor:
        assert q is not None and k is not None and v is not None
        out = attention(q, k, v, backends=_BACKENDS)
        seen = counted(module, out.detach())
        spread = moments([seen[None]], seen).spread

        def note(gradient: Tensor) -> None:
            energy = torch.linalg.vector_norm(
                counted(module, gradient), dim=(0, 1, 3), dtype=torch.float32
            ).square()
            self._found[-1][module.name] = energy * spread

        out.register_hook(note)
        return out

    def _after(
        self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        self._found.append({})
        undo = install(transformer, self._modules, self)
        try:
            # It is the input's gradient that is asked for, so that parameters get none.
            hidden = kwargs["hidden_states"].detach().clone().requires_grad_()
            with _recomputed(transformer), torch.enable_grad():
                made = transformer.forward(*args, **{**kwargs, "hidden_states": hidden})[0]
            torch.autograd.grad(made, hidden, self._probe(made))
        finally:
            undo()

    def _probe(self, made: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed + len(self._found))
        shape = made.shape if self._guidance_scale is None else (len(made) // 2, *made.shape[1:])
        probe = torch.randn(shape, generator=generator)
        if self._guidance_scale is not None:  # negative rows first
            scale = self._guidance_scale
            probe = torch.cat([(1 - scale) * probe, scale * probe])
        return probe.to(made)


@contextmanager
def _recomputed(transformer: Any) -> Iterator[None]:
    """Have blocks keep nothing for the way back but their inputs."""
    before = transformer.is_gradient_checkpointing
    if not before:
        transformer.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if not before:
            transformer.disable_gradient_checkpointing()
