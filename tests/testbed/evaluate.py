"""Mark a pipeline's pictures by their captions, over step counts and guidance scales.

python -m tests.testbed.evaluate tests/testbed/tiny-sd3 --steps 50 28 16 --captions 500
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from tests.testbed import models, reader, scenes

EVALUATION_SEED = 5


def held_out_captions(n: int) -> list[str]:
    """The first `n` captions of the held-out combinations, the same on every machine."""
    drawn = scenes.sample_scenes(max(n, 500), EVALUATION_SEED, held_out=True)
    return [scenes.caption(scenes.facts(drawn, i)) for i in range(n)]


@torch.inference_mode()
def generate(
    pipe: DiffusionPipeline,
    captions: Sequence[str],
    *,
    steps: int,
    guidance: float,
    batch: int = 125,
) -> Tensor:
    """Draw one picture per caption, [n, 3, 256, 256] in -1..1; picture i has noise seed i."""
    pipe.set_progress_bar_config(disable=True)
    device, pictures = pipe._execution_device, []
    for first in range(0, len(captions), batch):
        part = list(captions[first : first + batch])
        seeds = range(first, first + len(part))
        noise = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        drawn = pipe(
            part,
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=scenes.SIDE,
            width=scenes.SIDE,
            max_sequence_length=models.T5_LENGTH,
            generator=noise,
            output_type="pt",
        ).images
        pictures.append(drawn.float().to(device) * 2 - 1)
    return torch.cat(pictures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 28, 20, 16, 12, 10, 8])
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0])
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    pipe = DiffusionPipeline.from_pretrained(str(args.model), torch_dtype=torch.float32).to(
        args.device
    )
    captions = held_out_captions(args.captions)
    rows = []
    for guidance in args.guidance:
        for steps in args.steps:
            pictures = generate(pipe, captions, steps=steps, guidance=guidance)
            rows.append({"steps": steps, "guidance": guidance, **reader.score(captions, pictures)})
            shown = " ".join(f"{k} {v:.4g}" for k, v in rows[-1].items() if not math.isnan(v))
            print(shown, flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
