"""What `bench attention` times: models' attention at their sizes, mixes of heads, kernels."""

from __future__ import annotations

from dataclasses import dataclass

from plans.synthetic import Mix
from plans.tiles import TokenLayout, kept_pairs
from plugins.torch import library


@dataclass(frozen=True)
class Case:
    """Attention of one model at one size; B rows of one transformer call."""

    batch: int
    heads: int
    head_dim: int
    layout: TokenLayout
    searched: tuple[Mix, ...]

    def mixes(self) -> list[Mix]:
        """The pure runs (all full, all arrow V/8, V/16, V/32 wide, all cached), then the mixes."""
        widths = [self.layout.image_tokens // (16 * k * self.layout.block) for k in (1, 2, 4)]
        pure = [Mix(self.heads, 0, 0, 0), *(Mix(0, self.heads, w, 0) for w in widths if w > 0)]
        return [*pure, Mix(0, 0, 0, self.heads), *self.searched]

    def share_kept(self, mix: Mix) -> float:
        """Share of the query/key pairs that a mix computes."""
        kept = sum(kept_pairs(self.layout, mode) for mode in mix.modes())
        return kept / (self.heads * self.layout.seq_len**2)


def _layout(image: int, text: int, text_first: bool) -> TokenLayout:
    return TokenLayout(image, text, text_first, block=128)


CASES = {
    "sd3-1k": Case(2, 24, 64, _layout(4096, 333, False), (Mix(5, 13, 1, 6),)),
    "sd3-2k": Case(
        2, 24, 64, _layout(16384, 333, False), (Mix(11, 9, 4, 4), Mix(7, 8, 4, 9), Mix(5, 9, 4, 10))
    ),
    "sd35-large-2k": Case(2, 38, 64, _layout(16384, 333, False), (Mix(9, 29, 4, 0),)),
    "flux-1k": Case(1, 24, 128, _layout(4096, 512, True), (Mix(5, 10, 1, 9),)),
    "flux-2k": Case(
        1, 24, 128, _layout(16384, 512, True),
        (Mix(16, 5, 4, 3), Mix(11, 8, 4, 5), Mix(6, 12, 4, 6), Mix(4, 16, 4, 4)),
    ),
}  # fmt: skip
KERNELS = {
    "arrowhead": library.AUTO,
    "arrowhead-sm90": library.SM90,
    "arrowhead-sm90-wide": library.SM90_WIDE,
    "arrowhead-mma": library.MMA_SYNC,
}
BASELINES = ("sdpa-cudnn", "sdpa-flash", "cudnn-uncached", "flex")
DENSE = "all full"  # the mix that others are compared with
