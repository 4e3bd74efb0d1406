"""How much each head's output counts in what the model predicts, told from a run in full.

A head's error is relative to its own output, whatever comes of it. What comes of it is what the
head adds to the residual stream: its output, through its part of the output projection, times the
block's gate. The energy of that, of the stream's as the module leaves it, weights the head's
error. Of the stream as the module finds it, it would weigh the first block, which finds little in
it, many times any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from plans.errors import ArrowheadError
from plans.models import AttentionModule
from plans.sample import Sample

Floats = NDArray[np.float64]

HEAD, OUTPUT, STREAM, STREAM_DT = "head", "output", "stream", "stream-dt"
GRADIENT = "gradient"  # plans.gradients
# What errors are multiplied by, as plan files tell it.
ERROR_WEIGHTS = {
    HEAD: "",
    OUTPUT: ", times H x the head's share of the energy that its module adds to the residual "
    "stream in a run in full",
    STREAM: ", times the energy that the head adds to the residual stream, of the stream's as the "
    "module leaves it, in a run in full; mean 1 over steps and heads",
    STREAM_DT: ", times the energy that the head adds to the residual stream, of the stream's as "
    "the module leaves it, in a run in full, and the square of the step's sigma difference; mean 1 "
    "over steps and heads",
    GRADIENT: ", times the energy of the head's output and of the prediction's gradient by it, in "
    "a run in full; mean 1 over the heads of each step",
}
# Of the mean weight: an error that is infinite, since there is no such mode, stays so.
_LEAST = 1e-9


def check_error_weights(name: str) -> None:
    """Raise ArrowheadError for weights that nobody knows."""
    if name not in ERROR_WEIGHTS:
        raise ArrowheadError(
            "error weights", got=name, expected=f"one of {', '.join(ERROR_WEIGHTS)}",
            fix="name one, or leave it out for `head`",
        )  # fmt: skip


def error_weights(
    name: str,
    energies: Mapping[str, Floats],
    modules: Sequence[AttentionModule],
    sigmas: Sequence[float],
) -> Floats:
    """Return what the errors of each step and head are multiplied by, [N, R].

    energies: "added" and "stream" of a run in full, as Energies tells them, or "gradient", as
    Gradients does; sigmas: of its steps, without the trailing zero.
    """
    if name == HEAD:
        return np.ones((1, 1))
    if name == GRADIENT:
        gradient = energies["gradient"]
        return np.maximum(_ratio(gradient, gradient.mean(axis=1, keepdims=True)), _LEAST)
    added = energies["added"]
    heads = np.array([module.heads for module in modules])
    starts = np.cumsum(heads) - heads
    by_module = np.repeat(np.add.reduceat(added, starts, axis=1), heads, axis=1)
    if name == OUTPUT:
        return np.maximum(_ratio(added, by_module / np.repeat(heads, heads)), _LEAST)
    weights = _ratio(added, energies["stream"] + by_module)
    if name == STREAM_DT:
        ends = np.array([*sigmas[1:], 0.0])
        weights = weights * ((np.array(sigmas) - ends) ** 2)[:, None]
    return np.maximum(_ratio(weights, weights.mean()), _LEAST)


def _ratio(part: Floats, whole: Floats | float) -> Floats:
    """Divide; 1 where there is nothing to be a part of."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(whole) > 0, part / whole, 1.0)


class _Stream(NamedTuple):
    """Tokens of one residual stream that a module adds to.

    norm: the block's norm of the stream: its input is the stream, output `gate` of it the gate.
    project: the layer whose first columns are the heads', H x D of them.
    """

    norm: str
    gate: int
    project: nn.Module
    text: bool
    image: bool


