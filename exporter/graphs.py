"""One bucket of a plan to one ONNX graph."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from exporter.functions import OPSET
from exporter.passes import add_functions, tidy
from exporter.translations import custom_translations
from plans.bundle import BatchRange
from plans.models import FLUX, SD3
from plans.plan import CacheGroup, Plan, cache_flow
from plans.processors import BucketHeads, install

CACHE_IN = "cache_in."
CACHE_OUT = "cache_out."


def shadow(transformer: nn.Module, dtype: torch.dtype) -> Any:
    """Copy the module tree for patching, on the CPU and in `dtype`.

    Tensors that are so already are shared with the original, not copied.
    """
    memo: dict[int, Any] = {}
    for tensor in (*transformer.parameters(), *transformer.buffers()):
        wanted = dtype if tensor.is_floating_point() else tensor.dtype
        moved = tensor.detach().to("cpu", wanted).contiguous()
        if isinstance(tensor, nn.Parameter):
            moved = nn.Parameter(moved, requires_grad=False)
        memo[id(tensor)] = moved
    return copy.deepcopy(transformer, memo).eval()


def fix_positions(transformer: Any, plan: Plan) -> None:
    """Make the position tables of the plan's picture size constants of a shadow.

    FLUX's rotary tables stay fp32: they are computed in float64, which TensorRT has not, and
    rounding them to the model's dtype would move positions.
    """
    if type(transformer).__name__ == FLUX:
        with torch.no_grad():
            transformer.pos_embed = _RotaryTables(*transformer.pos_embed(position_ids(plan)))
    elif transformer.pos_embed.pos_embed_max_size is not None:
        embed = transformer.pos_embed
        side = plan.vae_scale_factor
        table = embed.cropped_pos_embed(plan.height // side, plan.width // side).contiguous()
        embed.register_buffer("cropped", table, persistent=False)
        embed.cropped_pos_embed = lambda height, width: embed.cropped


class _RotaryTables(nn.Module):
    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        super().__init__()
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.get_buffer("cos"), self.get_buffer("sin")


def position_ids(plan: Plan) -> Tensor:
    """FLUX's position of each token, text first: [S, 3], row and column of the packed latent."""
    packed = 2 * plan.vae_scale_factor  # pixels a side of one token
    rows, columns = plan.height // packed, plan.width // packed
    ids = torch.zeros(plan.text_tokens + rows * columns, 3)
    ids[plan.text_tokens :, 1] = torch.arange(rows).repeat_interleave(columns)
    ids[plan.text_tokens :, 2] = torch.arange(columns).repeat(rows)
    return ids


def step_inputs(
    plan: Plan, config: Mapping[str, Any], batch: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Zeros in the shapes and dtypes diffusers' pipelines call the transformer with."""
    text = (batch, plan.text_tokens, config["joint_attention_dim"])
    inputs = {
        "encoder_hidden_states": torch.zeros(text, dtype=dtype),
        "pooled_projections": torch.zeros(batch, config["pooled_projection_dim"], dtype=dtype),
    }
    height, width = plan.height // plan.vae_scale_factor, plan.width // plan.vae_scale_factor
    latents: tuple[int, ...]
    if plan.model.architecture == SD3:
        latents = (batch, config["in_channels"], height, width)
        inputs["timestep"] = torch.zeros(batch)
    else:
        latents = (batch, (height // 2) * (width // 2), config["in_channels"])
        inputs["timestep"] = torch.zeros(batch, dtype=dtype)
        if config.get("guidance_embeds"):
            inputs["guidance"] = torch.zeros(batch)
    return {"hidden_states": torch.zeros(latents, dtype=dtype), **inputs}


def cache_shape(plan: Plan, group: CacheGroup, batch: int) -> tuple[int, int, int, int]:
    """[B, S, Hg, D] of one cache group."""
    module = next(module for module in plan.modules if module.name == group.module)
    return (batch, module.layout.seq_len, len(group.heads), module.head_dim)


def bucket_graph(
    transformer: Any,
    plan: Plan,
    bucket: int,
    inputs: dict[str, Tensor],
    rows: BatchRange | None = None,
) -> ir.Model:
    """Trace a shadow with one bucket's heads; inputs as step_inputs gives them.

    rows: the batch is dynamic, within these bounds; None fixes that of the inputs.
    """
    flow, heads = cache_flow(plan), BucketHeads(plan, bucket)
    reads, writes = flow.reads(bucket), flow.writes(bucket)
    sample = inputs["hidden_states"]
    caches = {
        CACHE_IN + group.name: torch.zeros(
            cache_shape(plan, group, sample.shape[0]), dtype=sample.dtype
        )
        for group in reads
    }
    undo = install(transformer, plan.modules, heads)
    try:
        call = _Call(transformer, plan, list(inputs), heads, reads, writes)
        names = ["sample", *(CACHE_OUT + group.name for group in writes)]
        model = _trace(call, {**inputs, **caches}, names, rows)
    finally:
        undo()
    add_functions(model)
    return model


def dense_graph(
    transformer: Any, plan: Plan, inputs: dict[str, Tensor], rows: BatchRange | None = None
) -> ir.Model:
    """Trace a shadow with its own processors, by the stock translations."""
    call = _Call(transformer, plan, list(inputs), None, (), ())
    return _trace(call, inputs, ["sample"], rows, stock=True)


class _Call(nn.Module):
    """The transformer with tensors in and tensors out, in the order of the graph's inputs."""

    def __init__(
        self,
        transformer: nn.Module,
        plan: Plan,
        names: Sequence[str],
        heads: BucketHeads | None,
        reads: Sequence[CacheGroup],
        writes: Sequence[CacheGroup],
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.names, self.heads, self.reads, self.writes = names, heads, reads, writes
        self.ids: dict[str, Tensor] = {}
        if type(transformer).__name__ == FLUX:
            ids, text = position_ids(plan), plan.text_tokens
            self.ids = {"txt_ids": ids[:text], "img_ids": ids[text:]}

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = dict(zip(self.names, tensors, strict=False))
        if self.heads is not None:
            caches = tensors[len(self.names) :]
            names = [group.name for group in self.reads]
            self.heads.cache_in = dict(zip(names, caches, strict=True))
            self.heads.cache_out = {}
        sample = self.transformer(**inputs, **self.ids, return_dict=False)[0]
        if self.heads is None:
            return (sample,)
        return (sample, *(self.heads.cache_out[group.name] for group in self.writes))


def _trace(
    call: nn.Module,
    inputs: dict[str, Tensor],
    outputs: Sequence[str],
    rows: BatchRange | None,
    *,
    stock: bool = False,
) -> ir.Model:
    dynamic = None
    if rows is not None:
        batch = torch.export.Dim("batch", min=rows.min, max=rows.max)
        dynamic = {"tensors": tuple({0: batch} for _ in inputs)}
    with torch.no_grad(), _quiet():
        program = torch.export.export(
            call.eval(), tuple(inputs.values()), dynamic_shapes=dynamic, strict=False
        )
        exported = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,  # `tidy` does it, with weights left alone
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            custom_translation_table={} if stock else custom_translations(),
            verbose=False,
        )
    assert exported is not None
    tidy(exported.model)
    return exported.model


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporter says of packages that no graph of ours uses."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
