"""Fit a pipeline's transformer and text encoders."""

from __future__ import annotations

import copy
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FluxPipeline
from torch import Tensor, nn
from torch.nn import functional as F

from tests.testbed import models, scenes
from tests.testbed.fit_parts import Clock, fit_words, follow
from tests.testbed.scenes import Scenes

CAPTION_DROPOUT = 0.1  # share of captions left out, for classifier-free guidance
GUIDANCE = 3.0


@dataclass(frozen=True)
class Stage:
    """A part of a pipeline's training.

    coarse: latents are averaged over coarse x coarse and batches are as many times coarse larger;
    guided: the aim is what the model so far says under classifier-free guidance.
    """

    share: float  # of the time
    coarse: int = 1
    guided: bool = False


# tiny-flux has no image positions but RoPE's, and needs many captions before it places a thing:
# it sees them on a quarter of the tokens. Like FLUX.1-dev it is then distilled from its own guided
# predictions, so that it draws with one row a picture.
STAGES = {
    "tiny-sd3": (Stage(1.0),),
    "tiny-flux": (Stage(0.35, coarse=2), Stage(0.4), Stage(0.25, guided=True)),
}
# Share of a batch at sigmas of 0.8..1, besides those drawn there: where the caption alone tells
# what is where, and the order of its words is learned.
LAYOUT_SHARE = {"tiny-sd3": 0.0, "tiny-flux": 0.25}


