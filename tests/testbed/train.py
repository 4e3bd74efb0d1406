"""Train the reader, the VAE and the two pipelines from nothing but drawn scenes.

    python -m tests.testbed.train --out build/testbed --minutes 9

On one H200 the whole takes about 25 minutes. A stage whose result exists is skipped (`--more`
trains a finished pipeline further); the pipelines are in diffusers' saved format, fp16.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from tests.testbed import models, scenes
from tests.testbed.fit_parts import encode_scenes, fit_reader, fit_vae
from tests.testbed.fit_pipeline import fit_pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/testbed"))
    parser.add_argument("--minutes", type=float, default=9.0, help="for each pipeline")
    parser.add_argument("--word-minutes", type=float, default=0.5, help="for tiny-flux's T5")
    parser.add_argument("--vae-minutes", type=float, default=2.0)
    parser.add_argument("--reader-minutes", type=float, default=0.7)
    parser.add_argument("--scenes", type=int, default=120_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--only", choices=models.NAMES, nargs="*", default=models.NAMES)
    parser.add_argument("--more", action="store_true", help="train finished pipelines further")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    # The backward pass of cuDNN 9.19's attention reads out of bounds at FLUX's 1073 tokens.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.manual_seed(0)
    if not (args.out / "reader.safetensors").exists():
        fit_reader(args.out / "reader.safetensors", args.reader_minutes, args.device)
    if not (args.out / "vae").exists():
        fit_vae(args.out / "vae", args.vae_minutes, args.device)
    vae = AutoencoderKL.from_pretrained(args.out / "vae")
    todo = [name for name in args.only if args.more or not (args.out / name).exists()]
    if todo:
        drawn = scenes.sample_scenes(args.scenes, seed=0)
        on_device = copy.deepcopy(vae).to(args.device, memory_format=torch.channels_last)
        latents = torch.cat(list(encode_scenes(on_device, drawn, args.device)))
        print(f"{len(latents)} latents", flush=True)
    for name in todo:
        fit_pipeline(
            name,
            copy.deepcopy(vae),
            (drawn, latents),
            args.out,
            minutes=args.minutes,
            word_minutes=args.word_minutes,
            device=args.device,
            batch=args.batch,
            compiled=not args.no_compile,
        )


if __name__ == "__main__":
    main()
