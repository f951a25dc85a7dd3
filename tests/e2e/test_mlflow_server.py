"""MLflow's server by the very command of infra/mlflow, over a small database and an S3 that runs here."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import boto3
import pytest
import yaml
from moto.server import ThreadedMotoServer

from rayclip.tracking import mlflow as tracking
from rayclip.tracking.names import STEP_METRIC

MANIFESTS = Path(__file__).resolve().parents[2] / "infra/mlflow"
BUCKET, WAIT_S = "runs", 180


def commands():
    """The server's command in each manifest, and the names of the variables it gets."""
    compose = yaml.safe_load((MANIFESTS / "compose.yaml").read_text())["services"]["mlflow"]
    documents = list(yaml.safe_load_all((MANIFESTS / "kubernetes.yaml").read_text()))
    (deployment,) = [document for document in documents if document["kind"] == "Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    variables = {line.partition("=")[0] for line in compose["environment"]}, {one["name"] for one in container["env"]}
    return compose["command"], container["command"], variables


@pytest.fixture
def s3(monkeypatch):
    """An S3 with an empty bucket; its address."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", f"http://{host}:{port}")
    boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket=BUCKET)
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def server(s3, tmp_path):
    """The server's address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program, *arguments = commands()[0]
    stores = {
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{BUCKET}/mlflow",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    assert all(set(stores) <= names for names in commands()[2])
    here = [{"--port=5000": f"--port={port}", "--host=0.0.0.0": "--host=127.0.0.1"}.get(a, a) for a in arguments]
    log = tmp_path / "server.log"
    process = subprocess.Popen(
        [Path(sys.executable).with_name(program), *here],
        cwd=tmp_path,
        env={**os.environ, **stores},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,  # its workers go with it
    )
    try:
        deadline = time.monotonic() + WAIT_S
        while status(f"http://127.0.0.1:{port}/health") != 200:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def status(url, host=None):
    try:
        request = urllib.request.Request(url, headers={"Host": host} if host else {})
        return urllib.request.urlopen(request, timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def test_both_manifests_run_the_same_command():
    compose, kubernetes, _ = commands()
    assert compose == kubernetes


@pytest.mark.e2e
def test_a_run_goes_through_the_server_into_database_and_bucket(server, s3, tmp_path, monkeypatch):
    # Clients speak to the server alone: they need no keys to the bucket.
    endpoint = {name: os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "MLFLOW_S3_ENDPOINT_URL")}
    for name in endpoint:
        monkeypatch.delenv(name)
    run_id = tracking.open_run(server, "kept", "first", {"optimizer": {"lr": 0.1}}, {"code_version": "abc"}, None)
    tracker = tracking.MlflowTracker(server, run_id)
    tracker.log({STEP_METRIC: 0.5}, 10)
    (tmp_path / "sheet.png").write_bytes(b"a picture")
    tracker.log_image(tmp_path / "sheet.png")
    tracker.close()
    tracking.close_run(server, run_id, succeeded=True)

    client = tracking.connect(server)
    run = client.get_run(run_id)
    assert run.data.params["optimizer.lr"] == "0.1"
    assert run.data.tags["code_version"] == "abc"
    assert run.data.metrics[STEP_METRIC] == 0.5
    assert run.info.status == "FINISHED"
    assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
    assert json.loads(Path(client.download_artifacts(run_id, "config.json", str(tmp_path))).read_text()) == {
        "optimizer": {"lr": 0.1}
    }
    bucket = boto3.client("s3", endpoint_url=s3, aws_access_key_id="test", aws_secret_access_key="test")
    keys = {found["Key"] for found in bucket.list_objects_v2(Bucket=BUCKET)["Contents"]}
    assert {key.partition(run_id)[2] for key in keys} == {"/artifacts/config.json", "/artifacts/pictures/sheet.png"}
    assert all(key.startswith("mlflow/") for key in keys)

    assert [
        status(f"{server}/api/2.0/mlflow/experiments/search?max_results=1", host)
        for host in ("mlflow:5000", "mlflow", "elsewhere.example")
    ] == [200, 200, 403]
