"""Replicas rise under a burst and fall after it, with delays short enough to watch."""

import time

import pytest

from tests.serve.load import Load


@pytest.fixture(scope="module")
def service(start_service, model_folder):
    service = start_service(
        f"model={model_folder}",
        "poll_s=0.3",
        "image_encoder.max_replicas=2",
        # The tiny model is so fast that hardly two requests ever meet: what they spend in decoding must count as load.
        "image_encoder.target_ongoing_requests=0.1",
        "image_encoder.upscale_delay_s=0.5",
        "image_encoder.downscale_delay_s=2",
    )
    yield service
    service.stop()


def test_replicas_rise_under_a_burst_and_fall_after_it(service, encoded):
    body = {"images": [encoded(seed, "JPEG", (600, 400)) for seed in range(8)], "labels": ["a cat", "a dog"]}
    assert len(service.replicas("ImageEncoder")) == 1
    deadline = time.monotonic() + 90
    with Load(f"{service.url}/v1/zero-shot", body, rate=10) as load:
        while len(service.replicas("ImageEncoder")) < 2:
            assert time.monotonic() < deadline, "no second replica came"
            time.sleep(0.2)
        time.sleep(3)
    assert set(load.statuses()) == {200}
    deadline = time.monotonic() + 90
    while len(service.replicas("ImageEncoder")) > 1:
        assert time.monotonic() < deadline, "the second replica stayed"
        time.sleep(0.2)
    assert service.post("/v1/zero-shot", {**body, "images": body["images"][:1]})["results"]