class Energies:
    """Notes the energy of residual streams, as modules find them, and of what heads add, in a run.

    Both are sums over the tokens that count, image and text, and over the rows of all prompts.
    """

    def __init__(
        self, transformer: nn.Module, modules: Sequence[AttentionModule], steps: int
    ) -> None:
        self._transformer = transformer
        self._modules = tuple(modules)
        self._streams = {m.name: _streams_of(transformer, m) for m in modules}
        # By step and module: [H] of the heads, [] of the stream. On the device until the run ends.
        self._added: list[dict[str, Tensor]] = [{} for _ in range(steps)]
        self._stream: list[dict[str, Tensor]] = [{} for _ in range(steps)]
        # By norm: energy of each token of the stream [S], and the gates [B, dim] by their place.
        self._seen: dict[str, tuple[Tensor, dict[int, Tensor]]] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch the norms of the transformer's blocks inside the `with`."""
        gates: dict[str, set[int]] = {}
        for stream in (s for streams in self._streams.values() for s in streams):
            gates.setdefault(stream.norm, set()).add(stream.gate)
        with ExitStack() as stack:
            for name, places in gates.items():
                norm = self._transformer.get_submodule(name)
                stack.callback(norm.register_forward_hook(self._keeper(name, places)).remove)
            yield

    def _keeper(self, name: str, places: set[int]) -> Callable[..., None]:
        def keep(norm: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            energy = torch.linalg.vector_norm(args[0], dim=(0, 2), dtype=torch.float32).square()
            self._seen[name] = energy, {place: output[place] for place in places}

        return keep

    def note(self, step: int, module: AttentionModule, sample: Sample, seen: Tensor) -> None:
        """Take down a module's energies at a step; seen: its full attention on the sample."""
        added = seen.new_zeros(module.heads, dtype=torch.float32)
        whole = seen.new_zeros((), dtype=torch.float32)
        for stream in self._streams[module.name]:
            energy, gates = self._seen[stream.norm]
            gate = gates[stream.gate].float()
            first = 0 if stream.text else sample.text_rows
            last = seen.shape[1] if stream.image else sample.text_rows
            moment = second_moment(seen[:, first:last], sample.weights[first:last])
            added += added_energy(moment, _columns(stream.project, module), gate)
            whole += _counted(module, stream, energy).sum()
        self._added[step][module.name] = added
        self._stream[step][module.name] = whole

    def energies(self) -> dict[str, Floats]:
        """Return the finished run's "added" and "stream", both [N, R]."""
        steps = range(len(self._added))
        added = [[self._added[i][m.name] for m in self._modules] for i in steps]
        whole = [[self._stream[i][m.name].expand(m.heads) for m in self._modules] for i in steps]
        return {
            name: torch.stack([torch.cat(row) for row in rows]).cpu().numpy().astype(np.float64)
            for name, rows in (("added", added), ("stream", whole))
        }


def second_moment(output: Tensor, weights: Tensor) -> Tensor:
    """Sum o o^T over rows of a head's output [B, rows, H, D], in fp32: [B, H, D, D].

    weights: [rows], how many rows each stands for.
    """
    scaled = (output.float() * weights.sqrt()[:, None, None]).transpose(1, 2)
    return scaled.mT @ scaled


def added_energy(moment: Tensor, columns: Tensor, gate: Tensor) -> Tensor:
    """Return sum |g (W_h o)|^2 for each head, [H], from moments [B, H, D, D] of its output o.

    columns: [dim, H, D], W_h side by side; gate: [B, dim].
    """
    heads = []
    for head in range(columns.shape[1]):
        own = columns[:, head].float()  # [dim, D]
        # (W C W^T)_cc without the rest of the matrix.
        channel = torch.einsum("cd,bde,ce->bc", own, moment[:, head], own)
        heads.append((channel * gate.square()).sum())
    return torch.stack(heads).clamp(min=0)


def _columns(project: nn.Module, module: AttentionModule) -> Tensor:
    """The projection's columns of the heads, [dim, H, D]."""
    weight: Any = project.weight
    where: Any = nullcontext()
    if weight.device.type == "meta":  # offloaded layer by layer
        from accelerate.utils import align_module_device

        where = align_module_device(project)
    with where:
        weight = project.weight
        heads = weight[:, : module.heads * module.head_dim]
        return heads.detach().clone().unflatten(1, (module.heads, module.head_dim))


def _counted(module: AttentionModule, stream: _Stream, energy: Tensor) -> Tensor:
    """Tokens of a stream that count: of one that holds discarded text, the image."""
    if module.text_output or not (stream.text and stream.image):
        return energy
    return energy.narrow(0, module.layout.image_offset, module.layout.image_tokens)


def _streams_of(transformer: nn.Module, module: AttentionModule) -> tuple[_Stream, ...]:
    """Where a module's output goes: to one stream of all tokens, or to the image's and the text's.

    attn2 of SD3.5 is put beside the stream that its block finds, as attn is.
    """
    block_name, _, name = module.name.rpartition(".")
    block: Any = transformer.get_submodule(block_name)
    attn = getattr(block, name)
    if getattr(attn, "pre_only", False):  # FLUX's single block
        return (_Stream(f"{block_name}.norm", 1, block.proj_out, True, True),)
    gate = 6 if name == "attn2" else 1
    image = _Stream(f"{block_name}.norm1", gate, attn.to_out[0], False, True)
    if not module.layout.text_tokens or not module.text_output:
        return (image,)
    return image, _Stream(f"{block_name}.norm1_context", 1, attn.to_add_out, True, False)
