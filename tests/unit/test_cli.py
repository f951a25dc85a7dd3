"""The `rayclip` command: what it lists, what it answers to a mistake, and that it does so before it imports much."""

import json
import re
import subprocess
import sys

import pytest
import yaml

from rayclip.cli import main as cli
from rayclip.cli import train
from rayclip.errors import UserError, require_extra
from rayclip.io.lease import hold

HEAVY = ("torch", "ray", "mlflow", "matplotlib", "pyarrow", "scipy", "pandas", "s3fs", "optuna", "fastapi")
SCRIPT = f"""
import json, sys
from rayclip.cli.main import main
found = []
for arguments in json.load(sys.stdin):
    sys.argv = ["rayclip", *arguments]
    try:
        main()
    except SystemExit as ended:
        found.append(ended.code)
found.append([name for name in {HEAVY} if name in sys.modules])
print(json.dumps(found), file=sys.stderr)
"""
MISTAKES = {
    "ingest": ["ingest_glyphs", "sead=1"],
    "index": ["data", "chunk_sample=1"],
    "curate": ["curate", "dota=1"],
    "train": ["demo", "optimizer.lrr=1"],
    "sweep": ["sweep_glyphs", "base.optimizer.lrr=1"],
    "evaluate": ["models:/a@b", "suite_small", "batch_size=0"],
    "compare": ["one", "two", "outputt=x"],
    "embed": ["embed", "what=sounds"],
    "classify": ["classify", "model="],
    "fit": ["runs.csv", "form=none"],
    "plan": ["plan_vit_l14", "num_gpus=-1"],
    "convert": ["in", "out", "format=none"],
    "demo": ["optimizer.lrr=1"],
    "serve": ["serve_demo", "prt=8000"],
    "submit": ["train", "demo", "optimizer.lrr=1"],
    "ui": ["port=none"],
}


def run(*commands):
    """Runs commands in one process of its own; the exit codes, the heavy modules it has, what it printed and said."""
    arguments = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(arguments, input=json.dumps(commands), capture_output=True, text=True, check=True)
    *said, found = done.stderr.splitlines()
    *codes, heavy = json.loads(found)
    return codes, heavy, done.stdout, said


def test_help_of_every_command_imports_nothing_heavy():
    codes, heavy, shown, said = run([], ["--help"], *([name, "--help"] for name in cli.COMMANDS))
    assert (codes, heavy, said) == ([2, *[0] * (len(cli.COMMANDS) + 1)], [], [])
    for name in cli.COMMANDS:
        assert re.search(rf"^usage: rayclip {name}\b", shown, re.M), name
        assert re.search(rf"^  {name} +[A-Z].*\.$|^  {name} +[A-Z].*help$", shown, re.M), name


def test_a_mistake_in_the_settings_is_answered_before_anything_heavy_is_imported():
    assert set(MISTAKES) == set(cli.COMMANDS)
    codes, heavy, shown, said = run(*([name, *arguments] for name, arguments in MISTAKES.items()))
    assert (codes, heavy, shown) == ([2] * len(MISTAKES), [], "")
    assert len(said) == len(MISTAKES) and all(line.startswith("error: ") for line in said), said


def test_an_output_that_is_made_anew_says_what_it_replaces_and_is_held(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [f"m{i},1.0,{10.0 ** (6 + i)},{0.9 * 0.8**i}" for i in range(6)]
    (tmp_path / "law.csv").write_text("\n".join(["name,gmacs,samples,error", *rows]))
    folder, fit = tmp_path / "runs/fits/law", ["fit", "law.csv", "resamples=100"]
    assert cli.run(fit) == cli.run(fit) == 0
    assert "replaced" not in capsys.readouterr().err
    assert cli.run([*fit, "seed=1"]) == 0
    assert "is replaced: it was of other settings (seed is 0 there and 1 here)" in capsys.readouterr().err
    assert not list(folder.glob("owner*"))
    with hold(folder, "the folder"), pytest.raises(UserError, match="one at a time"):
        cli.run(fit)


def test_a_summary_takes_the_place_of_no_other_file(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt' is there and is no summary"):
        cli.run(["plan", "plan_vit_l14", "--json", str(tmp_path / "notes.txt")])


def test_an_unknown_command_names_the_nearest():
    with pytest.raises(UserError, match=r"^no command 'trian': did you mean 'train'\?$"):
        cli.run(["trian", "demo"])


def test_the_scripts_of_clusters_are_the_same_commands(tmp_path):
    listed = subprocess.run([sys.executable, "-m", "jobs"], capture_output=True, text=True, check=True).stdout
    assert [line.split()[2] for line in listed.splitlines()] == [f"jobs.{name}" for name in (*cli.JOBS, "submit")]
    for module in ("jobs.train", "serve", "rayclip"):
        done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("usage: rayclip ")


def test_an_extra_that_is_missing_is_named():
    require_extra("json", "sweep", "this")
    with pytest.raises(UserError, match=r"^curate needs not_there, .* pip install 'rayclip\[curate\]'$"):
        require_extra("not_there", "curate", "curate")


def test_a_check_of_a_run_finds_what_the_run_would_refuse(
    tmp_path, monkeypatch, make_config, make_samples, write_dataset
):
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data", make_samples(40))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(make_config("run", tmp_path / "data", samples=64)))
    arguments = ["run.yaml", "--check"]
    assert train.command(arguments) == 0
    with pytest.raises(UserError, match="nowhere': the folder does not exist"):
        train.command([*arguments, "data.path=nowhere"])
    task = "evaluation.tasks={classes: {kind: zero_shot, path: data}}"
    with pytest.raises(UserError, match=r"no 'classnames.txt' in '.*data': zero-shot needs the classes' names"):
        train.command([*arguments, task])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "run.yaml"]
