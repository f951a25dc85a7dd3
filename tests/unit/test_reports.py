"""Reports: models compared picture by picture, the plots and the page."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.metrics import balanced_accuracy_score

from rayclip.cli import compare as compare_job
from rayclip.config import CompareConfig
from rayclip.errors import UserError
from rayclip.evaluation.page import Cell, table
from rayclip.evaluation.reports import compare, find_reports

COUNTS = [40, 10, 50]
LABELS = np.repeat(np.arange(3), COUNTS)


def score(value, spread=0.05):
    return {"value": value, "low": value - spread, "high": value + spread}


def write_report(folder, version, rank, order=None, metric="accuracy"):
    """A report of three data sets, the ranks of the true classes those of `letters`."""
    order = np.arange(len(LABELS)) if order is None else order
    (folder / "letters").mkdir(parents=True)
    columns = {"label": LABELS[order], "answer": LABELS[order], "rank": rank[order]}
    ids = [f"0.tar/{i:04}" for i in order]
    table = pa.table({"id": ids, **{k: v.astype("int32") for k, v in columns.items()}})
    pq.write_table(table, folder / "letters" / "answers.parquet")
    right = np.where(rank == 0, LABELS, (LABELS + 1) % 3)
    value = balanced_accuracy_score(LABELS, right) if metric == "mean_per_class" else (rank == 0).mean()
    datasets = {
        "letters": {"title": "Letters <b>", "metric": metric, "score": score(value)},
        "pairs": {"title": "Pairs", "metric": "image_recall_at_1", "score": score(0.5 + 0.01 * rank[0])},
        "tags": {"title": "Tags", "metric": "roc_auc", "score": score(0.6) | {"low": None, "high": None}},
    }
    summary = {"model_version": version, "datasets": datasets}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def ranks():
    generator = np.random.default_rng(0)
    return [generator.integers(0, 3, len(LABELS)) for _ in range(2)]


@pytest.mark.parametrize("metric", ["accuracy", "mean_per_class"])
def test_a_difference_is_that_of_the_same_pictures(tmp_path, ranks, metric):
    shuffled = np.random.default_rng(1).permutation(len(LABELS))
    write_report(tmp_path / "a", "one@1", ranks[0], metric=metric)
    write_report(tmp_path / "b", "two@2", ranks[1], shuffled, metric)
    compared = compare(find_reports([str(tmp_path)]))
    assert compared["models"] == ["one@1", "two@2"]
    found = compared["datasets"]["letters"]["difference"][1]
    scores = [s["value"] for s in compared["datasets"]["letters"]["scores"]]
    assert found["paired"] and found["value"] == pytest.approx(scores[1] - scores[0])
    # Beside a bootstrap over pictures, each drawn with both answers.
    weight = np.ones(len(LABELS)) if metric == "accuracy" else len(LABELS) / 3 / np.array(COUNTS)[LABELS]
    difference = weight * ((ranks[1] == 0).astype(float) - (ranks[0] == 0))
    drawn = np.random.default_rng(2).integers(len(LABELS), size=(4000, len(LABELS)))
    expected = np.quantile(difference[drawn].mean(axis=1), [0.025, 0.975])
    assert [found["low"], found["high"]] == pytest.approx(expected, abs=0.02)


def test_other_pictures_are_not_paired(tmp_path, ranks):
    write_report(tmp_path / "a", "one@1", ranks[0])
    write_report(tmp_path / "b", "two@2", ranks[1])
    path = tmp_path / "b" / "letters" / "answers.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    compared = compare(find_reports([str(tmp_path / "a"), str(tmp_path / "b")]))["datasets"]
    found = compared["letters"]["difference"][1]
    assert not found["paired"]
    assert found["high"] - found["low"] == pytest.approx(2 * 0.05 * 2**0.5)
    assert compared["tags"]["difference"][1] == {"value": 0.0, "low": None, "high": None, "paired": False}


def test_another_metric_is_not_compared(tmp_path, ranks):
    write_report(tmp_path / "a", "one@1", ranks[0])
    write_report(tmp_path / "b", "two@2", ranks[1], metric="mean_per_class")
    found = compare(find_reports([str(tmp_path)]))["datasets"]["letters"]
    assert found["scores"][1] is None and found["difference"][1] is None


def test_the_job_writes_a_page_that_needs_nothing_else(tmp_path, ranks, capsys):
    write_report(tmp_path / "in" / "a", "one@1", ranks[0])
    write_report(tmp_path / "in" / "b", "two@2", ranks[1])
    compare_job.main(CompareConfig(runs=(str(tmp_path / "in"),), output=str(tmp_path / "out")))
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r'(?:src|href)="(?!data:|#)', page) and "Letters &lt;b&gt;" in page
    assert len(re.findall("<th[ >]", page)) == page.count("</th>") == 5
    for name in ("scores.png", "radar.png"):
        assert min(Image.open(tmp_path / "out" / name).size) > 100
    assert "two@2, less one@1" in capsys.readouterr().out


def test_the_command_takes_any_number_of_reports(tmp_path, ranks, monkeypatch):
    paths = [str(write_report(tmp_path / name, f"{name}@1", ranks[0])) for name in ("a", "b", "c")]
    output = tmp_path / "out"
    assert compare_job.command([*paths, f"output={output}", "--json", str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text())["models"] == ["a@1", "b@1", "c@1"]


def test_a_path_without_a_report_is_named(tmp_path):
    with pytest.raises(UserError, match=rf"^no report of rayclip evaluate in '{tmp_path}': give folders"):
        find_reports([str(tmp_path)])


def test_paths_without_a_report_are_passed_over_and_named(tmp_path, ranks, capsys):
    write_report(tmp_path / "a", "one@1", ranks[0])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text('{"samples_seen": 5}')
    runs = (str(tmp_path / "a"), str(tmp_path / "run"))
    found = compare_job.main(CompareConfig(runs=runs, output=str(tmp_path / "out")))
    assert (found["models"], found["passed_over"]) == (["one@1"], [str(tmp_path / "run")])
    assert f"note: '{tmp_path / 'run'}' is passed over" in capsys.readouterr().err
    with pytest.raises(UserError, match="no report of rayclip evaluate in any of 2 paths"):
        find_reports([str(tmp_path / "run"), str(tmp_path / "no")], print)


def test_a_recalls_difference_is_that_of_the_same_images(tmp_path, ranks):
    """Beside a bootstrap over images, each drawn with all its captions and both models' answers to them."""
    generator = np.random.default_rng(3)
    counts = generator.integers(1, 6, 80)
    image = np.arange(80).repeat(counts)
    text_ranks = [generator.integers(0, 4, len(image)), generator.integers(0, 3, len(image))]
    for name, rank in zip("ab", text_ranks, strict=True):
        write_report(tmp_path / name, f"{name}@1", ranks[0])
        (tmp_path / name / "pairs").mkdir()
        order = np.random.default_rng(ord(name)).permutation(len(image))
        columns = {"way": ["text_to_image"] * len(image), "id": [f"0.tar/{i}" for i in image[order]]}
        table = pa.table({**columns, "rank": rank[order].astype("int32")})
        pq.write_table(table, tmp_path / name / "pairs" / "ranks.parquet")
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        summary["datasets"]["pairs"] |= {"score": score((rank < 1).mean())}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    compared = compare(find_reports([str(tmp_path)]))["datasets"]["pairs"]
    found, scores = compared["difference"][1], [one["value"] for one in compared["scores"]]
    assert compared["metric"] == "text_to_image.recall_at_1"
    assert found["paired"] and found["value"] == pytest.approx(scores[1] - scores[0])
    gained = np.bincount(image, (text_ranks[1] < 1).astype(float) - (text_ranks[0] < 1))
    drawn = generator.integers(80, size=(4000, 80))
    expected = np.quantile(gained[drawn].sum(axis=1) / counts[drawn].sum(axis=1), [0.025, 0.975])
    assert [found["low"], found["high"]] == pytest.approx(expected, abs=0.03)


def test_a_cell_sorts_by_its_number():
    html = table(["a"], [[Cell("9%", 0.09)], [Cell("10%", 0.1)]])
    assert '<td class="number" data-value="0.09">9%</td>' in html
