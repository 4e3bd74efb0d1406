"""One bucket of a plan in a diffusers transformer, with all that no step changes prepared once.

What plans.processors does from outside at every step is worked out here beforehand: weights of the
computed heads alone, tasks of the kernel, and caches that hold what cached heads add to the
output *projection*, so that at later steps they cost neither attention nor any projection. All of
it are tensors, and blocks of one class differ in nothing else: torch.compile makes one graph for
all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plans import ops
from plans.models import AttentionModule
from plans.plan import CacheGroup, Plan, cache_flow
from plans.stock import check_stock
from plans.tiles import CACHED

QKV = ("to_q", "to_k", "to_v")
TEXT_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")


@dataclass(frozen=True)
class Linear:
    """Some rows or columns of a projection."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Contribution:
    """What a group of heads adds to the output projection, by part: [text, image], or one.

    None for text that no projection follows, which is discarded.
    """

    columns: tuple[Linear | None, ...]
    heads: Tensor  # of the group, among the computed ones
    cache: tuple[Tensor, ...]

    def write(self, outputs: Sequence[Tensor]) -> None:
        for project, kept, out in zip(self.columns, self.cache, outputs, strict=True):
            if project is not None:
                kept.copy_(project(out.index_select(2, self.heads).flatten(2)))


class SummedLinear(nn.Module):
    """An output projection of the computed heads, plus what the cached ones add to it."""

    def __init__(self, project: Linear, added: Sequence[Tensor]) -> None:
        super().__init__()
        self.project = project
        self.added = tuple(added)

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(x)
        for kept in self.added:
            out = out + kept
        return out


class LinearGelu(nn.Module):
    """A projection and its tanh GELU in one operator."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight.detach(), layer.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear_gelu(x, self.weight, self.bias)


@dataclass
class PreparedAttention:
    """Attention processor of one module in one bucket, for SD3's Attention and FluxAttention."""

    qkv: tuple[Linear, ...]
    text_qkv: tuple[Linear, ...]
    tasks: Tensor
    writes: tuple[Contribution, ...]
    outputs: tuple[SummedLinear | None, ...]  # [text, image]; empty: the block projects
    text_tokens: int
    text_first: bool
    block: int
    head_dim: int
    heads: int
    cache: tuple[Tensor, ...] = ()  # every head's last output, where nothing is pruned

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        inputs = [hidden_states]
        if encoder_hidden_states is not None:
            inputs = [encoder_hidden_states, hidden_states]
        if self.heads:
            out = self._attend(attn, inputs, image_rotary_emb)
        else:
            out = [x.new_empty(x.shape[0], x.shape[1], 0, self.head_dim) for x in inputs]
        for group in self.writes:
            group.write(out)
        for kept, new in zip(self.cache, out, strict=False):
            kept.copy_(new)
        merged = [x.flatten(2) for x in out]
        if not self.outputs:
            return merged[0]
        projected = [
            x if project is None else project(x)
            for project, x in zip(self.outputs, merged, strict=True)
        ]
        return projected[0] if len(projected) == 1 else (projected[1], projected[0])

    def _attend(
        self, attn: Any, inputs: list[Tensor], rotary: tuple[Tensor, Tensor] | None
    ) -> list[Tensor]:
        q, k, v = ([self._split(layer(inputs[-1]))] for layer in self.qkv)
        q, k = [_normalise(attn.norm_q, q[0])], [_normalise(attn.norm_k, k[0])]
        if len(inputs) == 2:
            text = [self._split(layer(inputs[0])) for layer in self.text_qkv]
            q = [_normalise(attn.norm_added_q, text[0]), *q]
            k = [_normalise(attn.norm_added_k, text[1]), *k]
            v = [text[2], *v]
        if rotary is not None:
            tables = [rotary]
            if len(inputs) == 2:
                tables = [
                    (rotary[0][: self.text_tokens], rotary[1][: self.text_tokens]),
                    (rotary[0][self.text_tokens :], rotary[1][self.text_tokens :]),
                ]
            q = [_rotate(x, t) for x, t in zip(q, tables, strict=True)]
            k = [_rotate(x, t) for x, t in zip(k, tables, strict=True)]
        return ops.attend(
            q, k, v, list(self.cache), self.tasks, self.head_dim**-0.5, self.text_tokens,
            self.text_first, self.block,
        )  # fmt: skip

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


