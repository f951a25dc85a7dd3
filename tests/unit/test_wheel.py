"""The wheel: one top-level module, with everything that it reads."""

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "platform/rayclip"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, since setuptools writes into the tree that it builds from."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("platform", "serve"):
        shutil.copytree(
            ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-*")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "out", "."]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (tree / "out").glob("*.whl")
    return ZipFile(path)


def test_it_holds_the_package_and_all_that_it_reads(wheel):
    names = set(wheel.namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"rayclip"}
    there = [path for path in LIBRARY.rglob("*") if path.is_file()] + [
        LIBRARY / "serve" / path.relative_to(ROOT / "serve") for path in (ROOT / "serve").rglob("*") if path.is_file()
    ]
    expected = {path.relative_to(LIBRARY.parent).as_posix() for path in there if "__pycache__" not in path.parts}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {"rayclip/py.typed", "rayclip/recipes/demo.yaml", "rayclip/serve/page/index.html"} <= expected


def test_it_brings_one_command(wheel):
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert wheel.read(entry_points).decode().split() == ["[console_scripts]", "rayclip", "=", "rayclip.cli.main:main"]
