"""Figures of matplotlib as PNG files."""

from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rayclip.io.files import whole_file
from rayclip.io.paths import StoragePath


@contextmanager
def png_figure(path: StoragePath, width: float, height: float, font_size: int = 10, dpi: int = 120) -> Iterator[Figure]:
    """Yield a figure of so many inches to draw on, and write it when the block ends well.

    The same drawing gives the same bytes: the font is the one that comes with matplotlib.
    """
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": font_size}):
        figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with whole_file(path) as target:
            figure.savefig(target, format="png", metadata={"Software": None})