def _tokenized(pipe: DiffusionPipeline, drawn: Scenes, device: str) -> tuple[Tensor, Tensor]:
    """Token ids of two phrasings per scene, [n, 2, length]; and one empty caption at the end."""
    clip_ids, t5_ids = [], []
    for phrasing in range(2):
        said = drawn.take(np.arange(len(drawn)))
        said.phrasing = (drawn.phrasing + 0.5 * phrasing) % 1
        texts = [scenes.caption(scenes.facts(said, i)) for i in range(len(said))]
        clip, t5 = models.token_ids(pipe, texts)
        clip_ids.append(clip)
        t5_ids.append(t5)
    return torch.stack(clip_ids, 1).to(device), torch.stack(t5_ids, 1).to(device)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024), matrices of one shape orthogonalised in one batch.

    torch.optim.Muon takes them one by one: at this size that is a third of the step.
    """

    def __init__(self, matrices: list[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        group = self.param_groups[0]
        shapes: defaultdict[torch.Size, list[Tensor]] = defaultdict(list)
        for p in group["params"]:
            shapes[p.shape].append(p)
        for shape, params in shapes.items():
            grads = torch.stack([p.grad for p in params])
            speed = self.state[params[0]].setdefault("momentum", torch.zeros_like(grads))
            speed.lerp_(grads, 1 - group["momentum"])
            tall = shape[0] > shape[1]
            update = grads.lerp_(speed, group["momentum"]).bfloat16()
            update = update.mT if tall else update
            update /= update.norm(dim=(1, 2), keepdim=True) + 1e-7
            for _ in range(5):  # Newton-Schulz steps, coefficients of the reference
                gram = update @ update.mT
                gram = -4.7750 * gram + 2.0315 * gram @ gram
                update = 3.4445 * update + gram @ update
            scale = group["lr"] * 0.2 * math.sqrt(max(shape))  # the RMS of an AdamW step
            update = (update.mT if tall else update).float()
            torch._foreach_add_(params, list(update.unbind()), alpha=-scale)


def _optimizers(transformer: nn.Module, encoders: nn.ModuleList) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for everything else."""
    named = list(transformer.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and "transformer_blocks" in n]
    others = [p for n, p in named if not (p.ndim == 2 and "transformer_blocks" in n)]
    others += encoders.parameters()
    return [
        Muon(matrices, lr=3e-3),
        torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def velocity(
    pipe: DiffusionPipeline,
    transformer: nn.Module,
    noisy: Tensor,
    sigma: Tensor,
    text: tuple[Tensor, Tensor],
) -> Tensor:
    """Call the transformer as its pipeline does: noisy [B, 8, h, w], sigma [B] in 0..1.

    FLUX's positions are those of the whole picture's latents, whatever h and w.
    """
    sequence, pooled = text
    if not isinstance(pipe, FluxPipeline):
        return transformer(
            hidden_states=noisy,
            timestep=sigma * 1000,
            encoder_hidden_states=sequence,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
    b, c, h, w = noisy.shape
    positions = pipe._prepare_latent_image_ids(b, h // 2, w // 2, noisy.device, torch.float32)
    pitch = models.LATENT_SIDE // h
    positions = positions * pitch + (pitch - 1) / 2 * positions.new_tensor([0.0, 1.0, 1.0])
    packed = transformer(
        hidden_states=pipe._pack_latents(noisy, b, c, h, w),
        timestep=sigma,
        encoder_hidden_states=sequence,
        pooled_projections=pooled,
        txt_ids=torch.zeros(sequence.shape[1], 3, device=noisy.device),
        img_ids=positions,
        return_dict=False,
    )[0]
    return packed.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


class PipelineFit:
    """Fits a transformer and its text encoders by rectified flow (Esser et al., 2024), in stages.

    latents: [n, 8, 64, 64]; captions: their CLIP and T5 ids, [n, phrasings, length] each. The
    weights it leaves are a running average.
    """

    def __init__(
        self,
        name: str,
        pipe: DiffusionPipeline,
        latents: Tensor,
        captions: tuple[Tensor, Tensor],
        device: str,
        compiled: bool,
    ) -> None:
        self.name, self.pipe, self.device = name, pipe, device
        self.latents, self.captions = latents, captions
        self.no_caption = [ids.to(device) for ids in models.token_ids(pipe, [""])]
        self.transformer = pipe.transformer.to(device).train()
        self.encoders = models.text_encoders(pipe).to(device).train()
        self.trained = nn.ModuleList([self.transformer, self.encoders])
        self.average = copy.deepcopy(self.trained)
        self.optimizers = _optimizers(self.transformer, self.encoders)
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.compiled = compiled
        self._compile(self.transformer)

    def run(self, minutes: float, batch: int) -> None:
        clock, step, spent = Clock(minutes), 0, 0.0
        for stage in STAGES[self.name]:
            spent += stage.share
            teacher = None
            if stage.guided:
                self.trained.load_state_dict(self.average.state_dict())
                teacher = copy.deepcopy(self.trained).eval().requires_grad_(False)
                self._compile(teacher[0])
            while clock.spent < min(spent, 1):
                loss = self._loss(stage, batch * stage.coarse, teacher)
                self._update(loss, clock.rate(step))
                step += 1
                follow(self.average, self.trained, min(0.9995, step / (step + 10)))
                if step % 100 == 0:
                    seconds = clock.spent * clock.budget
                    print(f"{self.name} {step} loss {loss.item():.4f} {seconds:.0f} s", flush=True)
        self.trained.load_state_dict(self.average.state_dict())

    def _compile(self, transformer: nn.Module) -> None:
        """Compile block by block: all blocks of a kind share what is made for the first."""
        singles = getattr(transformer, "single_transformer_blocks", ())
        for block in (*transformer.transformer_blocks, *singles):
            if self.compiled:
                block.compile(dynamic=False)

    def _update(self, loss: Tensor, rate: float) -> None:
        for optimizer, full in zip(self.optimizers, self.rates, strict=True):
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = full * rate
        loss.backward()
        nn.utils.clip_grad_norm_(self.transformer.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()

    def _loss(self, stage: Stage, batch: int, teacher: nn.ModuleList | None) -> Tensor:
        device, config = self.device, self.pipe.vae.config
        pick = torch.randint(len(self.latents), (batch,), device=device)
        phrasing = torch.randint(2, (batch,), device=device)
        said = [ids[pick, phrasing] for ids in self.captions]
        left_out = torch.rand(batch, 1, device=device) < (0 if stage.guided else CAPTION_DROPOUT)
        clean = (self.latents[pick].float() - config.shift_factor) * config.scaling_factor
        clean = F.avg_pool2d(clean, stage.coarse)
        noise = torch.randn_like(clean)
        sigma = torch.sigmoid(torch.randn(batch, device=device) + 0.5)
        sigma[: int(LAYOUT_SHARE[self.name] * batch)].uniform_(0.8, 1)
        noisy = clean.lerp(noise, sigma[:, None, None, None])
        with torch.autocast(device, torch.bfloat16):
            aim = noise - clean
            if teacher is not None:
                aim = self._guided(teacher, noisy, sigma, said)
            guess = self._guess(self.trained, noisy, sigma, said, left_out)
        return F.mse_loss(guess.float(), aim)

    def _guess(
        self,
        trained: nn.ModuleList,
        noisy: Tensor,
        sigma: Tensor,
        said: list[Tensor],
        left_out: Tensor,
    ) -> Tensor:
        transformer, encoders = trained
        clip, t5 = (
            torch.where(left_out, nothing, ids)
            for nothing, ids in zip(self.no_caption, said, strict=True)
        )
        text = models.encode_text(encoders, clip, t5)
        return velocity(self.pipe, transformer, noisy, sigma, text)

    @torch.no_grad()
    def _guided(
        self, teacher: nn.ModuleList, noisy: Tensor, sigma: Tensor, said: list[Tensor]
    ) -> Tensor:
        """Classifier-free guidance (Ho & Salimans, 2022) as SD3's pipeline does it."""
        with_caption, without = (
            self._guess(teacher, noisy, sigma, said, torch.full_like(sigma[:, None], b).bool())
            for b in (False, True)
        )
        return without.float().lerp(with_caption.float(), GUIDANCE)


def start_pipeline(name: str, vae: AutoencoderKL, folder: Path) -> DiffusionPipeline:
    """Load `folder`/name to train it on, or save and load a new one: saving fixes its words."""
    start = folder / name
    if not start.exists():
        start = folder / f"{name}-untrained"
        models.make_pipeline(name, vae).save_pretrained(start)
    return DiffusionPipeline.from_pretrained(str(start), torch_dtype=torch.float32)


def fit_pipeline(
    name: str,
    vae: AutoencoderKL,
    data: tuple[Scenes, Tensor],
    folder: Path,
    *,
    minutes: float,
    word_minutes: float,
    device: str,
    batch: int,
    compiled: bool,
) -> None:
    """Train `folder`/name, and save it there in fp16 with a few captions to calibrate plans on."""
    torch.manual_seed(0)
    drawn, latents = data
    pipe = start_pipeline(name, vae, folder)
    captions = _tokenized(pipe, drawn, device)
    if name == "tiny-flux" and not (folder / name).exists():
        fit_words(pipe.text_encoder_2, captions[1], drawn, word_minutes, device)
    PipelineFit(name, pipe, latents, captions, device, compiled).run(minutes, batch)
    pipe.to("cpu", torch.float16).save_pretrained(folder / name)
    for path in (folder / name).rglob("*.json"):  # where it was trained is nobody's business
        path.write_text(re.sub(r'\s*"_name_or_path": ".*",', "", path.read_text()))
    texts = [scenes.caption(scenes.facts(drawn, i)) for i in range(8)]
    (folder / name / "calibration_prompts.txt").write_text("\n".join(texts) + "\n")
