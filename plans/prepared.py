"""One bucket of a plan in a diffusers transformer, with all that no step changes prepared once.

What plans.processors does from outside at every step is worked out here beforehand: weights of the
computed heads alone, tasks of the kernel, and caches that hold what cached heads add to the
output *projection*, so that at later steps they cost neither attention nor any projection. All of
it are tensors, and blocks of one class differ in nothing else: torch.compile makes one graph for
all of them.

Heads are put in an order, in the transformer's own weights, in which those that a bucket computes
lie side by side (plans.head_order): a bucket then has no weights of its own, but slices of those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from plans.errors import ArrowheadError
from plans.head_order import flow_by_places, head_orders, plan_by_places
from plans.models import AttentionModule
from plans.plan import CacheGroup, Plan
from plans.prepared_parts import (
    QKV,
    TEXT_QKV,
    Contribution,
    LinearGelu,
    Pieces,
    PreparedAttention,
    SingleBlock,
    SummedLinear,
    rest_of,
)
from plans.reordered import HeadLayers, HeldOrder, hold_order
from plans.stock import check_stock
from plans.tiles import CACHED

_ABSENT: Any = object()


@dataclass
class PreparedBucket:
    """The parts of the transformer that one bucket replaces."""

    replaced: list[tuple[Any, str, Any]] = field(default_factory=list)  # owner, name, part
    order: HeldOrder | None = None  # of heads, which the parts count on

    def check(self) -> None:
        """Refuse a bucket whose plan was dropped: heads lie in another order now."""
        if self.order is not None and self.order.released:
            raise ArrowheadError(
                "bucket of a compiled plan",
                got="a step after the plan was closed, which put the weights back",
                expected="a plan in use",
                fix="load the plan again",
            )

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Have the transformer do what the bucket says; one bucket at a time."""
        self.check()
        before = [(owner, name, _put(owner, name, part)) for owner, name, part in self.replaced]
        try:
            yield
        finally:
            for owner, name, part in before:
                _put(owner, name, part)


def _put(owner: nn.Module, name: str, part: Any) -> Any:
    """Set an attribute or child past nn.Module's checks; return what was there, or _ABSENT."""
    table: dict[str, Any] = owner._modules if name in owner._modules else owner.__dict__
    before = table.get(name, _ABSENT)
    if part is _ABSENT:
        del table[name]
    else:
        table[name] = part
    return before


