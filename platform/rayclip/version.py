"""Which code this is: the commit of a checkout, or the version of an installed package."""

import os
import subprocess
from pathlib import Path

from rayclip import __version__


def code_version() -> str:
    """Return the commit that the code is at, marked where it was changed since; the package's version outside git.

    A submitted job runs outside git, and is told.
    """
    if told := os.environ.get("RAYCLIP_CODE_VERSION"):
        return told
    file = Path(__file__)
    # An environment may lie within a checkout of something else, whose commits say nothing of this package.
    tracked = ["git", "ls-files", "--error-unmatch", file.name]
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        subprocess.run(tracked, cwd=file.parent, capture_output=True, check=True)
        return subprocess.run(describe, cwd=file.parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return __version__
