"""The ways to start it: the production files, `serve run`, the command line, and what each says to a mistake."""

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from rayclip.cli.serve import command
from rayclip.config.loader import load, validate
from rayclip.errors import UserError
from rayclip.orchestration.cluster.ray_internals import SERVE_ENVIRONMENT
from rayclip.serve.app import build_app
from rayclip.serve.config import AuthConfig, ServeConfig
from rayclip.serve.middleware.auth import KEYS_VARIABLE, ApiKeys

ROOT = Path(__file__).resolve().parents[2]
PRODUCTION = sorted((ROOT / "infra" / "serve").glob("*.yaml"))


@pytest.mark.parametrize("path", PRODUCTION, ids=lambda path: path.stem)
def test_production_files_are_what_serve_and_the_service_accept(path):
    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    (application,) = schema.applications
    assert application.import_path == "rayclip.serve.app:build_app"
    config = validate(ServeConfig, application.args, str(path))
    assert config.auth.keys_file, "it listens on every interface"
    for replicas in (config.ingress, config.image_encoder, config.text_encoder):
        assert replicas.target_ongoing_requests < replicas.max_ongoing_requests
    assert config.request_timeout_s < schema.http_options.request_timeout_s


def test_the_environment_of_a_cluster_is_the_one_that_is_tested():
    lines = (ROOT / "infra" / "serve" / "environment").read_text().splitlines()
    given = {name: value.strip('"') for name, _, value in (line.partition("=") for line in lines if line[0] != "#")}
    threads = "RAY_SERVE_HAPROXY_NBTHREAD"  # by the machine's cores
    assert {**given, threads: ""} == {**SERVE_ENVIRONMENT, threads: ""}


def test_what_a_cluster_that_is_joined_leaves_out_is_said():
    script = "from rayclip.serve import launch; launch.set_environment()"
    variables = {**os.environ, "PYTHONPATH": f"{ROOT / 'platform'}", "RAY_ADDRESS": "127.0.0.1:6379"}
    done = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True)
    assert done.stderr.startswith("note: on a cluster that is joined the service sets no time limit for a request's")
    assert done.stderr.count("\n") == 1 and "not 503" in done.stderr


def test_the_demos_file_is_a_config():
    path = ROOT / "platform" / "rayclip" / "recipes" / "serve_demo.yaml"
    assert load(ServeConfig, path, []).label_sets["digits"].labels[7] == "digit seven"


def test_arguments_of_serve_run_are_texts_with_dots(model_folder):
    app = build_app({"model": str(model_folder), "image_encoder.max_replicas": "3", "poll_s": "0.5"})
    deployment = app._bound_deployment
    assert deployment.name == "Ingress"
    assert deployment.init_args[0].image_encoder.max_replicas == 3
    with pytest.raises(UserError, match=r"unknown key 'image_encoder.replicas'"):
        build_app({"model": str(model_folder), "image_encoder.replicas": "3"})


def test_serve_run_with_a_production_file(tmp_path, model_folder, free_port):
    values = yaml.safe_load((ROOT / "infra" / "serve" / "cpu.yaml").read_text())
    values["http_options"] |= {"host": "127.0.0.1", "port": free_port}
    values["applications"][0]["route_prefix"] = "/clip"
    args = values["applications"][0]["args"]
    args |= {"model": str(model_folder), "auth": {}}
    del args["tracking_uri"]
    for part in ("ingress", "image_encoder", "text_encoder"):
        args[part] |= {"min_replicas": 1, "max_replicas": 1, "num_cpus": 0.1}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(values))
    command = [
        shutil.which("serve", path=str(Path(sys.executable).parent)),
        "run",
        "--app-dir",
        str(ROOT),
        "serve.yaml",
    ]
    with (tmp_path / "log").open("w") as log:
        # Without `infra/serve/environment`: Serve's own proxy must do too.
        paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"}
        process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **paths}, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                assert urllib.request.urlopen(f"http://127.0.0.1:{free_port}/clip/healthz", timeout=10).status == 200
                break
            except OSError:
                time.sleep(0.5)
        else:
            raise AssertionError((tmp_path / "log").read_text())
        # The page, the documentation and what they load, below the prefix.
        for page in ("", "docs"):
            address = f"http://127.0.0.1:{free_port}/clip/{page}"
            text = urllib.request.urlopen(address).read().decode()
            for link in re.findall(r'(?:href|src)="([^"]*)"', text):
                if not link.startswith("data:"):
                    assert urllib.request.urlopen(urllib.parse.urljoin(address, link)).status == 200, link
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model=nowhere"], "no model at 'nowhere'"),
        (["model=models:/nobody@champion"], "no MLflow database at"),
        (["model=MODEL", "portt=1"], "unknown key 'portt': did you mean 'port'?"),
        (["model=MODEL", "host=0.0.0.0"], "API key"),
        (["model=MODEL", "auth.keys_file=missing"], "missing"),
        (["model=MODEL", "canary=MODEL"], "give both or none of canary and canary_share"),
        (["model=MODEL", "templates=fotos"], "unknown template set 'fotos'"),
        (["model=MODEL", "urls.allowed_hosts=['*.x.org']"], "*.x.org"),
        (["rollback"], "give the alias to move back"),
        (["rollback", "models:/nobody@champion"], "no MLflow database at"),
        (["rollback", "models:/x@y", "too=1"], "'too=1' is neither to=VERSION nor tracking_uri=URI"),
        (["key"], "give the key's name"),
    ],
)
def test_a_mistake_is_said_before_anything_starts(tmp_path, monkeypatch, model_folder, arguments, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        command([each.replace("MODEL", str(model_folder)) for each in arguments])
    assert "\n" not in str(caught.value)


def test_a_taken_port_is_one_line_and_exit_code_2(tmp_path, service, model_folder):
    port = service.url.rpartition(":")[2]
    done = subprocess.run(
        [sys.executable, "-m", "serve", f"model={model_folder}", f"port={port}"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: cannot listen on 127.0.0.1:{port}")


def test_a_key_is_made_and_its_line_is_accepted(capsys):
    assert command(["key", "team"]) == 0
    output = capsys.readouterr()
    key = output.err.split()[-1]
    keys = ApiKeys.load(AuthConfig(), {KEYS_VARIABLE: output.out.strip()})
    assert keys.name_of(f"Bearer {key}", None) == "team"
