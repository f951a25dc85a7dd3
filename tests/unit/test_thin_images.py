"""An image of 1 x 15,000 pixels: refused with its cause, and without its memory, by all that resizes images."""

import json
import subprocess
import sys

SCRIPT = """
import io, json, resource, sys, tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from rayclip import load
from rayclip.config import EmbedConfig, ModelConfig, SuiteConfig, TextConfig, VisionConfig
from rayclip.data.formats.tar import write_shard
from rayclip.data.manifest import Manifest
from rayclip.errors import UserError
from rayclip.evaluation.suite import open_suite
from rayclip.models.clip import CLIP
from rayclip.orchestration.batch.embed import Embedder, open_model, reading_of
from rayclip.orchestration.batch.features import images_of
from rayclip.serve.images import RequestError, decode_image

folder = Path(sys.argv[1])


def png(size):
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, "PNG")
    return file.getvalue()


IMAGES = {"normal": png((640, 480)), "thin": png((15_000, 1))}
vision = VisionConfig(image_size=224, patch_size=32, width=16, layers=1, heads=2)
config = ModelConfig(embed_dim=16, vision=vision, text=TextConfig(context_length=16, width=16, layers=1, heads=2))
save_file(CLIP(config).state_dict(), folder / "model.safetensors")
(folder / "config.json").write_text(json.dumps({"name": "tiny", "model": config.model_dump(mode="json")}))
for name, image in IMAGES.items():
    path = folder / "data" / name / "test"
    path.mkdir(parents=True)
    with (path / "0.tar").open("wb") as file:
        spans = write_shard(file, [{"__key__": b"0", "png": image, "txt": b"x"}], 5)
    Manifest.from_spans(str(path), [("0.tar", (path / "0.tar").stat().st_size, spans)]).save()
model, loaded = open_model(str(folder), None), load(str(folder))


def embed(name):
    path = str(folder / "data" / name / "test")
    config = EmbedConfig(model=str(folder), data=path, output=str(folder / "out"))
    return Embedder(model, reading_of(config, path, Manifest.load(path).digest, "both"))(0).tally["causes"]


def evaluate(name):
    suite = SuiteConfig(
        model=str(folder), name="s", datasets={name: {"tasks": ["retrieval"]}}, root=str(folder / "data"),
        cache=str(folder / "cache"),
    )
    (dataset,) = open_suite(suite).datasets
    return images_of(dataset, model, suite).job.make()(0).tally["causes"]


def serve(name):
    return decode_image(IMAGES[name], 224, 50_000_000).shape


def api(name):
    return loaded.encode_images(Image.open(io.BytesIO(IMAGES[name]))).shape


def run(name):
    found = {}
    for work in (embed, evaluate, serve, api):
        try:
            found[work.__name__] = str(work(name))
        except (UserError, RequestError) as error:
            found[work.__name__] = str(error)
    return found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


normal, before = run("normal")
thin, after = run("thin")
print(json.dumps({"normal": normal, "thin": thin, "more_MB": after - before}))
"""


def test_its_memory_is_bounded_in_embed_evaluate_serve_and_the_api(tmp_path):
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    thin = found["thin"]
    assert thin["embed"] == "{'image_too_thin': 1}"
    assert thin["evaluate"].endswith("sample '0' cannot be evaluated: image_too_thin")
    assert thin["serve"] == "the picture has 15000 x 1 pixels; a side may be at most 200 times the other"
    assert thin["api"].endswith("cannot be decoded: a side may be at most 200 times the other")
    assert found["normal"]["embed"] == found["normal"]["evaluate"] == "{}"
    assert found["more_MB"] < 64, found  # resized to 224 x 3,360,000 it would be 2,258
