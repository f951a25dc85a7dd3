"""What probes are told: a service that is busy is well, one whose model does not answer is not."""

import asyncio

import httpx2
import pytest

from rayclip.serve.api import build_api
from rayclip.serve.config import ServeConfig
from rayclip.serve.images import RequestError
from rayclip.serve.service import Service
from rayclip.serve.versions.routing_table import RoutingTable


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (None, 200),
        (RequestError(429, "the service is busy", "overloaded"), 200),
        (RequestError(503, "the model cannot be loaded", "model_failed"), 503),
        (RuntimeError("inside"), 503),
    ],
)
def test_health(monkeypatch, raised, status):
    service = Service(ServeConfig(model="nothing"), None, None, None)
    service._table = RoutingTable({"a/1": 0.5, "a/2": 0.5}, {})
    service._has_been_ready = True

    async def answer(*_):
        if raised:
            raise raised

    monkeypatch.setattr(service, "encode_images", answer)
    monkeypatch.setattr(service, "encode_texts", answer)

    async def ask():
        transport = httpx2.ASGITransport(app=build_api(service, None))
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/healthz")

    response = asyncio.run(ask())
    assert response.status_code == status and "inside" not in response.text
