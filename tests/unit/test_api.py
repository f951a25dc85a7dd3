"""The public API without Ray: loading by every name, images of every kind, answers against what they are made of."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import rayclip
from rayclip.data.decode import eval_array, open_image
from rayclip.data.tokenizer import get_tokenizer
from rayclip.inference.encoder import Encoder
from rayclip.inference.prompts import DEFAULT_TEMPLATES
from rayclip.inference.zero_shot import class_matrix
from rayclip.models.clip import CLIP
from rayclip.models.weights import read_weights, write_weights
from rayclip.tracking.mlflow import connect, open_run
from rayclip.tracking.registry import link_checkpoint, register
from rayclip.training.checkpoint import load_model

LABELS = ["a red square", "a blue circle", "noise"]
_EXIF_ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_config):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("api") / "tiny-checkpoint"
    folder.mkdir()
    save_file(CLIP(tiny_config).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"name": "tiny", "model": tiny_config.model_dump(mode="json")}))
    (folder / "metrics.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    return rayclip.load(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def encoder(checkpoint, tiny_config):
    return Encoder(load_model(checkpoint), get_tokenizer(tiny_config.text.context_length), "cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory, make_samples):
    """Images of different sizes as files, and their bytes."""
    folder = tmp_path_factory.mktemp("images")
    found = [(folder / f"{i}.png", sample["png"]) for i, sample in enumerate(make_samples(7))]
    for path, data in found:
        path.write_bytes(data)
    return found


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, rayclip; dir(rayclip); rayclip.__version__; rayclip.UserError; "
        "print([m for m in ('torch', 'ray', 'mlflow', 'numpy', 'pydantic', 'PIL', 'yaml') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.strip() == "[]"


def test_every_public_name_is_there_and_documented():
    assert set(rayclip.__all__) <= set(dir(rayclip))
    for name in rayclip.__all__:
        assert name == "__version__" or getattr(rayclip, name).__doc__
    with pytest.raises(AttributeError, match="nothing_such"):
        rayclip.nothing_such  # noqa: B018


def test_loading_and_encoding_import_no_ray(checkpoint):
    code = f"import sys, rayclip; rayclip.load({str(checkpoint)!r}).encode_texts('a'); print('ray' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert answer.stdout.strip() == "False"


def test_a_model_says_what_it_is(model, checkpoint, tiny_config):
    assert (model.name, model.image_size, model.embed_dim) == ("tiny", 16, tiny_config.embed_dim)
    assert model.version.startswith("tiny-checkpoint@")
    assert model.uri == str(checkpoint)
    assert model.device == torch.device("cpu")
    assert not model.clip.training
    assert "tiny-checkpoint@" in repr(model)


@pytest.mark.parametrize("kind", ["rayclip", "open_clip", "huggingface"])
def test_exported_weights_load_too(model, checkpoint, tmp_path, kind):
    # Heads of 64, or of the one width that the formats can name.
    weights = read_weights(checkpoint)
    try:
        write_weights(tmp_path / kind, weights, kind, "tiny")
    except rayclip.UserError as error:
        pytest.skip(str(error))
    features = rayclip.load(tmp_path / kind).encode_texts(LABELS)
    np.testing.assert_allclose(features, model.encode_texts(LABELS), atol=1e-6)


def test_a_registered_model_by_its_uri_and_by_its_bare_name(model, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYCLIP_CACHE", str(tmp_path / "cache"))
    uri = f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    client = connect(uri)
    logged = link_checkpoint(client, open_run(uri, "tests", "run", {}, {}, None), checkpoint, 1, {})
    register(client, logged, checkpoint, "letters")
    client.set_registered_model_alias("letters", "champion", "1")
    for name in ("models:/letters@champion", "models:/letters/1", "letters"):
        loaded = rayclip.load(name)
        assert (loaded.version, loaded.uri) == ("letters/1", "models:/letters/1")
        np.testing.assert_array_equal(loaded.encode_texts("noise"), model.encode_texts("noise"))
    client.set_registered_model_alias("letters", "other", "1")
    with pytest.raises(rayclip.UserError, match="models:/letters@champion, models:/letters@other"):
        rayclip.load("letters")
    with pytest.raises(rayclip.UserError, match=r"no model 'leters'.*did you mean 'letters'"):
        rayclip.load("leters")


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [
        ("not/there", None, "no model at 'not/there'"),
        ("models:/", None, "names no model"),
        (None, "no_such_device", "device 'no_such_device' is not there"),
        (None, "cuda:99", "device 'cuda:99' is not there"),
    ],
)
def test_what_cannot_be_loaded_is_a_user_error(checkpoint, name, device, message):
    with pytest.raises(rayclip.UserError, match=message):
        rayclip.load(checkpoint if name is None else name, device)


def test_every_kind_of_image_gives_the_evaluation_s_features(model, encoder, files):
    expected = encoder.encode_images(np.stack([eval_array(open_image(data), 16) for _, data in files])).numpy()
    kinds = [
        [str(path) for path, _ in files],
        [path for path, _ in files],
        [data for _, data in files],
        [Image.open(path) for path, _ in files],
        [np.array(Image.open(path)) for path, _ in files],
        [torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path, _ in files],
    ]
    mixed = [kinds[i % len(kinds)][i] for i in range(len(files))]
    for images in [*kinds, mixed, iter(mixed), tuple(kinds[3])]:
        features = model.encode_images(images, batch_size=3)
        assert features.dtype == np.float32
        np.testing.assert_allclose(features, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-6)


def test_one_image_one_array_of_many_and_none(model, files):
    path, data = files[0]
    one = model.encode_images(path)
    assert one.shape == (1, model.embed_dim)
    for single in (str(path), data, Image.open(path), np.array(Image.open(path))):
        np.testing.assert_array_equal(model.encode_images(single), one)
    batch = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    tensor = torch.from_numpy(batch).permute(0, 3, 1, 2)
    np.testing.assert_allclose(model.encode_images(batch), model.encode_images(list(batch)), atol=1e-6)
    np.testing.assert_allclose(model.encode_images(tensor), model.encode_images(batch), atol=1e-6)
    assert model.encode_images([]).shape == (0, model.embed_dim)


def test_grey_transparent_and_turned_images_are_shown_as_they_are_meant(model):
    pixels = np.random.default_rng(1).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    grey = pixels[:, :, 0]
    np.testing.assert_array_equal(model.encode_images(grey), model.encode_images(grey[:, :, None].repeat(3, axis=2)))
    clear = np.dstack([pixels, np.zeros_like(grey)])
    np.testing.assert_array_equal(model.encode_images(clear), model.encode_images(np.full_like(pixels, 255)))
    turned, exif = io.BytesIO(), Image.Exif()
    exif[_EXIF_ORIENTATION] = 6
    Image.fromarray(np.rot90(pixels)).save(turned, "PNG", exif=exif)
    np.testing.assert_array_equal(model.encode_images(turned.getvalue()), model.encode_images(pixels))
    np.testing.assert_array_equal(model.encode_images(Image.open(turned)), model.encode_images(pixels))


def test_a_generator_may_draw_into_the_same_memory(model):
    frames = np.random.default_rng(2).integers(0, 256, (40, 30, 30, 3), dtype=np.uint8)

    def drawn():
        canvas = np.empty_like(frames[0])
        for frame in frames:
            canvas[:] = frame
            yield canvas

    np.testing.assert_array_equal(model.encode_images(drawn()), model.encode_images(frames))


def test_one_image_may_stand_many_times(model, files):
    image = Image.open(files[0][0])
    np.testing.assert_allclose(
        model.encode_images([image] * 50), model.encode_images(files[0][0]).repeat(50, 0), atol=1e-6
    )


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (b"no image at all", r"images\[2\] cannot be decoded"),
        ("not_there.png", r"images\[2\]: there is no file 'not_there.png'"),
        ("https://example.org/a.png", r"images\[2\]: it is a URL"),
        (np.zeros((8, 8, 3), np.float32), r"images\[2\]: it is an array of float32; pixels must be uint8"),
        (np.zeros((8, 8, 2), np.uint8), r"images\[2\]: it is an array of shape \[8, 8, 2\]"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"images\[2\]: it is a tensor of shape \[8, 8, 3\]"),
        (7, r"images\[2\]: it is of type int"),
        (None, r"images\[2\]: it is of type NoneType"),
    ],
)
@pytest.mark.parametrize("lazily", [False, True])
def test_a_broken_image_is_named_by_its_index(model, files, broken, message, lazily):
    images = [files[0][0], files[1][1], broken, files[2][0]]
    with pytest.raises(rayclip.UserError, match=message):
        model.encode_images(iter(images) if lazily else images, batch_size=2)


def test_a_damaged_file_is_named_by_its_index_and_its_path(model, files, tmp_path):
    (tmp_path / "cut.png").write_bytes(files[0][1][:100])
    with pytest.raises(ValueError, match=r"images\[1\] \('.*cut.png'\) cannot be decoded"):
        model.encode_images([files[0][0], tmp_path / "cut.png"])
    with pytest.raises(rayclip.UserError, match="images are of type int"):
        model.encode_images(3)


def test_texts_as_the_encoder_has_them(model, encoder):
    features = model.encode_texts(LABELS, batch_size=2)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, encoder.encode_texts(LABELS).numpy(), atol=1e-6)
    np.testing.assert_allclose(model.encode_texts(iter(LABELS)), features, atol=1e-6)
    np.testing.assert_allclose(model.encode_texts(LABELS[1])[0], features[1], atol=1e-6)
    assert model.encode_texts([]).shape == (0, model.embed_dim)
    with pytest.raises(rayclip.UserError, match=r"texts\[1\] is of type int"):
        model.encode_texts(["a", 3])
    with pytest.raises(rayclip.UserError, match="batch_size is 0"):
        model.encode_texts(["a"], batch_size=0)


def test_classify_is_the_softmax_over_the_scaled_cosines(model, encoder, files):
    paths = [path for path, _ in files]
    result = model.classify(paths, LABELS)
    classes = class_matrix(encoder, LABELS, DEFAULT_TEMPLATES).double().numpy()
    logits = model.logit_scale * model.encode_images(paths).astype(np.float64) @ classes.T
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(result.probabilities, expected, atol=1e-5)
    assert result.labels == tuple(LABELS)
    assert result.model_version == model.version
    assert len(result) == len(paths)
    assert result.best == [LABELS[i] for i in expected.argmax(axis=1)]
    top = result.top(2)
    assert [len(row) for row in top] == [2] * len(paths)
    assert [row[0].label for row in top] == result.best
    assert all(row[0].score >= row[1].score for row in top)


def test_classify_knows_templates_and_the_other_scores(model, encoder, files):
    path = files[0][0]
    for templates in ("plain", "a picture of {}", ["{}", "one {}"]):
        classes = class_matrix(encoder, LABELS, templates).numpy()
        cosines = model.classify(path, LABELS, templates, scores="cosine").probabilities
        np.testing.assert_allclose(cosines, model.encode_images(path) @ classes.T, atol=1e-6)
    background = model.encode_texts("")
    alone = model.classify(path, LABELS, "plain", scores="sigmoid").probabilities
    cosines = model.classify(path, LABELS, "plain", scores="cosine").probabilities
    differences = model.logit_scale * (cosines - model.encode_images(path) @ background.T)
    np.testing.assert_allclose(alone, 1 / (1 + np.exp(-differences)), atol=1e-5)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([], {}, "list of classes is empty"),
        (["a", " "], {}, "has an empty name"),
        (LABELS, {"templates": "fotos"}, "unknown template set 'fotos'"),
        (LABELS, {"scores": "sofmax"}, "did you mean 'softmax'"),
    ],
)
def test_what_cannot_be_classified_is_a_user_error(model, files, labels, options, message):
    with pytest.raises(rayclip.UserError, match=message):
        model.classify(files[0][0], labels, **options)
