"""List the jobs, a line each: the first line of each module's docstring."""

import ast
from pathlib import Path

if __name__ == "__main__":
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem not in ("__init__", "__main__", "cli"):
            docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
            print(f"python -m jobs.{path.stem:<10} {docstring.splitlines()[0]}")
