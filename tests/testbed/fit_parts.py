"""Fit the reader and the VAE on drawn scenes."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tests.testbed import models, scenes
from tests.testbed.reader import EMPTY, Reader
from tests.testbed.scenes import GRID, MAX_OBJECTS, Scenes


class Clock:
    """The share of a time budget that is spent, and the learning-rate factor at it."""

    def __init__(self, minutes: float) -> None:
        self.start, self.budget = time.monotonic(), minutes * 60

    @property
    def spent(self) -> float:
        return (time.monotonic() - self.start) / self.budget

    def rate(self, step: int, decay_from: float = 0.6) -> float:
        left = (1 - self.spent) / (1 - decay_from)
        return min(1.0, (step + 1) / 200) * min(1.0, max(left, 0.0))


def _reader_targets(batch: Scenes, device: str) -> dict[str, Tensor]:
    rows = np.arange(len(batch))
    per_place = {"shape": EMPTY, "colour": -100, "size": -100}  # -100: not asked of empty places
    found = {kind: np.full((len(batch), GRID * GRID), fill) for kind, fill in per_place.items()}
    for j in range(MAX_OBJECTS):
        here = rows[j < batch.count]
        for kind in found:
            found[kind][here, batch.cell[here, j]] = getattr(batch, kind)[here, j]
    found |= {"texture": batch.texture, "ground": batch.ground}
    return {kind: torch.as_tensor(v, device=device, dtype=torch.long) for kind, v in found.items()}


def _blemish(pictures: Tensor) -> Tensor:
    """Soften, tint and add noise, so that the reader also reads a decoder's softer pictures."""
    n = len(pictures)
    soft = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = torch.rand(n, 1, 1, 1, device=pictures.device)
    tint = 1 + 0.06 * torch.randn(n, 3, 1, 1, device=pictures.device)
    grain = 0.06 * torch.rand(n, 1, 1, 1, device=pictures.device)
    return (pictures.lerp(soft, share) * tint + grain * torch.randn_like(pictures)).clamp(-1, 1)


def fit_reader(path: Path, minutes: float, device: str) -> None:
    reader = Reader().to(device).train()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3, weight_decay=1e-3)
    clock, step = Clock(minutes), 0
    while clock.spent < 1:
        batch = scenes.sample_scenes(192, seed=10_000 + step)
        optimizer.param_groups[0]["lr"] = 3e-3 * clock.rate(step, 0.3)
        with torch.autocast(device, torch.bfloat16):
            answers = reader(_blemish(scenes.render(batch, device)))
        loss = sum(
            F.cross_entropy(answers[kind].float().flatten(0, -2), target.flatten())
            for kind, target in _reader_targets(batch, device).items()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 200 == 0:
            print(f"reader {step} loss {loss.item():.5f}", flush=True)
    save_file({k: v.contiguous() for k, v in reader.state_dict().items()}, path)


def fit_vae(folder: Path, minutes: float, device: str) -> None:
    vae = models.make_vae().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0)
    average = copy.deepcopy(vae)
    clock, step = Clock(minutes), 0
    while clock.spent < 1:
        picture = scenes.render(scenes.sample_scenes(48, seed=20_000 + step), device)
        picture = picture.contiguous(memory_format=torch.channels_last)
        optimizer.param_groups[0]["lr"] = 1e-3 * clock.rate(step, 0.4)
        with torch.autocast(device, torch.bfloat16):
            posterior = vae.encode(picture).latent_dist
            drawn = vae.decode(posterior.sample()).sample.float()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = F.l1_loss(drawn, picture) + 2 * F.mse_loss(drawn, picture) + 1e-3 * kl
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        follow(average, vae, min(0.999, step / (step + 10)))
        step += 1
        if step % 100 == 0:
            psnr = 10 * math.log10(4 / F.mse_loss(drawn, picture).item())
            print(f"vae {step} psnr {psnr:.2f} kl {kl.item():.3f}", flush=True)
    latents = torch.cat(list(encode_scenes(average, scenes.sample_scenes(2000, seed=1), device)))
    average.register_to_config(
        scaling_factor=1 / latents.float().std().item(), shift_factor=latents.float().mean().item()
    )
    average.to("cpu", torch.float32, memory_format=torch.contiguous_format).save_pretrained(folder)


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    ours, theirs = list(average.parameters()), list(model.parameters())
    torch._foreach_lerp_(ours, theirs, 1 - decay)


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, drawn: Scenes, device: str) -> Iterator[Tensor]:
    """Yield latents [n, 8, 64, 64], bf16, of the scenes in batches."""
    for first in range(0, len(drawn), 250):
        batch = drawn.take(np.arange(first, min(first + 250, len(drawn))))
        picture = scenes.render(batch, device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            yield vae.encode(picture).latent_dist.mean.to(torch.bfloat16)
