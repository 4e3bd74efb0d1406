"""Fit the reader, the VAE and the T5 text encoder on drawn scenes."""

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
from transformers import T5EncoderModel

from tests.testbed import models, scenes
from tests.testbed.reader import EMPTY, PER_PICTURE, PER_PLACE, Reader
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


def _disagreement(answers: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    """Sum the cross entropies of all kinds of questions."""
    kinds = [
        F.cross_entropy(answers[kind].float().flatten(0, -2), target.flatten())
        for kind, target in targets.items()
    ]
    return torch.stack(kinds).sum()


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
        loss = _disagreement(answers, _reader_targets(batch, device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 200 == 0:
            print(f"reader {step} loss {loss.item():.5f}", flush=True)
    save_file({k: v.contiguous() for k, v in reader.state_dict().items()}, path)


class _Hearing(nn.Module):
    """Answer the reader's questions from words [n, T, width]: its logits, by kind."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.asked = nn.Parameter(torch.randn(GRID * GRID + 1, width))  # the last: the ground
        self.listen = nn.MultiheadAttention(width, 3, batch_first=True)
        self.heads = nn.ModuleDict(
            {kind: nn.Linear(width, n) for kind, n in (PER_PLACE | PER_PICTURE).items()}
        )

    def forward(self, words: Tensor) -> dict[str, Tensor]:
        asked = self.asked.expand(len(words), -1, -1)
        heard = self.listen(asked, words, words, need_weights=False)[0]
        return {
            kind: head(heard[:, :-1] if kind in PER_PLACE else heard[:, -1])
            for kind, head in self.heads.items()
        }


def fit_words(
    encoder: T5EncoderModel, t5_ids: Tensor, drawn: Scenes, minutes: float, device: str
) -> None:
    """Teach the text encoder what stands where, as pretraining does for the real T5.

    t5_ids: captions of `drawn`, [n, phrasings, T]. FLUX hears of the order of words from T5 alone;
    an encoder that starts from nothing keeps it from ever binding a shape to its own place.
    """
    encoder.to(device).train()
    hearing = _Hearing(encoder.config.d_model).to(device)
    params = [*encoder.parameters(), *hearing.parameters()]
    optimizer = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    targets = _reader_targets(drawn, device)
    clock, step = Clock(minutes), 0
    while clock.spent < 1:
        pick = torch.randint(len(t5_ids), (256,), device=device)
        phrasing = torch.randint(t5_ids.shape[1], (256,), device=device)
        optimizer.param_groups[0]["lr"] = 1e-3 * clock.rate(step)
        with torch.autocast(device, torch.bfloat16):
            answers = hearing(encoder(t5_ids[pick, phrasing])[0])
        loss = _disagreement(answers, {kind: target[pick] for kind, target in targets.items()})
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        step += 1
        if step % 200 == 0:
            print(f"words {step} loss {loss.item():.5f}", flush=True)


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
