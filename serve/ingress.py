"""The ingress deployment: FastAPI over the service, in as many replicas as HTTP needs."""

import os

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from rayclip.orchestration.cluster.ray_internals import serve_host
from rayclip.serve.api import build_api
from rayclip.serve.config import ServeConfig
from rayclip.serve.middleware.auth import KeyRing
from rayclip.serve.service import Service


@serve.ingress()
class Ingress:
    """HTTP in, scores out. It holds the cache of class matrices and no weights."""

    async def __init__(  # type: ignore[misc]
        self, config: ServeConfig, image: DeploymentHandle, text: DeploymentHandle, coordinator: DeploymentHandle
    ) -> None:
        # Where Serve itself was told to listen, whoever started it: the config's own host is only a wish.
        self._keys = KeyRing(config.auth, os.environ, serve_host() or config.host or "127.0.0.1")
        self._service = Service(config, image, text, coordinator, self._keys)
        await self._service.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._service, self._keys)
