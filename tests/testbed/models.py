"""The parts of tiny-sd3 and tiny-flux: tokenizers, text encoders, VAE, transformers, pipelines.

Every part is of the class the real pipelines use, only small; `train` fits the weights.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tests.testbed import scenes

CLIP_LENGTH, T5_LENGTH = 48, 49  # tokens; SD3 sees 97 text tokens, a multiple of no block
LATENT_SIDE, LATENT_CHANNELS = 64, 8
NAMES = ("tiny-sd3", "tiny-flux")
TESTBED = Path(__file__).parent


def missing(name: str) -> str | None:
    """Say how a pipeline that is not saved in the testbed is made; None if it is there."""
    if (TESTBED / name / "model_index.json").is_file():
        return None
    return (
        f"{name} is not saved in {TESTBED.name}: python -m tests.testbed.train trains it on a GPU"
    )


def _corpus() -> list[str]:
    drawn = scenes.sample_scenes(4000, seed=7)
    return [scenes.caption(scenes.facts(drawn, i)) for i in range(len(drawn))]


def clip_tokenizer() -> CLIPTokenizer:
    """Train a byte-pair vocabulary in which every word of the captions is one token."""
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False
    )
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(_corpus(), trainer)
    state = json.loads(bpe.to_str())["model"]
    vocabulary = state["vocab"]
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        vocab_file, merges_file = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab_file.write_text(json.dumps(vocabulary))
        merges = "\n".join(" ".join(pair) for pair in state["merges"])
        merges_file.write_text(f"#version: 0.2\n{merges}\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=CLIP_LENGTH)


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """Build a unigram vocabulary of whole words, with single characters as the fallback."""
    words = sorted({w for text in _corpus() for w in text.replace(",", " ,").split()})
    letters = sorted({c for word in words for c in word} | {"▁"})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    pieces += [(f"▁{word}", -2.0) for word in words if word != ","]
    pieces += [(letter, -2.0 if letter == "," else -12.0) for letter in letters]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=2))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    unigram.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    with tempfile.TemporaryDirectory() as folder:
        unigram.save(str(Path(folder, "tokenizer.json")))
        config = {
            "tokenizer_class": "T5TokenizerFast",
            "model_max_length": 512,
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "extra_ids": 0,
        }
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config))
        return T5TokenizerFast.from_pretrained(folder)


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        sample_size=scenes.SIDE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def _clip_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=width // 32,
        max_position_embeddings=CLIP_LENGTH,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _t5(tokenizer: PreTrainedTokenizerFast) -> T5EncoderModel:
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=192,
            d_kv=64,
            d_ff=256,
            num_layers=3,
            num_heads=3,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )
    start_with_word_order(encoder)
    return encoder


def start_with_word_order(encoder: T5EncoderModel) -> None:
    """Let head 0 begin by looking at the words just before, head 1 at those just after.

    From the usual start, with no order at all, it takes a small T5 far longer to learn which words
    belong together.
    """
    bias = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data
    distance = torch.tensor([*range(8), *range(8, 40, 4)], dtype=bias.dtype)  # T5's buckets, about
    before, after = slice(0, 16), slice(16, 32)
    for head, near, far in ((0, before, after), (1, after, before)):
        bias[near, head], bias[far, head] = -0.5 * distance, -6.0


def make_pipeline(name: str, vae: AutoencoderKL) -> DiffusionPipeline:
    """Assemble an untrained pipeline of diffusers' own class around a VAE."""
    clip_words, t5_words = clip_tokenizer(), t5_tokenizer()
    if name == "tiny-sd3":
        return StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=LATENT_SIDE,
                patch_size=2,
                in_channels=LATENT_CHANNELS,
                out_channels=LATENT_CHANNELS,
                num_layers=6,
                attention_head_dim=64,
                num_attention_heads=4,
                joint_attention_dim=192,
                caption_projection_dim=256,
                pooled_projection_dim=192,
                pos_embed_max_size=LATENT_SIDE // 2,
                qk_norm="rms_norm",
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae,
            text_encoder=CLIPTextModelWithProjection(_clip_config(clip_words, 64)),
            tokenizer=clip_words,
            text_encoder_2=CLIPTextModelWithProjection(_clip_config(clip_words, 128)),
            tokenizer_2=clip_words,
            text_encoder_3=_t5(t5_words),
            tokenizer_3=t5_words,
        )
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * LATENT_CHANNELS,
            num_layers=4,
            num_single_layers=4,
            attention_head_dim=64,
            num_attention_heads=4,
            joint_attention_dim=192,
            pooled_projection_dim=64,
            guidance_embeds=False,
            axes_dims_rope=(8, 28, 28),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
        ),
        vae=vae,
        text_encoder=CLIPTextModel(_clip_config(clip_words, 64)),
        tokenizer=clip_words,
        text_encoder_2=_t5(t5_words),
        tokenizer_2=t5_words,
    )


def token_ids(pipe: DiffusionPipeline, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tokenize as the pipelines do: CLIP ids [n, 48] and T5 ids [n, 49], int64."""
    t5_words = pipe.tokenizer_3 if hasattr(pipe, "tokenizer_3") else pipe.tokenizer_2
    pad = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    clip = pipe.tokenizer(list(captions), max_length=CLIP_LENGTH, **pad).input_ids
    return clip, t5_words(list(captions), max_length=T5_LENGTH, **pad).input_ids


def text_encoders(pipe: DiffusionPipeline) -> nn.ModuleList:
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    return nn.ModuleList(getattr(pipe, n) for n in names if hasattr(pipe, n))


def encode_text(encoders: nn.ModuleList, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Encode as the pipelines' encode_prompt does, with gradients.

    Returns the sequence [B, T, 192] (SD3: CLIP tokens zero-padded to T5's width, then T5's;
    FLUX: T5's) and the pooled embedding.
    """
    if len(encoders) == 2:
        pooled = encoders[0](clip_ids).pooler_output
        return encoders[1](t5_ids)[0], pooled
    outputs = [encoder(clip_ids, output_hidden_states=True) for encoder in encoders[:2]]
    pooled = torch.cat([output[0] for output in outputs], -1)
    clip = torch.cat([output.hidden_states[-2] for output in outputs], -1)
    t5 = encoders[2](t5_ids)[0]
    clip = nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
    return torch.cat([clip, t5], 1), pooled
