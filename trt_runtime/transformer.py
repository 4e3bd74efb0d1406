"""Bucket engines in the place of a diffusers pipeline's transformer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from plans.bundle import Bundle
from plans.errors import ArrowheadError
from plans.plan import Plan
from trt_runtime.denoise import DenoiseState
from trt_runtime.engine import CACHE_IN, DTYPES, Engine, shape_of
from trt_runtime.torch_engine import position_ids

_REFUSED = {
    "block_controlnet_hidden_states": "ControlNet residuals",
    "controlnet_block_samples": "ControlNet residuals",
    "controlnet_single_block_samples": "ControlNet residuals",
    "skip_layers": "skip_layers (skip-layer guidance)",
}


class ArrowheadTransformer(nn.Module):
    """What the pipelines touch of a transformer, without parameters: config, dtype, device, call.

    Made by `load_transformer`; counts steps only once `attach` has put it into a pipeline. Use one
    for one pipeline and one thread at a time. Every contract breach is an ArrowheadError.
    """

    timestep_scale = 1.0
    prompt_context = "default"

    def __init__(
        self, bundle: Bundle, plan: Plan, engines: Mapping[int, Engine], *, poison: bool = False
    ) -> None:
        super().__init__()
        from diffusers.configuration_utils import FrozenDict

        self.bundle = bundle
        self.plan = plan
        self.config = FrozenDict(bundle.config)
        self.on_mismatch = "error"
        self.undo_attach: Callable[[], None] | None = None
        self._context = "default"
        self._stack = ExitStack()
        try:
            for engine in engines.values():
                self._stack.enter_context(engine)
        except BaseException:
            self._stack.close()
            raise
        self.engines = dict(engines)
        self.state = DenoiseState(plan, bundle, self.engines, poison=poison)
        first = self.engines[plan.schedule[0]]
        self._inputs = {
            spec.name: spec for spec in first.inputs if not spec.name.startswith(CACHE_IN)
        }

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.bundle.dtype]

    @property
    def device(self) -> torch.device:
        return next(iter(self.engines.values())).device

    @contextmanager
    def cache_context(self, name: str, **_: Any) -> Iterator[None]:
        """Name the calls inside: each name has its own step count and caches."""
        before, self._context = self._context, name
        try:
            yield
        finally:
            self._context = before

    def reset(self) -> None:
        """Forget the run in progress; the next call must follow a set_timesteps."""
        self.state.reset()

    _reset_stateful_cache = reset

    def prepare(self) -> None:
        """Allocate, compile and capture what the pipeline's calls need, before the first of them.

        For the context of the calls with the prompt; FLUX's true CFG prepares its second one at
        its first step.
        """
        self.reset()
        self.state.prepare(self.prompt_context)

    def close(self) -> None:
        """Release engines, weights and caches."""
        self.state.release()
        self._stack.close()

    def load_lora_adapter(self, *_: Any, **__: Any) -> NoReturn:
        refuse_lora()

    add_adapter = set_adapters = fuse_lora = load_lora_adapter

    def _load_ip_adapter_weights(self, *_: Any, **__: Any) -> NoReturn:
        _refuse_ip_adapter()

    def denoise(
        self,
        arguments: Mapping[str, Tensor | None],
        *,
        joint_attention_kwargs: Mapping[str, Any] | None,
        return_dict: bool,
        refused: Mapping[str, Any],
        positions: Mapping[str, Tensor | None] | None = None,
    ) -> Any:
        """Check one call, run it, and give a fresh tensor; any exception resets the state.

        positions: img_ids and txt_ids, which are constants of the graph.
        """
        try:
            self._check(arguments, joint_attention_kwargs, refused)
            if positions:
                self._check_positions(positions)
            given = {n: t for n, t in arguments.items() if n in self._inputs and t is not None}
            buffer = self.state.run(self._context, given, timestep_scale=self.timestep_scale)
        except BaseException:
            self.reset()
            raise
        # A copy: schedulers keep both the sample and the latents it was made from.
        source = given["hidden_states"]
        sample = buffer.to(device=source.device, dtype=source.dtype, copy=True)
        if not return_dict:
            return (sample,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=sample)

    def _check(
        self,
        arguments: Mapping[str, Tensor | None],
        joint_attention_kwargs: Mapping[str, Any] | None,
        refused: Mapping[str, Any],
    ) -> None:
        for name, value in refused.items():
            if value is not None:
                raise ArrowheadError(
                    _REFUSED[name],
                    got=f"the argument {name}",
                    expected="none: the exported graph has no such input",
                    fix="drop it, or use the diffusers transformer (trt_runtime.detach)",
                )
        if joint_attention_kwargs:
            _refuse_kwargs(joint_attention_kwargs)
        if getattr(self, "peft_config", None):
            refuse_lora()
        if not self.state.started:
            raise ArrowheadError(
                "transformer call",
                got="no scheduler.set_timesteps since it was attached, last reset or failed",
                expected="a run begun by the attached pipeline's scheduler",
                fix="trt_runtime.attach(pipe, folder), after any change of pipe.scheduler, "
                "then call the pipeline",
            )
        latents = arguments.get("hidden_states")
        rows = self.bundle.batch if latents is None or latents.dim() == 0 else latents.shape[0]
        if rows not in self.bundle.rows:
            self._refuse_rows(rows)
        for name, spec in self._inputs.items():
            tensor, expected = arguments.get(name), shape_of(spec, rows)
            if tensor is None or tuple(tensor.shape) != expected:
                self._refuse_shape(name, tensor, expected)

    def _refuse_rows(self, rows: int) -> NoReturn:
        taken = self.bundle.rows
        some = f"{taken[0]} to {taken[-1]}" if len(taken) > 1 else f"{taken[0]}, a fixed number"
        raise ArrowheadError(
            "rows of hidden_states",
            got=rows,
            expected=f"{some}: two a picture under classifier-free guidance, else one",
            fix="ask for as many pictures as this bundle takes, or export another with --batch "
            f"{rows} or a --batch-range that has it",
        )

    def _refuse_shape(
        self, name: str, tensor: Tensor | None, expected: tuple[int, ...]
    ) -> NoReturn:
        got = "nothing" if tensor is None else list(tensor.shape)
        subject, fix = f"input {name}", "pass what the pipeline this bundle was made for passes"
        if tensor is not None and tensor.dim() == len(expected):
            if tensor.shape[0] != expected[0]:
                subject, fix = f"rows of {name}", "pass as many as hidden_states has"
            elif name == "encoder_hidden_states":
                subject = "text length"
                fix = "set max_sequence_length as trt_runtime.pipeline_kwargs(plan, pipe) gives it"
            elif name == "hidden_states":
                subject = "picture size"
                fix = (
                    f"pass height={self.plan.height}, width={self.plan.width}, or search and "
                    "export a plan for this size"
                )
        raise ArrowheadError(subject, got=got, expected=list(expected), fix=fix)

    def _check_positions(self, positions: Mapping[str, Tensor | None]) -> None:
        if self.state.step_of(self._context) != 0:
            return
        for name, expected in position_ids(self.plan).items():
            got = positions[name]
            if got is not None and got.dim() == 3:
                got = got[0]  # the form diffusers deprecates
            if got is None or not torch.equal(got.float().cpu(), expected):
                raise ArrowheadError(
                    f"input {name}",
                    got="nothing" if got is None else f"other values, shape {list(got.shape)}",
                    expected=f"the positions of a {self.plan.height} x {self.plan.width} picture, "
                    "which are constants of the graph",
                    fix="use FluxPipeline as it is; pipelines that place several pictures in one "
                    "sequence are not supported",
                )


class ArrowheadSD3Transformer(ArrowheadTransformer):
    """In the place of SD3Transformer2DModel."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        timestep: Tensor | None = None,
        block_controlnet_hidden_states: list[Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        skip_layers: list[int] | None = None,
    ) -> Any:
        """Denoise latents [B, C, h, w] with text [B, T, E]; as SD3Transformer2DModel.forward."""
        return self.denoise(
            {
                "hidden_states": hidden_states,
                "encoder_hidden_states": encoder_hidden_states,
                "pooled_projections": pooled_projections,
                "timestep": timestep,
            },
            joint_attention_kwargs=joint_attention_kwargs,
            return_dict=return_dict,
            refused={
                "block_controlnet_hidden_states": block_controlnet_hidden_states,
                "skip_layers": skip_layers,
            },
        )


