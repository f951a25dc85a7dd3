"""Where pairs come from: one module a source, all with the same two functions.

`splits(config, cache)` lists what there is, and `read(item, config)` turns one item of such a list into a `Record`.
"""

from rayclip.data.sources import digits, emoji, folder, glyphs, sentiment, shapes, table
from rayclip.data.sources.base import Record, Source, Split

SOURCES: dict[str, Source] = {
    "glyphs": glyphs,
    "emoji": emoji,
    "folder": folder,
    "table": table,
    "digits": digits,
    "sentiment": sentiment,
    "shapes": shapes,
}
"""Sources by the `kind` of their config."""

__all__ = ["SOURCES", "Record", "Source", "Split"]
