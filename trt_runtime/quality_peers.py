"""Step-caching peers on a pipeline, run from their own packages."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

FIRST_BLOCK = "transformer_blocks.0."  # what FirstBlockCache decides by, of SD3 and FLUX


def missing_peers() -> dict[str, str]:
    """Name the peers that cannot run here, with the reason."""
    try:
        _cache_dit()
    except ModuleNotFoundError as error:
        if error.name != "cache_dit":
            return {"dbcache": f"cache-dit does not load: {error}"}
        return {"dbcache": "cache-dit is not installed: pip install 'arrowhead[peers]'"}
    except (ImportError, OSError, RuntimeError) as error:
        return {"dbcache": f"cache-dit does not load: {error}"}
    return {}


def _cache_dit() -> Any:
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")  # read when it is imported
    return importlib.import_module("cache_dit")


@contextmanager
def first_block_cache(pipe: Any, threshold: float) -> Iterator[None]:
    """Run diffusers' FirstBlockCache inside the `with`, each pipeline call from an empty cache.

    The hooks are the package's. SD3's transformer, which it does not offer them for, gets what
    FLUX's has: a cache context, a reset, and text beside the image from the last block too.
    """
    from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, apply_first_block_cache
    from diffusers.hooks import first_block_cache as hooks
    from diffusers.models.cache_utils import CacheMixin

    transformer = pipe.transformer
    registry = HookRegistry.check_if_exists_or_initialize(transformer)

    def reset(*_: Any) -> None:
        if pipe.scheduler.step_index is None:
            registry.reset_stateful_hooks(recurse=True)

    with ExitStack() as stack:
        for block in _text_enders(transformer):
            stack.enter_context(_forward(block, partial(_with_text, block.forward)))
        apply_first_block_cache(transformer, FirstBlockCacheConfig(threshold=threshold))
        for name in (hooks._FBC_LEADER_BLOCK_HOOK, hooks._FBC_BLOCK_HOOK):
            stack.callback(registry.remove_hook, name, recurse=True)
        stack.enter_context(
            _forward(
                transformer, partial(_in_context, CacheMixin, transformer, transformer.forward)
            )
        )
        stack.callback(transformer.register_forward_pre_hook(reset).remove)
        # What earlier contexts found of hooks is kept by newer versions: look for them anew.
        getattr(registry, "invalidate_child_registries_cache", lambda: None)()
        yield


@contextmanager
def dbcache(pipe: Any, threshold: float) -> Iterator[None]:
    """Run cache-dit's DBCache inside the `with`: one block before, one after, one warm-up step.

    With none after it is FirstBlockCache over again, to the last bit.
    """
    cache_dit = _cache_dit()
    cache_dit.enable_cache(
        pipe,
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=1, max_warmup_steps=1,
            residual_diff_threshold=threshold,
        ),
    )  # fmt: skip
    try:
        yield
    finally:
        cache_dit.disable_cache(pipe)


def _text_enders(transformer: nn.Module) -> list[Any]:
    blocks: Any = getattr(transformer, "transformer_blocks", [])
    return [block for block in blocks if getattr(block, "context_pre_only", False)]


def _with_text(forward: Callable[..., Any], *args: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
    """Return the text as it came where SD3's last block returns none; nobody reads it."""
    text, image = forward(*args, **inputs)
    return inputs["encoder_hidden_states"] if text is None else text, image


def _in_context(
    mixin: Any, transformer: Any, forward: Callable[..., Any], *a: Any, **k: Any
) -> Any:
    with mixin.cache_context(transformer, "cond"):
        return forward(*a, **k)


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give one module another forward inside the `with`."""
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
