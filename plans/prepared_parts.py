"""The parts of a prepared bucket: pieces of projections, and an attention processor of them.

Everything that differs between modules is a tensor, so that one compiled graph serves them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plans import ops
from plans.head_order import is_run

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


class SingleBlock:
    """Forward of a FLUX single block without the concatenation of attention and MLP.

    Their parts of the output projection are two multiplications, so that neither output is copied.
    """

    def __init__(self, block: Any, attention_out: SummedLinear, mlp_out: Linear) -> None:
        self.block = block
        self.attention_out = attention_out
        self.mlp_out = mlp_out

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        text_tokens = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        normed, gate = self.block.norm(x, emb=temb)
        mlp = self.block.act_mlp(self.block.proj_mlp(normed))
        attended = self.block.attn(
            hidden_states=normed,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        x = x + gate.unsqueeze(1) * (self.mlp_out(mlp) + self.attention_out(attended))
        if x.dtype == torch.float16:
            x = x.clip(-65504, 65504)
        return x[:, :text_tokens], x[:, text_tokens:]


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


def rows_of(layer: nn.Linear, heads: tuple[int, ...], head_dim: int) -> Linear:
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    index = _channels(heads, head_dim, weight.device)
    return Linear(weight[index], None if bias is None else bias[index])


def columns_of(layer: nn.Linear, heads: tuple[int, ...], head_dim: int, *, bias: bool) -> Linear:
    """Take the input channels of `heads`; they come first in FLUX's projection of both."""
    own = layer.bias.detach() if bias and layer.bias is not None else None
    weight = layer.weight.detach()
    return Linear(weight[:, _channels(heads, head_dim, weight.device)], own)


class Pieces:
    """Rows and columns of projections, each taken once, whatever takes them."""

    def __init__(self) -> None:
        # The layer is kept with its piece: an id is of use only while what it names lives.
        self._taken: dict[tuple[Any, ...], tuple[nn.Linear, Linear]] = {}

    def rows(self, layer: nn.Linear, heads: tuple[int, ...], head_dim: int) -> Linear:
        key = ("rows", id(layer), heads)
        if key not in self._taken:
            self._taken[key] = (layer, rows_of(layer, heads, head_dim))
        return self._taken[key][1]

    def columns(
        self, layer: nn.Linear, heads: tuple[int, ...], head_dim: int, *, bias: bool
    ) -> Linear:
        key = ("columns", id(layer), heads, bias)
        if key not in self._taken:
            self._taken[key] = (layer, columns_of(layer, heads, head_dim, bias=bias))
        return self._taken[key][1]

    def copied_bytes(self) -> int:
        """Bytes of the pieces that are not the layer's own memory."""
        return sum(
            part.nbytes
            for layer, piece in self._taken.values()
            for part, whole in ((piece.weight, layer.weight), (piece.bias, layer.bias))
            if part is not None and _memory(part) != _memory(whole)
        )


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def rest_of(layer: nn.Linear, width: int) -> Linear:
    """Take the input channels after the first `width`, where they lie, and the bias."""
    return Linear(layer.weight.detach()[:, width:], layer.bias.detach())


def _channels(heads: tuple[int, ...], head_dim: int, device: torch.device) -> slice | Tensor:
    """Index the channels of heads: a slice, which copies nothing, where they are one run."""
    if not heads or is_run(heads):
        first = heads[0] if heads else 0
        return slice(first * head_dim, (first + len(heads)) * head_dim)
    start = torch.tensor(heads, dtype=torch.long, device=device)[:, None] * head_dim
    return (start + torch.arange(head_dim, device=device)).flatten()


def _normalise(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    from diffusers.models.embeddings import apply_rotary_emb

    return apply_rotary_emb(x, tables, sequence_dim=1)
