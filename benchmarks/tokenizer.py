"""Captions a second, beside open_clip's tokenizer on the same captions."""

from typing import Any

from benchmarks.config import BenchmarkConfig
from benchmarks.peers import load_open_clip
from benchmarks.timing import paired_times
from rayclip.config import GlyphsConfig
from rayclip.data.samples import glyphs
from rayclip.data.tokenizer import get_tokenizer


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Tokenise captions of the glyphs' training pictures, spread over all of them."""
    items = glyphs.build("train", GlyphsConfig())
    captions = [glyphs.render(item, 16)[1] for item in items[:: max(1, len(items) // config.samples)]]
    ours, theirs = get_tokenizer(77), load_open_clip().get_tokenizer("ViT-B-32")
    ours_s, theirs_s, ratio = paired_times(lambda: ours(captions), lambda: theirs(captions), config.repeats)
    return {
        "captions": len(captions),
        "captions_per_s": round(len(captions) / ours_s),
        "open_clip_captions_per_s": round(len(captions) / theirs_s),
        "ratio_vs_open_clip": round(ratio, 2),
    }
