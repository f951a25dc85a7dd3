"""Train a CLIP, evaluate it, register the best checkpoint; after a crash it goes on."""

from typing import TYPE_CHECKING, Any

from rayclip.cli.command import Command, print_table
from rayclip.config import TrainConfig
from rayclip.io.paths import storage_path
from rayclip.io.storage import format_path

if TYPE_CHECKING:
    from rayclip.orchestration.train.run_folder import RunFolder


def main(config: TrainConfig) -> dict[str, Any]:
    """Run the job. Returns the summary. Raises UserError."""
    from rayclip.orchestration.train.driver import run_training

    summary = run_training(config)
    print_summary(summary, _run_folder(config))
    return summary


def print_summary(summary: dict[str, Any], folder: "RunFolder") -> None:
    """The short table at the end, and what to do next."""
    print()
    print_table(list(_rows(summary)))
    print("\nnext:")
    then = [("rayclip ui", "the run in MLflow"), ("rayclip train --help", "every setting")]
    if folder.contact_sheets.is_dir():
        then.insert(1, (format_path(str(folder.contact_sheets)), "right and wrong answers, as pictures"))
    print_table(then)


def _rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, m in summary.get("zero_shot", {}).items():
        among = f"{m['num_classes']:,} classes (chance {m['chance_top1']:.2%})"
        rows.append((name, f"top-1 {m['top1']:.1%}, top-5 {m['top5']:.1%} among {among}"))
    for name, m in summary.get("retrieval", {}).items():
        recalls = ", ".join(f"{m[f'image_to_text.recall_at_{k}']:.1%}" for k in (1, 5, 10))
        rows.append((name, f"recall@1, 5, 10 of captions: {recalls} among {m['num_texts']:,}"))
    rows += [
        (
            "samples seen",
            f"{_seen(summary)} in {summary['train_time_s']:.0f} s, {summary['samples_per_s']:,.0f}/s",
        ),
        ("data wait", f"{summary['data_wait_share']:.1%} of the time"),
        ("skipped", ", ".join(f"{cause} {count:,}" for cause, count in summary["skipped"].items()) or "none"),
        ("checkpoint", format_path(summary["checkpoint"])),
    ]
    if summary["model_version"] is not None:
        rows.append(("model version", f"{summary['registered_model']} version {summary['model_version']}"))
    if summary.get("promotion"):  # a summary of an older version does not have it
        decision = summary["promotion"]
        kept = f"'{decision['alias']}' stays at version {decision['against']}: " if decision["against"] else ""
        stays = "" if decision["outcome"] == "promoted" else kept
        rows.append((decision["outcome"], stays + decision["reason"]))
    return rows


def _seen(summary: dict[str, Any]) -> str:
    seen = summary["samples_seen"]
    trained = summary.get("samples_trained", seen)  # a summary of an older version does not have it
    return f"{seen:,}" if trained == seen else f"{seen - trained:,} before the branch, {trained:,}"


def _run_folder(config: TrainConfig) -> "RunFolder":
    from rayclip.orchestration.train.run_folder import RunFolder

    return RunFolder(storage_path(config.runs) / config.name)


def _check(config: TrainConfig) -> None:
    from rayclip.orchestration.train.driver import check_training

    check_training(config)


command = Command("rayclip train", TrainConfig, main, lambda config: str(_run_folder(config).summary), check=_check)
