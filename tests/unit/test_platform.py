"""The source folder is called `platform`, and Python's own module of that name must not notice."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def test_the_source_folder_is_no_package():
    assert (REPOSITORY / "platform" / "rayclip").is_dir()
    assert not (REPOSITORY / "platform" / "__init__.py").exists()
    assert not list((REPOSITORY / "tests").rglob("__init__.py"))
    assert not (REPOSITORY / "tests" / "platform").exists()


@pytest.mark.parametrize("start", [["-c"], ["-P", "-c"]])
def test_python_finds_its_own_platform_module_at_the_root(start):
    code = "import platform, rayclip; print(platform.system(), platform.__file__, rayclip.__file__, sep='\\n')"
    answer = subprocess.run(
        [sys.executable, *start, code], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60
    )
    system, own, rayclip = answer.stdout.splitlines()
    assert system in ("Linux", "Darwin", "Windows")
    assert Path(own).name == "platform.py"
    assert not Path(own).is_relative_to(REPOSITORY / "platform")
    assert Path(rayclip) == REPOSITORY / "platform" / "rayclip" / "__init__.py"