@dataclass
class PreparedBucket:
    """The parts of the transformer that one bucket replaces."""

    replaced: list[tuple[Any, str, Any]] = field(default_factory=list)  # owner, name, part

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Have the transformer do what the bucket says; one bucket at a time."""
        before = [getattr(owner, name) for owner, name, _ in self.replaced]
        try:
            for owner, name, part in self.replaced:
                setattr(owner, name, part)
            yield
        finally:
            for (owner, name, _), part in zip(self.replaced, before, strict=True):
                setattr(owner, name, part)


class PreparedPlan:
    """All buckets of a plan over one transformer and one set of caches.

    prune: leave out the projections of cached heads. If not, there is one bucket only, whose modes
    are an input: `use` puts a bucket's modes there, and one graph serves the whole plan.
    fuse_gelu: GELU as the epilogue of the projection before it.
    Raises ArrowheadError, naming the module, for a transformer that is not a stock SD3 or FLUX one.
    """

    def __init__(
        self, transformer: nn.Module, plan: Plan, *, batch: int, prune: bool = True,
        fuse_gelu: bool = True,
    ) -> None:  # fmt: skip
        self.plan = plan
        self.prune = prune
        self._found = check_stock(transformer, plan.modules)
        self._blocks = {
            module.name: transformer.get_submodule(module.name.rpartition(".")[0])
            for module in plan.modules
        }
        self._batch = batch
        first = next(transformer.parameters())
        self._options: dict[str, Any] = {"device": first.device, "dtype": first.dtype}
        self._flow = cache_flow(plan)
        self.caches: dict[str, tuple[Tensor, ...]] = {}
        self._allocate()
        shared = _gelu_parts(transformer) if fuse_gelu else []
        self._tasks: dict[str, list[Tensor]] = {}
        if prune:
            count = len(plan.buckets)
            self.buckets = [PreparedBucket([*shared, *self._parts(b)]) for b in range(count)]
        else:
            self.buckets = [PreparedBucket([*shared, *self._universal()])] * len(plan.buckets)

    def use(self, bucket: int) -> None:
        """Put the modes of `bucket` where the one graph reads them; nothing to do if pruned."""
        for tables in self._tasks.values():
            tables[0].copy_(tables[1 + bucket])

    def reset(self, value: float = 0.0) -> None:
        """Overwrite all caches."""
        for parts in self.caches.values():
            for part in parts:
                part.fill_(value)

    def cache_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for parts in self.caches.values() for t in parts)

    def _allocate(self) -> None:
        for module in self.plan.modules:
            layout = module.layout
            tokens = [layout.seq_len]
            if self._is_split(module):
                tokens = [layout.text_tokens, layout.image_tokens]
            shape: tuple[int, ...] = (module.heads, module.head_dim)
            names = [module.name]
            if self.prune:
                shape = (module.heads * module.head_dim,)
                names = [group.name for group in self._flow.of(module.name)]
            for name in names:
                self.caches[name] = tuple(
                    torch.zeros(self._batch, n, *shape, **self._options) for n in tokens
                )

    def _is_split(self, module: AttentionModule) -> bool:
        """Whether the module gets text and image apart: a double block, not a single one."""
        return getattr(self._found[module.name], "add_q_proj", None) is not None

    def _parts(self, bucket: int) -> Iterator[tuple[Any, str, Any]]:
        reads, writes = self._flow.reads(bucket), self._flow.writes(bucket)
        for module in self.plan.modules:
            modes = self.plan.buckets[bucket].modes[module.name]
            heads = tuple(head for head, mode in enumerate(modes) if mode != CACHED)
            tasks = [(modes[head], i, -1) for i, head in enumerate(heads)]
            read = [group for group in reads if group.module == module.name]
            written = [group for group in writes if group.module == module.name]
            yield from self._module_parts(module, heads, self._tensor(tasks), read, written)

    def _universal(self) -> Iterator[tuple[Any, str, Any]]:
        for module in self.plan.modules:
            rows = [
                self._tensor([(mode, head, -1) for head, mode in enumerate(b.modes[module.name])])
                for b in self.plan.buckets
            ]
            self._tasks[module.name] = [rows[0].clone(), *rows]
            heads = tuple(range(module.heads))
            yield from self._module_parts(module, heads, self._tasks[module.name][0], [], [])

    def _module_parts(
        self,
        module: AttentionModule,
        heads: tuple[int, ...],
        tasks: Tensor,
        read: Sequence[CacheGroup],
        written: Sequence[CacheGroup],
    ) -> Iterator[tuple[Any, str, Any]]:
        attn, block = self._found[module.name], self._blocks[module.name]
        single = bool(getattr(attn, "pre_only", False))
        layers = [block.proj_out] if single else _output_layers(attn, self._is_split(module))
        kept = [self.caches[group.name] for group in read]
        summed = [
            None
            if layer is None
            else SummedLinear(
                _columns(layer, module, heads, rest=True), [cache[i] for cache in kept]
            )
            for i, layer in enumerate(layers)
        ]
        dim = module.head_dim
        yield attn, "processor", PreparedAttention(
            qkv=tuple(_rows(getattr(attn, n), heads, dim) for n in QKV),
            text_qkv=tuple(
                _rows(getattr(attn, n), heads, dim) for n in TEXT_QKV if self._is_split(module)
            ),
            tasks=tasks,
            writes=tuple(self._contribution(module, layers, heads, g) for g in written),
            outputs=() if single else tuple(summed),
            text_tokens=module.layout.text_tokens,
            text_first=module.layout.text_first,
            block=module.layout.block,
            head_dim=dim,
            heads=len(heads),
            cache=() if self.prune else self.caches[module.name],
        )
        if single:
            yield block, "proj_out", summed[0]

    def _contribution(
        self,
        module: AttentionModule,
        layers: Sequence[nn.Linear | None],
        heads: tuple[int, ...],
        group: CacheGroup,
    ) -> Contribution:
        columns = tuple(
            None if layer is None else _columns(layer, module, group.heads, rest=False)
            for layer in layers
        )
        place = torch.tensor([heads.index(h) for h in group.heads], device=self._options["device"])
        return Contribution(columns, place, self.caches[group.name])

    def _tensor(self, tasks: Sequence[tuple[int, int, int]]) -> Tensor:
        device = self._options["device"]
        return torch.tensor(tasks, dtype=torch.int32, device=device).reshape(-1, 3)


def _output_layers(attn: Any, split: bool) -> list[nn.Linear | None]:
    """Give the projections of [text, image], or of image alone."""
    image = attn.to_out[0]
    if not split:
        return [image]
    return [None if attn.context_pre_only else attn.to_add_out, image]


def _rows(layer: nn.Linear, heads: tuple[int, ...], head_dim: int) -> Linear:
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    if len(heads) * head_dim == layer.out_features:
        return Linear(weight, bias)
    index = _channels(heads, head_dim, weight.device)
    return Linear(weight[index], None if bias is None else bias[index])


def _columns(
    layer: nn.Linear, module: AttentionModule, heads: tuple[int, ...], *, rest: bool
) -> Linear:
    """Take the input channels of `heads`; rest: with the bias, and FLUX's MLP channels after."""
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    width = module.heads * module.head_dim
    if not rest:
        return Linear(weight[:, _channels(heads, module.head_dim, weight.device)], None)
    if len(heads) == module.heads:
        return Linear(weight, bias)
    own = weight[:, _channels(heads, module.head_dim, weight.device)]
    return Linear(torch.cat([own, weight[:, width:]], dim=1).contiguous(), bias)


def _channels(heads: tuple[int, ...], head_dim: int, device: torch.device) -> Tensor:
    first = torch.tensor(heads, dtype=torch.long, device=device)[:, None] * head_dim
    return (first + torch.arange(head_dim, device=device)).flatten()


def _gelu_parts(transformer: nn.Module) -> list[tuple[Any, str, Any]]:
    """Put LinearGelu in the place of every projection that a tanh GELU follows."""
    parts: list[tuple[Any, str, Any]] = []
    for module in transformer.modules():
        first = getattr(getattr(module, "net", None), "0", None)  # FeedForward
        if type(first).__name__ == "GELU" and getattr(first, "approximate", "") == "tanh":
            if first.proj.bias is not None:
                parts.append((module.net, "0", LinearGelu(first.proj)))
        elif hasattr(module, "proj_mlp") and isinstance(getattr(module, "act_mlp", None), nn.GELU):
            parts.append((module, "proj_mlp", LinearGelu(module.proj_mlp)))
            parts.append((module, "act_mlp", nn.Identity()))
    return parts


def _normalise(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    from diffusers.models.embeddings import apply_rotary_emb

    return apply_rotary_emb(x, tables, sequence_dim=1)