class ArrowheadFluxTransformer(ArrowheadTransformer):
    """In the place of FluxTransformer2DModel."""

    timestep_scale = 1e-3  # FluxPipeline passes timestep / 1000
    prompt_context = "cond"

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        timestep: Tensor | None = None,
        img_ids: Tensor | None = None,
        txt_ids: Tensor | None = None,
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: list[Tensor] | None = None,
        controlnet_single_block_samples: list[Tensor] | None = None,
        return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
    ) -> Any:
        """Denoise latents [B, V, C] with text [B, T, E]; as FluxTransformer2DModel.forward."""
        return self.denoise(
            {
                "hidden_states": hidden_states,
                "encoder_hidden_states": encoder_hidden_states,
                "pooled_projections": pooled_projections,
                "timestep": timestep,
                "guidance": guidance,
            },
            joint_attention_kwargs=joint_attention_kwargs,
            return_dict=return_dict,
            refused={
                "controlnet_block_samples": controlnet_block_samples,
                "controlnet_single_block_samples": controlnet_single_block_samples,
            },
            positions={"img_ids": img_ids, "txt_ids": txt_ids},
        )


TRANSFORMERS: dict[str, type[ArrowheadTransformer]] = {
    "SD3Transformer2DModel": ArrowheadSD3Transformer,
    "FluxTransformer2DModel": ArrowheadFluxTransformer,
}


def refuse_lora(*_: Any, **__: Any) -> NoReturn:
    """Raise the error for a LoRA on weights that are frozen in graphs."""
    raise ArrowheadError(
        "LoRA",
        got="an adapter for the exported transformer",
        expected="none: its weights are in the graphs",
        fix="fuse it before the export (pipe.fuse_lora(), pipe.unload_lora_weights(), "
        "pipe.save_pretrained) and export that checkpoint",
    )


def _refuse_ip_adapter() -> NoReturn:
    raise ArrowheadError(
        "IP-Adapter",
        got="image prompt embeddings",
        expected="text prompts only: the exported graph has no such input",
        fix="drop ip_adapter_image, or use the diffusers transformer (trt_runtime.detach)",
    )


def _refuse_kwargs(kwargs: Mapping[str, Any]) -> NoReturn:
    if any("ip_adapter" in key or "ip_hidden" in key for key in kwargs):
        _refuse_ip_adapter()
    if set(kwargs) == {"scale"}:
        refuse_lora()
    raise ArrowheadError(
        "joint_attention_kwargs",
        got=f"{sorted(kwargs)}",
        expected="none: the exported graph has no such inputs",
        fix="drop them, or use the diffusers transformer (trt_runtime.detach)",
    )
