"""Source `glyphs`: the embedded data set of `rayclip.data.samples.glyphs`."""

from pathlib import Path

from rayclip.config import GlyphsConfig
from rayclip.data.samples import glyphs
from rayclip.data.sources.base import Record, Split


def splits(config: GlyphsConfig, cache: Path) -> dict[str, Split]:
    """The three splits: training, a typeface held out, combinations of letter and mark held out."""
    return {
        split: Split(glyphs.build(split, config), None if split == "train" else glyphs.class_names(split))
        for split in glyphs.SPLITS
    }


def read(item: glyphs.Item, config: GlyphsConfig) -> Record:
    """Draw the picture of an item."""
    return Record(*glyphs.render(item, config.size))
