"""What curation did to the queries: as a table, and as a picture. Shapes: Q queries."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayclip.data.curation.decide import Decision
from rayclip.io.figures import png_figure
from rayclip.io.files import whole_file
from rayclip.io.paths import StoragePath

_INK, _FAINT, _AFTER = "#1f2328", "#8c959f", "#0969da"


def write_queries(path: StoragePath, decision: Decision) -> None:
    """Write (query, pairs before, pairs after), the commonest first."""
    order = np.argsort(-decision.before_Q, kind="stable")
    queries = [decision.queries[number] for number in order.tolist()]
    table = pa.table({"query": queries, "before": decision.before_Q[order], "after": decision.after_Q[order]})
    with whole_file(path) as target:
        pq.write_table(table, target, compression="zstd")


def write_query_plot(path: StoragePath, decision: Decision, pairs_per_query: int) -> None:
    """Write a PNG: pairs of each query, the commonest first, before and after."""
    order = np.argsort(-decision.before_Q, kind="stable")
    ranks = np.arange(1, len(order) + 1)
    with png_figure(path, 8, 5) as figure:
        axes = figure.add_subplot()
        axes.set(xlabel="queries, the commonest first", ylabel="pairs", xscale="log")
        axes.set_yscale("symlog", linthresh=1)  # a query may find nothing
        axes.grid(True, linewidth=0.3, color=_FAINT)
        axes.plot(ranks, decision.before_Q[order], ".", markersize=4, color=_INK, label="before")
        axes.plot(ranks, decision.after_Q[order], ".", markersize=4, color=_AFTER, label="after")
        axes.axhline(pairs_per_query, linewidth=0.8, linestyle="--", color=_FAINT, label=f"{pairs_per_query:,} a query")
        axes.legend()
