"""Train a ladder of models for a scaling law, or search for the best settings; after a crash it goes on."""

from typing import Any

from rayclip.cli import fit
from rayclip.cli.command import Command, print_table
from rayclip.config import FitConfig, LadderPlan, SearchPlan, SweepConfig
from rayclip.errors import UserError, require_extra
from rayclip.io.storage import format_path


def main(config: SweepConfig) -> dict[str, Any]:
    """Run the sweep; returns its summary. Raises UserError for a mistake in the config, and where trials failed."""
    if isinstance(config.plan, SearchPlan) and config.plan.algorithm == "tpe":
        require_extra("optuna", "sweep", "plan.algorithm=tpe")

    from rayclip.orchestration.sweep.driver import run_sweep, sweep_folder

    summary = run_sweep(config)
    folder = sweep_folder(config)
    print()
    print_table(list(_rows(summary)))
    if isinstance(config.plan, LadderPlan):
        print()
        rungs, plan = str(folder.path / "rungs.csv"), config.plan
        law = FitConfig(source=rungs, form=plan.form, frontier=plan.frontier, output=str(folder.path))
        try:
            summary["fit"] = fit.main(law)
        except UserError as error:  # the runs are what was asked for; that they carry no law is news, not a failure
            print_table([("no law", str(error))])
            summary["fit"] = None
    else:
        print("\nnext:")
        print_table([(f"rayclip train {format_path(str(folder.path / 'best.yaml'))}", "train the best")])
    folder.write_summary(summary)
    if summary["failed"]:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in summary["failed"].items())
        raise UserError(f"{len(summary['failed'])} of {summary['num_trials']} trials failed: {reasons}")
    return summary


def _rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    ended = ", ".join(f"{summary[f'num_{state}']} {state}" for state in ("finished", "stopped", "failed"))
    rows = [("trials", f"{summary['num_trials']}: {ended}")]
    best = summary.get("best")
    if best:
        rows.append(("best", f"{best['trial']}: {summary['metric']} {best[summary['metric']]:.1%}"))
        rows += [(key, str(value)) for key, value in best["values"].items()]
    spent, whole = summary["training_flops"], summary["training_flops_of_all"]
    rows.append(("compute", f"{spent:.3g} training FLOPs, {summary['share_saved']:.0%} less than all to their end"))
    return rows if best else [*rows[:1], ("compute", f"{spent:.3g} of {whole:.3g} training FLOPs")]


def _summary_path(config: SweepConfig) -> str:
    from rayclip.orchestration.sweep.driver import sweep_folder

    return str(sweep_folder(config).summary)


command = Command("rayclip sweep", SweepConfig, main, _summary_path)
