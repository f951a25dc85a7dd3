"""What the documentation says of commands: each exists, and takes the keys that it is shown with."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from rayclip.cli.command import Command
from rayclip.cli.main import COMMANDS, get_command
from rayclip.config.loader import load
from rayclip.config.recipes import list_recipes
from rayclip.serve.config import ServeConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^```(?:bash)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
_MISTAKEN = "optimizer.learning_rate=1e-3"
"""What README shows an error with."""


def commands():
    """Every `rayclip ...` in a block of shell lines, with the page that it is on."""
    for page in PAGES:
        for block in _BLOCK.findall(page.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.removeprefix("$ ")
                if line.startswith("rayclip ") and _MISTAKEN not in line:
                    yield pytest.param(
                        shlex.split(line.partition(">>")[0], comments=True)[1:], id=f"{page.stem}: {line[:60]}"
                    )


@pytest.mark.parametrize("arguments", list(commands()))
def test_a_command_takes_what_it_is_shown_with(arguments):
    name, *rest = arguments
    assert name in COMMANDS
    if name == "submit":
        if rest[0] in ("list", "status", "logs", "stop"):
            return
        name, *rest = rest
    command = get_command(name)
    if isinstance(command, Command):
        # Where the summary goes depends on the model, which is not there.
        dataclasses.replace(command, summary_path=lambda config: "").parse(rest)
    elif name == "serve" and rest[0] not in ("key", "rollback"):
        path = rest[0] if "=" not in rest[0] else None
        load(ServeConfig, path, rest[1:] if path else rest)


def test_recipes_that_pages_name_are_there():
    recipes = list_recipes()
    for page in PAGES:
        for anchor in re.findall(r"recipes\.md#(\w+)", page.read_text()):
            assert anchor in recipes, page


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150
