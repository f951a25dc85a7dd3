"""Reports as one HTML file that opens offline: pictures are in it, tables sort by a click, light or dark."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from rayclip.io.files import write_text
from rayclip.io.paths import StoragePath

_SHOWN_CHARACTERS = 120


class Cell(NamedTuple):
    """What a cell says, and the number that it sorts by, where it is one."""

    text: str
    number: float | None = None


Score = Mapping[str, Any]


def write_report(
    path: StoragePath, summary: Mapping[str, Any], bars: StoragePath, images: Mapping[str, Sequence[StoragePath]]
) -> None:
    """One model on all data sets of a suite: `bars` are its scores, `images` are shown with their data set."""
    rows = [
        [Cell(result["title"]), Cell(result["metric"]), score(result["score"]), *_counts(result)]
        for result in summary["datasets"].values()
    ]
    body = [table(["data set", "metric", "score", "pictures", "classes", "notes"], rows), figure(bars)]
    if summary["not_there"]:
        missing = [[Cell(name), Cell(why)] for name, why in summary["not_there"].items()]
        body += ["<h2>Not there</h2>", table(["data set", "why"], missing)]
    for name, result in summary["datasets"].items():
        body += _section(name, result, images.get(name, ()))
    _write(path, f"{summary['model_version']} on {summary['suite']}", f"weights {summary['weights_sha256'][:12]}", body)


def write_comparison(path: StoragePath, comparison: Mapping[str, Any], images: Iterable[StoragePath]) -> None:
    """Models side by side; each one's difference from the first with its interval."""
    models = comparison["models"]
    heads = ["data set", "metric", models[0]]
    heads += [head for model in models[1:] for head in (model, f"{model} less {models[0]}")]
    rows = []
    for of_one in comparison["datasets"].values():
        row = [Cell(of_one["title"]), Cell(of_one["metric"]), score(of_one["scores"][0])]
        for number in range(1, len(models)):
            row += [score(of_one["scores"][number]), difference(of_one["difference"][number])]
        rows.append(row)
    body = [table(heads, rows), *(figure(image) for image in images)]
    _write(path, "Models compared", "Intervals are of 95%; differences of the same pictures are paired.", body)


def table(heads: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table that sorts by a click on a head."""
    numeric = [bool(rows) and all(row[i].number is not None for row in rows) for i in range(len(heads))]
    kinds = [' class="number"' if is_number else "" for is_number in numeric]
    head = "".join(f"<th{kind}><button>{escape(name)}</button></th>" for name, kind in zip(heads, kinds, strict=True))
    lines = ["".join(map(_cell, row, kinds)) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def score(value: Score | None) -> Cell:
    """As in "28.2%  [27.0, 29.4]"."""
    if value is None:
        return Cell("-")
    return Cell(f"{value['value']:.1%}{_interval(value)}", value["value"])


def difference(value: Score | None) -> Cell:
    """As in "+2.2  [1.6, 2.8]", in points; one that is not paired says so."""
    if value is None:
        return Cell("-")
    unpaired = "" if value.get("paired", True) else ", not paired"
    return Cell(f"{100 * value['value']:+.1f}{_interval(value)}{unpaired}", value["value"])


def figure(image: StoragePath) -> str:
    """A picture, in the page itself."""
    data = base64.b64encode(image.read_bytes()).decode()
    name = escape(image.stem.replace("_", " "))
    return f'<figure><img src="data:image/png;base64,{data}" alt="{name}"><figcaption>{name}</figcaption></figure>'


def _write(path: StoragePath, title: str, subtitle: str, body: Sequence[str]) -> None:
    page = Template(Path(__file__).with_name("page.html").read_text())
    write_text(path, page.substitute(title=escape(title), subtitle=escape(subtitle), body="\n".join(body)))


def _section(name: str, result: Mapping[str, Any], images: Sequence[StoragePath]) -> list[str]:
    body = [f'<h2 id="{escape(name)}">{escape(result["title"])}</h2>']
    figures = [
        [Cell(task.replace("_", " ")), Cell(figure_name), score(value)]
        for task, of_task in result.items()
        if isinstance(of_task, dict) and "figures" in of_task
        for figure_name, value in of_task["figures"].items()
    ]
    body.append(table(["task", "figure", "value"], figures))
    templates = result.get("zero_shot", {}).get("templates")
    if isinstance(templates, dict):
        rows = [[Cell(line["template"]), score(line["top1"])] for line in templates["alone"]]
        rows.append([Cell("all of them"), score(templates["ensemble"])])
        body.append(table(["template", "top-1"], rows))
        gains = {"first": "the first template", "best": "the best of them", "mean": "one of them on average"}
        text = [f"{difference(templates[f'gain_over_{key}']).text} points over {what}" for key, what in gains.items()]
        body.append(f"<p>The ensemble gains {'; '.join(text)}.</p>")
    return [*body, *_corruptions(result), *_shift(result), *(figure(image) for image in images)]


def _corruptions(result: Mapping[str, Any]) -> list[str]:
    by_strength = result.get("corruptions", {}).get("by_strength", {})
    rows = [[Cell(name.replace("_", " ")), *map(score, of_name)] for name, of_name in by_strength.items()]
    heads = ["corruption", *(f"strength {level}" for level in range(1, len(rows[0])))] if rows else []
    return [table(heads, rows)] if rows else []


def _shift(result: Mapping[str, Any]) -> list[str]:
    """What the shift costs, and what of that the model is spared beside others."""
    if "shift" not in result:
        return []
    shift = result["shift"]
    text = f"{difference(shift['change']).text} points beside {shift['of']}"
    if "effective_robustness" in shift:
        robust = difference(shift["effective_robustness"]).text
        text += f"; {robust} beside what {shift['num_models']} other models foretell ({shift['expected']:.1%})"
    else:
        text += f"; with 3 other models that were measured on both there would be a line, {shift['num_models']} were"
    return [f"<p>Top-1 under the shift: {escape(text)}.</p>"]


def _counts(result: Mapping[str, Any]) -> list[Cell]:
    samples, classes = result["num_samples"], result["num_classes"]
    notes = "; ".join(result["notes"])
    return [Cell(f"{samples:,}", samples), Cell(f"{classes:,}" if classes else "-", classes), Cell(notes)]


def _cell(cell: Cell, kind: str) -> str:
    text = cell.text if len(cell.text) <= _SHOWN_CHARACTERS else f"{cell.text[:_SHOWN_CHARACTERS]}..."
    value = "" if cell.number is None else f' data-value="{cell.number}"'
    return f"<td{kind}{value}>{escape(text)}</td>"


def _interval(value: Score) -> str:
    return "" if value["low"] is None else f"  [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"
