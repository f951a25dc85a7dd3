"""What the benchmarks of the loader compute from what they see."""

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.fast_path import ReferenceStream, reference_crop
from benchmarks.loader import _gaps
from benchmarks.loader_data import Data
from rayclip.data.decode import open_image
from rayclip.data.stream import Stream


def told(pause_s, epochs=2, windows=4, burst=4):
    """Batches of windows that take a second each, with a pause before the second epoch."""
    rows = []
    for window in range(epochs * windows):
        for batch in range(burst):
            at = window + 0.01 * batch + (pause_s if window >= windows else 0)
            rows.append((at, 128, window * 8 + 2 * batch + 1))
    return np.array(rows)


@pytest.mark.parametrize("pause_s", [0.0, 3.0])
def test_a_pause_at_an_epochs_end_is_seen_there_and_nowhere_else(pause_s):
    gaps = _gaps(told(pause_s), SimpleNamespace(manifest=range(32)))
    assert gaps["wait_at_an_epochs_end_s"] == pytest.approx(0.97 + pause_s, abs=1e-3)
    assert gaps["wait_elsewhere_s"] == gaps["longest_wait_elsewhere_s"] == pytest.approx(0.97, abs=1e-3)


def test_the_reference_stream_differs_in_its_pixels_alone_and_by_little(tmp_path):
    spec = Data(tmp_path / "data", 256, 24).spec(1)
    ours, reference = (stream.read(0) for stream in (Stream(spec), ReferenceStream(spec)))
    for name in ours.keys() - {"image"}:
        assert (ours[name] == reference[name]).all()
    difference = np.abs(ours["image"].astype(int) - reference["image"])
    assert 0 < difference.mean() < 1.5


def test_the_reference_crop_of_all_is_the_picture(tmp_path):
    data = Data(tmp_path / "data", 64, 1).files[0]
    assert (reference_crop(data, lambda wide, high: (0, 0, wide, high), 64) == np.asarray(open_image(data))).all()
