"""The recipes that ship with the package: YAML files found by name, from any folder."""

import re
import sys
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path, PurePath

from rayclip.errors import UserError, nearest

_SUFFIXES = (".yaml", ".yml")
_FORMER = re.compile(r"(?:.*/)?(jobs|serve)/configs/([^/]+)\.yaml")


def list_recipes() -> list[str]:
    """Return the names of the recipes, sorted."""
    return sorted(PurePath(file.name).stem for file in _folder().iterdir() if file.name.endswith(_SUFFIXES))


def find_config(name: str) -> Traversable:
    """Return the YAML file at a path, or of the recipe with that name. Raises UserError that names the nearest recipe.

    A name without a folder and a suffix is a recipe's; `./NAME` is a file. The paths that recipes had before they were
    part of the package are understood, with a line on stderr.
    """
    names = list_recipes()
    if name in names:
        return _folder() / f"{name}.yaml"
    path = Path(name)
    if path.is_file():
        return path
    former = _FORMER.fullmatch(path.as_posix())
    recipe = former and f"{'serve_' if former[1] == 'serve' else ''}{former[2]}"
    if recipe in names:
        print(f"note: '{name}' is the recipe '{recipe}' now; its path will not be understood any more", file=sys.stderr)
        return _folder() / f"{recipe}.yaml"
    if path.suffix in _SUFFIXES or path.name != name:
        close = f"; {hint}" if (hint := nearest(path.stem, names)).startswith("did") else ""
        raise UserError(f"no config at '{name}': give a YAML file, or a recipe's name{close}")
    raise UserError(f"no recipe '{name}': {nearest(name, names)}")


def _folder() -> Traversable:
    return files("rayclip.recipes")
