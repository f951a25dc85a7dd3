"""The peer of the service: open_clip behind FastAPI and uvicorn, a request at a time, as a careful team writes it.

python -m benchmarks.plain_server FOLDER --port N [--cached] [--warm-up FILE] [--workers W] [--threads T]
    [--at-once A]
"""

import argparse
import base64
import io
import json
import multiprocessing
import os
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import uvicorn
from anyio import to_thread
from fastapi import FastAPI
from PIL import Image
from pydantic import BaseModel
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.peers import load_open_clip

_SETTINGS = "RAYCLIP_PLAIN_SERVER"  # how uvicorn's worker processes learn them


class ZeroShot(BaseModel):
    """A picture and labels."""

    image: str
    labels: list[str]
    templates: str = "a photo of a {}."
    top_k: int = 5


def make_app() -> FastAPI:
    """The application of one worker process."""
    settings = json.loads(os.environ[_SETTINGS])
    torch.set_num_threads(settings["threads"])
    model, preprocess, tokenizer = _load(Path(settings["folder"]))

    def label_features(prompts: tuple[str, ...]) -> Tensor:
        return model.encode_text(tokenizer(list(prompts)), normalize=True)

    if settings["cached"]:
        label_features = lru_cache(maxsize=256)(label_features)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # Endpoints run in this pool. As it is, 40 threads would run the model at once and slow each other down.
        to_thread.current_default_thread_limiter().total_tokens = settings["at_once"]
        if settings["warm_up"]:
            # Here, in every process: which of them a request from outside meets is left to chance.
            first = Path(settings["warm_up"]).read_text().partition("\n")[0]
            await to_thread.run_sync(zero_shot, ZeroShot.model_validate_json(first))
        yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/zero-shot")
    def zero_shot(request: ZeroShot) -> dict[str, Any]:
        with torch.inference_mode():
            image = Image.open(io.BytesIO(base64.b64decode(request.image)))
            image_features = model.encode_image(preprocess(image).unsqueeze(0), normalize=True)
            text_features = label_features(tuple(request.templates.format(label) for label in request.labels))
            logits = model.logit_scale.exp() * image_features @ text_features.T
            scores, indices = logits.softmax(dim=-1)[0].topk(min(request.top_k, len(request.labels)))
        pairs = zip(scores.tolist(), indices.tolist(), strict=True)
        predictions = [{"label": request.labels[index], "score": score, "index": index} for score, index in pairs]
        return {"results": [{"index": 0, "predictions": predictions}]}

    return app


def _load(folder: Path) -> tuple[Any, Any, Any]:
    """open_clip's model with the checkpoint's weights, its preprocess and its tokenizer."""
    open_clip = load_open_clip()
    config = json.loads((folder / "config.json").read_text())["model"]
    vision, text = config["vision"], config["text"]
    vision_cfg = {key: vision[key] for key in ("image_size", "layers", "width", "patch_size")}
    vision_cfg["head_width"] = vision["width"] // vision["heads"]
    described = {
        "embed_dim": config["embed_dim"],
        "quick_gelu": config["quick_gelu"],
        "vision_cfg": vision_cfg,
        "text_cfg": text,
    }
    with tempfile.TemporaryDirectory() as described_in:
        (Path(described_in) / "checkpoint.json").write_text(json.dumps(described))
        open_clip.add_model_config(described_in)
        model, _, preprocess = open_clip.create_model_and_transforms("checkpoint", load_weights=False)
        tokenizer = open_clip.get_tokenizer("checkpoint")
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval(), preprocess, tokenizer


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--cached", action="store_true", help="keep the labels' features")
    parser.add_argument(
        "--warm-up", default="", help="file whose first line is a request that each process begins with"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each")
    parser.add_argument("--at-once", type=int, default=1, help="requests that each works on at once")
    settings = parser.parse_args()
    os.environ[_SETTINGS] = json.dumps(vars(settings))
    # For the processes that are started: not every library under torch heeds torch's own setting.
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_serve, args=(settings.port,), daemon=True) for _ in range(settings.workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _serve(port: int) -> None:
    """One worker process, on a socket of its own: of one that all share, the first to wake takes every connection."""
    config = uvicorn.Config(
        make_app(), host="127.0.0.1", port=port, access_log=False, log_level="warning", timeout_keep_alive=60
    )
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((config.host, port))
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    _main()
