"""The tutorial's commands and the notebook's cells, run as they stand; the tutorial's on fewer pairs and samples."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

DOCS = Path(__file__).resolve().parents[2] / "docs"
_BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SMALLER = {"samples=30_000": "samples=1_200", "warmup_samples=2_000": "warmup_samples=200"}
START_S = 240


@pytest.fixture
def shell(tmp_path):
    """Runs a block of the tutorial in a folder; gives what it printed."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "rayclip").write_text(f'#!/bin/sh\nexec {sys.executable} -m rayclip "$@"\n')
    (bin_folder / "rayclip").chmod(0o755)
    path = os.pathsep.join([str(bin_folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "RAYCLIP_CACHE": str(tmp_path / "cache")}
    environment.pop("RAY_ADDRESS", None)

    def run(kind, text, background=False):
        command = ["bash", "-ec", text] if kind == "bash" else [sys.executable, "-c", text]
        if background:
            log = (tmp_path / "serve.log").open("w")
            command[2] = f"exec {text.strip()}"  # so that a signal reaches the command itself
            return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url, process, log):
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"no answer in {START_S} s: {log.read_text()}")


@pytest.mark.e2e
@pytest.mark.timeout(1200)  # five commands, each of which starts a Ray
def test_the_tutorial_goes_from_pairs_to_a_served_model(tmp_path, shell):
    text = (DOCS / "tutorial.md").read_text()
    for long, short in SMALLER.items():
        assert long in text
        text = text.replace(long, short)
    script = (DOCS / "examples" / "make_pairs.py").read_text()
    (tmp_path / "make_pairs.py").write_text(script.replace("NUM_PAIRS, SIDE = 1500", "NUM_PAIRS, SIDE = 300"))
    port, service, answers = free_port(), None, []
    try:
        for kind, block in _BLOCK.findall(text):
            if block.startswith("rayclip serve"):
                service = shell(kind, f"{block.strip()} port={port}", background=True)
                wait_for(f"http://127.0.0.1:{port}/healthz", service, tmp_path / "serve.log")
            else:
                answers.append(shell(kind, block.replace(":8000", f":{port}")))
    finally:
        if service is not None:
            service.send_signal(signal.SIGINT)
            service.wait(60)
    assert json.loads((tmp_path / "runs" / "mine" / "summary.json").read_text())["model_version"] == 1
    assert (tmp_path / "runs" / "evaluations" / "mine" / "mine-1" / "report.html").is_file()
    served = json.loads(answers[-1])
    assert served["model"] == "mine/1"
    assert len(served["results"][0]["predictions"]) == 2


@pytest.mark.e2e
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    notebook = nbformat.read(DOCS / "notebook.ipynb", 4)
    NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    named, asked = map(int, re.search(r"(\d+) of (\d+) new images named rightly", printed).groups())
    assert named > asked / 4  # chance is an eighteenth