class PreparedPlan:
    """All buckets of a plan over one transformer and one set of caches.

    prune: leave out the projections of cached heads. If not, there is one bucket only, whose modes
    are an input: `use` puts a bucket's modes there, and one graph serves the whole plan.
    fuse_gelu: GELU as the epilogue of the projection before it.
    own_caches: make caches and buckets over them. If not, `bucket` makes one over the caller's.
    move_heads: put heads of a bucket side by side in the transformer's own weights. If not, buckets
    copy theirs. Until `drop` puts heads back, the transformer's own samples may differ by rounding,
    and its weights must not be changed.
    Raises ArrowheadError, naming the module, for a transformer that is not a stock SD3 or FLUX one.
    """

    def __init__(
        self, transformer: nn.Module, plan: Plan, *, batch: int, prune: bool = True,
        fuse_gelu: bool = True, own_caches: bool = True, move_heads: bool = True,
    ) -> None:  # fmt: skip
        self.plan = plan
        self.prune = prune
        self._found = check_stock(transformer, plan.modules)
        self._blocks: dict[str, Any] = {
            module.name: transformer.get_submodule(module.name.rpartition(".")[0])
            for module in plan.modules
        }
        self._batch = batch
        first = next(transformer.parameters())
        self._options: dict[str, Any] = {"device": first.device, "dtype": first.dtype}
        self._pieces = Pieces()
        self._shared: list[tuple[Any, str, Any]] = []
        self._tasks: dict[str, list[Tensor]] = {}
        self.caches: dict[str, tuple[Tensor, ...]] = {}
        self.buckets: list[PreparedBucket] = []
        self._order = self._hold_order(transformer, move_heads and prune)
        # Heads are counted by their places from here on.
        self._placed = plan_by_places(plan, self._order.orders)
        self._flow = flow_by_places(plan, self._order.orders)
        try:
            self._shared += _gelu_parts(transformer) if fuse_gelu else []
            if own_caches:
                self._make_caches_and_buckets()
        except BaseException:
            self.drop()
            raise

    def _hold_order(self, transformer: nn.Module, move: bool) -> HeldOrder:
        wanted = {module.name: tuple(range(module.heads)) for module in self.plan.modules}
        if move:
            wanted = head_orders(self.plan)
        layers = {}
        for module in self.plan.modules:
            rows = [layer for layers in self._inputs(module) for layer in layers]
            columns = [layer for layer in self._outputs(module) if layer is not None]
            layers[module.name] = HeadLayers(module.head_dim, tuple(rows), tuple(columns))
        return hold_order(transformer, layers, wanted)

    def bucket(self, index: int, caches: Mapping[str, tuple[Tensor, ...]]) -> PreparedBucket:
        """Make one bucket over these caches; all that are made share the weights.

        caches: by group, in the shapes of cache_shapes; those it reads or writes are enough.
        """
        return PreparedBucket([*self._shared, *self._parts(index, caches)], self._order)

    def cache_shapes(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Give the shapes of each cache's parts: [text, image], or one of both.

        Caches are those of plans.cache_flow, [B, T, C] and [B, V, C]: what the group's heads add to
        the output projection. Unpruned, they are [B, S, H, D] of every module.
        """
        shapes: dict[str, tuple[tuple[int, ...], ...]] = {}
        for module in self.plan.modules:
            layout = module.layout
            tokens = [layout.seq_len]
            if self._is_split(module):
                tokens = [layout.text_tokens, layout.image_tokens]
            channels: tuple[int, ...] = (module.heads, module.head_dim)
            names = [module.name]
            if self.prune:
                channels = (module.heads * module.head_dim,)
                names = [group.name for group in self._flow.of(module.name)]
            for name in names:
                shapes[name] = tuple((self._batch, n, *channels) for n in tokens)
        return shapes

    def weight_bytes(self) -> int:
        """Bytes of weights that are copies: of heads that could not be put side by side."""
        return self._pieces.copied_bytes()

    def drop(self) -> None:
        """Let go of weights, caches and buckets, and put heads back where they lay."""
        self._pieces = Pieces()
        self._shared, self.buckets = [], []
        self._tasks, self.caches = {}, {}
        self._order.release()

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

    def _make_caches_and_buckets(self) -> None:
        self.caches = {
            name: tuple(torch.zeros(shape, **self._options) for shape in shapes)
            for name, shapes in self.cache_shapes().items()
        }
        count = len(self.plan.buckets)
        if self.prune:
            self.buckets = [self.bucket(index, self.caches) for index in range(count)]
        else:
            parts = [*self._shared, *self._universal()]
            self.buckets = [PreparedBucket(parts, self._order)] * count

    def _is_split(self, module: AttentionModule) -> bool:
        """Whether the module gets text and image apart: a double block, not a single one."""
        return getattr(self._found[module.name], "add_q_proj", None) is not None

    def _inputs(self, module: AttentionModule) -> list[list[nn.Linear]]:
        """Give the Q, K, V projections of image (or both), and of text where it is apart."""
        attn = self._found[module.name]
        kinds = [QKV, TEXT_QKV] if self._is_split(module) else [QKV]
        return [[getattr(attn, name) for name in names] for names in kinds]

    def _outputs(self, module: AttentionModule) -> list[nn.Linear | None]:
        """Give the projections of [text, image], or of both in one."""
        attn = self._found[module.name]
        if getattr(attn, "pre_only", False):
            return [self._blocks[module.name].proj_out]
        if not self._is_split(module):
            return [attn.to_out[0]]
        return [None if attn.context_pre_only else attn.to_add_out, attn.to_out[0]]

    def _parts(
        self, bucket: int, caches: Mapping[str, tuple[Tensor, ...]]
    ) -> Iterator[tuple[Any, str, Any]]:
        reads, writes = self._flow.reads(bucket), self._flow.writes(bucket)
        for module in self.plan.modules:
            modes = self._placed.buckets[bucket].modes[module.name]
            heads = tuple(head for head, mode in enumerate(modes) if mode != CACHED)
            tasks = [(modes[head], i, -1) for i, head in enumerate(heads)]
            read = [group for group in reads if group.module == module.name]
            written = [group for group in writes if group.module == module.name]
            table = self._tensor(tasks)
            yield from self._module_parts(module, heads, table, read, written, caches)

    def _universal(self) -> Iterator[tuple[Any, str, Any]]:
        for module in self.plan.modules:
            rows = [
                self._tensor([(mode, head, -1) for head, mode in enumerate(b.modes[module.name])])
                for b in self._placed.buckets
            ]
            self._tasks[module.name] = [rows[0].clone(), *rows]
            heads = tuple(range(module.heads))
            table = self._tasks[module.name][0]
            yield from self._module_parts(module, heads, table, [], [], self.caches)

    def _module_parts(
        self,
        module: AttentionModule,
        heads: tuple[int, ...],
        tasks: Tensor,
        read: Sequence[CacheGroup],
        written: Sequence[CacheGroup],
        caches: Mapping[str, tuple[Tensor, ...]],
    ) -> Iterator[tuple[Any, str, Any]]:
        attn, block, dim = self._found[module.name], self._blocks[module.name], module.head_dim
        single = bool(getattr(attn, "pre_only", False))
        layers = self._outputs(module)
        kept = [caches[group.name] for group in read]
        rows, columns = self._pieces.rows, self._pieces.columns
        summed = [
            None
            if layer is None
            else SummedLinear(
                columns(layer, heads, dim, bias=not single), [cache[i] for cache in kept]
            )
            for i, layer in enumerate(layers)
        ]
        qkv, *text_qkv = (
            tuple(rows(layer, heads, dim) for layer in inputs) for inputs in self._inputs(module)
        )
        yield (
            attn,
            "processor",
            PreparedAttention(
                qkv=qkv,
                text_qkv=text_qkv[0] if text_qkv else (),
                tasks=tasks,
                writes=tuple(
                    self._contribution(module, layers, heads, group, caches[group.name])
                    for group in written
                ),
                outputs=() if single else tuple(summed),
                text_tokens=module.layout.text_tokens,
                text_first=module.layout.text_first,
                block=module.layout.block,
                head_dim=dim,
                heads=len(heads),
                cache=() if self.prune else caches[module.name],
            ),
        )
        if single and summed[0] is not None:
            rest = rest_of(block.proj_out, module.heads * dim)
            yield block, "forward", SingleBlock(block, summed[0], rest)

    def _contribution(
        self,
        module: AttentionModule,
        layers: Sequence[nn.Linear | None],
        heads: tuple[int, ...],
        group: CacheGroup,
        cache: tuple[Tensor, ...],
    ) -> Contribution:
        columns = tuple(
            None
            if layer is None
            else self._pieces.columns(layer, group.heads, module.head_dim, bias=False)
            for layer in layers
        )
        place = torch.tensor([heads.index(h) for h in group.heads], device=self._options["device"])
        return Contribution(columns, place, cache)

    def _tensor(self, tasks: Sequence[tuple[int, int, int]]) -> Tensor:
        device = self._options["device"]
        return torch.tensor(tasks, dtype=torch.int32, device=device).reshape(-1, 3)


def _gelu_parts(transformer: Any) -> list[tuple[Any, str, Any]]:
    """Put LinearGelu in the place of every projection that a tanh GELU follows."""
    parts: list[tuple[Any, str, Any]] = []
    for module in transformer.modules():
        first: Any = getattr(getattr(module, "net", None), "0", None)  # FeedForward
        if type(first).__name__ == "GELU" and getattr(first, "approximate", "") == "tanh":
            if first.proj.bias is not None:
                parts.append((module.net, "0", LinearGelu(first.proj)))
        elif hasattr(module, "proj_mlp") and isinstance(getattr(module, "act_mlp", None), nn.GELU):
            parts.append((module, "proj_mlp", LinearGelu(module.proj_mlp)))
            parts.append((module, "act_mlp", nn.Identity()))
    return parts
