"""The endpoints of a real service, beside offline evaluation and the clients that people use."""

import base64
import io
import struct
import time
import urllib.parse
import uuid

import numpy as np
import openai
import pytest
import torch
from huggingface_hub import InferenceClient
from PIL import Image

import rayclip
from rayclip.data.decode import eval_array
from rayclip.data.tokenizer import get_tokenizer
from rayclip.inference.encoder import Encoder
from rayclip.inference.prompts import TEMPLATES
from rayclip.inference.zero_shot import class_matrix, independent_scores, zero_shot_probabilities
from rayclip.training.checkpoint import load_model

LABELS = ["a red square", "a cat", "smörgåsbord", "a cat"]


@pytest.fixture(scope="module")
def offline(model_folder):
    """The same weights in this process."""
    model = load_model(model_folder)
    return Encoder(model, get_tokenizer(model.context_length), "cpu")


@pytest.fixture(scope="module")
def features(offline):
    """Offline features of encoded pictures."""

    def compute(*images):
        size = offline.model.visual.image_size
        return offline.encode_images(np.stack([eval_array(Image.open(io.BytesIO(data)), size) for data in images]))

    return compute


def scores_of(result, num_labels):
    scores = np.full(num_labels, np.nan)
    for prediction in result["predictions"]:
        scores[prediction["index"]] = prediction["score"]
    return scores


@pytest.mark.parametrize("templates", [None, "photo", ["a {} here", "{} there"], "one {}"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_scores_equal_offline_evaluation(service, offline, features, make_image, templates, kind):
    data = make_image(3, kind, (61, 47))
    body = {"image": base64.b64encode(data).decode(), "labels": LABELS}
    answer = service.post("/v1/zero-shot", body if templates is None else {**body, "templates": templates})
    matrix = class_matrix(offline, LABELS, templates or "photo_ensemble")
    expected = zero_shot_probabilities(features(data), matrix, offline.logit_scale)[0]
    (result,) = answer["results"]
    np.testing.assert_allclose(scores_of(result, 4), expected, atol=1e-5)
    predictions = result["predictions"]
    assert [p["score"] for p in predictions] == sorted((p["score"] for p in predictions), reverse=True)
    assert all(p["label"] == LABELS[p["index"]] for p in predictions)
    assert answer["model"].startswith("tiny@")


def test_labels_may_be_independent_or_bare_cosines(service, offline, features, make_image, encoded):
    matrix = class_matrix(offline, LABELS, "photo_ensemble")
    prompts = offline.encode_texts([template.replace("{}", "") for template in TEMPLATES["photo_ensemble"]])
    background = torch.nn.functional.normalize(prompts.mean(dim=0), dim=-1)
    image = features(make_image(5))
    independent = independent_scores(image, matrix, background, offline.logit_scale)[0]
    for body, expected in (
        ({"multi_label": True}, independent),
        ({"scores": "sigmoid"}, independent),
        ({"scores": "cosine"}, (image @ matrix.T)[0]),
    ):
        answer = service.post("/v1/zero-shot", {"image": encoded(5), "labels": LABELS, **body})
        np.testing.assert_allclose(scores_of(answer["results"][0], 4), expected, atol=1e-5)


def test_one_broken_picture_among_many_fails_alone(service, features, encoded, offline, make_image):
    images = [encoded(seed) for seed in range(32)]
    images[7] = base64.b64encode(b"\xff\xd8\xff no picture").decode()
    images[19] = "%%%"
    answer = service.post("/v1/zero-shot", {"images": images, "labels": LABELS, "scores": "cosine"})
    assert [result["index"] for result in answer["results"]] == list(range(32))
    broken = {i: r["error"]["code"] for i, r in enumerate(answer["results"]) if "error" in r}
    assert broken == {7: "image_undecodable", 19: "image_not_base64"}
    matrix = class_matrix(offline, LABELS, "photo_ensemble")
    expected = features(*[make_image(seed) for seed in range(32)]) @ matrix.T
    for i, result in enumerate(answer["results"]):
        if i not in broken:
            np.testing.assert_allclose(scores_of(result, 4), expected[i], atol=1e-5)


def test_a_single_broken_picture_is_a_422(service):
    status, answer, _ = service.ask("POST", "/v1/zero-shot", {"image": "AAAA", "labels": ["a"]})
    assert (status, answer["error"]["code"]) == (422, "image_undecodable")


def test_pictures_as_data_uri_form_and_raw_bytes(service, make_image):
    data = make_image(11, "JPEG")
    wanted = service.post("/v1/zero-shot", {"image": base64.b64encode(data).decode(), "labels": ["a", "b"], "top_k": 1})
    uri = "data:image/jpeg;base64," + base64.b64encode(data).decode()
    assert service.post("/v1/zero-shot", {"image": uri, "labels": ["a", "b"], "top_k": 1}) == wanted

    query = urllib.parse.urlencode([("labels", "a"), ("labels", "b"), ("top_k", 1)])
    raw = service.ask("POST", f"/v1/zero-shot?{query}", data, {"Content-Type": "image/jpeg"})
    assert raw[:2] == (200, wanted)

    boundary = uuid.uuid4().hex
    fields = [("labels", '["a", "b"]'), ("top_k", "1")]
    parts = [f'--{boundary}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode() for k, v in fields]
    file = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'.encode()
    body = b"".join([*parts, file, data, f"\r\n--{boundary}--\r\n".encode()])
    form = service.ask("POST", "/v1/zero-shot", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"})
    assert form[:2] == (200, wanted)


def test_the_second_request_with_the_same_labels_costs_no_text_tower_work(service, encoded):
    labels = [f"thing number {i}" for i in range(1000)]
    probes = 20  # health checks run the tower too, a text at a time

    def texts_and_hits():
        service.ask("GET", "/v1/models")
        time.sleep(1.5)  # every replica has reported
        lines = service.ask("GET", "/metrics")[1].decode().splitlines()
        values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}
        texts = sum(v for k, v in values.items() if k.startswith("rayclip_batch_size_sum") and 'tower="text"' in k)
        return texts, sum(v for k, v in values.items() if k.startswith("rayclip_class_matrix_hits"))

    body = {"image": encoded(1), "labels": labels, "templates": "plain", "top_k": 3}
    first = service.post("/v1/zero-shot", body)
    texts, hits = texts_and_hits()
    assert texts >= 1000
    assert service.post("/v1/zero-shot", body) == first
    texts_after, hits_after = texts_and_hits()
    assert hits_after == hits + 1
    assert texts_after - texts < probes
    # One label more costs that label alone.
    service.post("/v1/zero-shot", {**body, "labels": [*labels, "one more"]})
    assert 1 <= texts_and_hits()[0] - texts < 2 * probes


def test_label_sets_are_registered_once_and_used_by_name(service, encoded):
    path = "/v1/label-sets/" + urllib.parse.quote("animals / pets", safe="")
    body = {"labels": ["a cat", "a dog"], "templates": "photo"}
    assert service.ask("PUT", "/v1/label-sets/animals", body)[0] == 200
    by_name = service.post("/v1/zero-shot", {"image": encoded(2), "label_set": "animals"})
    assert by_name == service.post("/v1/zero-shot", {"image": encoded(2), **body})
    assert service.ask("GET", "/v1/label-sets/animals")[1] == {"name": "animals", **body}
    assert "animals" in [each["name"] for each in service.ask("GET", "/v1/label-sets")[1]["data"]]
    assert service.ask("DELETE", "/v1/label-sets/animals")[0] == 204
    status, answer, _ = service.ask("POST", "/v1/zero-shot", {"image": encoded(2), "label_set": "animals"})
    assert (status, answer["error"]["code"]) == (404, "label_set_not_found")
    assert service.ask("DELETE", path)[0] == 404


def test_hugging_faces_client(service, offline, features, make_image):
    data = make_image(21, "PNG")
    client = InferenceClient(model=f"{service.url}/v1/zero-shot-image-classification")
    answer = client.zero_shot_image_classification(
        data, candidate_labels=["a cat", "a dog", "a bird"], hypothesis_template="This is a photo of {}."
    )
    matrix = class_matrix(offline, ["a cat", "a dog", "a bird"], ["This is a photo of {}."])
    expected = zero_shot_probabilities(features(data), matrix, offline.logit_scale)[0]
    assert {each.label: pytest.approx(each.score, abs=1e-5) for each in answer} == dict(
        zip(["a cat", "a dog", "a bird"], expected.tolist(), strict=True)
    )
    assert [each.score for each in answer] == sorted((each.score for each in answer), reverse=True)


def test_openais_client(service, offline, features, make_image):
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)
    texts = ["a cat", "a much longer description of a dog that barks"]
    answer = client.embeddings.create(model="clip", input=texts)  # asks for base64 by itself
    got = np.array([each.embedding for each in answer.data])
    np.testing.assert_allclose(got, offline.encode_texts(texts), atol=1e-5)
    assert answer.usage.prompt_tokens == int(offline.tokenizer(texts)[1].sum())
    assert answer.model.startswith("tiny@")
    as_floats = client.embeddings.create(model=answer.model, input=texts, encoding_format="float")
    np.testing.assert_allclose([each.embedding for each in as_floats.data], got, atol=1e-7)

    data = make_image(4, "WEBP")
    uri = "data:image/webp;base64," + base64.b64encode(data).decode()
    mixed = client.embeddings.create(model="clip", input=["a cat", uri])
    np.testing.assert_allclose(mixed.data[1].embedding, features(data)[0], atol=1e-5)
    np.testing.assert_allclose(mixed.data[0].embedding, got[0], atol=1e-5)

    assert [model.id for model in client.models.list().data] == [answer.model]
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-9' is loaded"):
        client.embeddings.create(model="gpt-9", input="a cat")
    with pytest.raises(openai.UnprocessableEntityError, match=r"dimensions must be 16"):
        client.embeddings.create(model="clip", input="a cat", dimensions=8)


def test_base64_embeddings_are_little_endian_float32(service, offline):
    answer = service.post("/v1/embeddings", {"input": "a cat", "encoding_format": "base64"})
    raw = base64.b64decode(answer["data"][0]["embedding"])
    np.testing.assert_allclose(struct.unpack("<16f", raw), offline.encode_texts(["a cat"])[0], atol=1e-5)


def test_rank_by_text_and_by_picture(service, offline, features, make_image, encoded):
    candidates = ["a cat", {"image": encoded(8)}, {"text": "a dog"}]
    rows = torch.cat([offline.encode_texts(["a cat"]), features(make_image(8)), offline.encode_texts(["a dog"])])
    for query, feature in (
        ("a bird", offline.encode_texts(["a bird"])),
        ({"image": encoded(9)}, features(make_image(9))),
    ):
        answer = service.post("/v1/rank", {"query": query, "candidates": candidates})
        cosines = (rows @ feature[0]).numpy()
        assert [each["index"] for each in answer["results"]] == np.argsort(-cosines).tolist()
        np.testing.assert_allclose(
            [each["score"] for each in answer["results"]], cosines[np.argsort(-cosines)], atol=1e-5
        )
        shares = np.exp(offline.logit_scale * cosines - max(offline.logit_scale * cosines))
        np.testing.assert_allclose(
            [each["probability"] for each in answer["results"]], np.sort(shares / shares.sum())[::-1], atol=1e-5
        )
    assert len(service.post("/v1/rank", {"query": "x", "candidates": candidates, "top_k": 2})["results"]) == 2


def test_models_metrics_and_the_specification(service):
    (model,) = service.ask("GET", "/v1/models")[1]["data"]
    assert (model["state"], model["share"], model["embed_dim"], model["image_size"]) == ("serving", 1.0, 16, 16)
    assert service.ask("GET", "/healthz")[0] == 200
    text = service.ask("GET", "/metrics")[1].decode()
    assert 'rayclip_requests_total{model=""' in text
    specification = service.ask("GET", "/openapi.json")[1]
    assert set(specification["paths"]) >= {"/v1/zero-shot", "/v1/embeddings", "/v1/rank", "/v1/label-sets/{name}"}
    assert service.ask("GET", "/docs")[0] == 200


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"labels": ["a"]}, 422, "give exactly one of image and images"),
        ({"image": "IMAGE"}, 422, "give exactly one of labels and label_set"),
        ({"image": "IMAGE", "labels": []}, 422, "the list of classes is empty"),
        ({"image": "IMAGE", "labels": ["a", "  "]}, 422, "class 1 of 2 has an empty name"),
        ({"image": "IMAGE", "labels": ["a"], "lables": 1}, 422, "unknown key 'lables': did you mean 'labels'?"),
        ({"image": "IMAGE", "labels": ["a"], "templates": "fotos"}, 422, "unknown template set 'fotos'"),
        ({"image": "IMAGE", "labels": ["a"], "templates": ["x"]}, 422, "has no {} where the class name goes"),
        ({"image": "IMAGE", "labels": ["a"], "top_k": 0}, 422, "top_k: "),
        ({"image": "IMAGE", "labels": ["a"], "top_k": "3"}, 422, "top_k: "),
        ({"image": "IMAGE", "labels": ["a"], "multi_label": True, "scores": "softmax"}, 422, "multi_label contradicts"),
        ({"image": "IMAGE", "labels": ["a"] * 2001}, 422, "2001 labels; at most 2000 are allowed"),
        ({"image": "IMAGE", "labels": ["a" * 2001]}, 422, "labels[0] has 2001 characters; at most 2000"),
        ({"image": "IMAGE", "labels": ["a"], "model": "nope"}, 404, "no model 'nope' is loaded"),
        ({"images": ["IMAGE"] * 65, "labels": ["a"]}, 422, "65 pictures; at most 64 are allowed"),
        ({"image": "https://example.org/x.png", "labels": ["a"]}, 422, "URL"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(service, encoded, body, status, said):
    body = {key: encoded(0) if value == "IMAGE" else value for key, value in body.items()}
    if "images" in body:
        body["images"] = [encoded(0)] * len(body["images"])
    got, answer, _ = service.ask("POST", "/v1/zero-shot", body)
    assert got == status, answer
    assert said in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_pages_elsewhere_may_not_call_it_unless_allowed(service):
    headers = service.ask("POST", "/v1/embeddings", {"input": "a"}, {"Origin": "https://evil.example"})[2]
    assert "access-control-allow-origin" not in {name.lower() for name in headers}


def test_the_python_api_gives_the_same_answers(service, model_folder, make_image):
    """`rayclip.load(...).classify` beside /v1/zero-shot, in each kind of scores."""
    model = rayclip.load(model_folder, device="cpu")
    images = [make_image(seed, kind, (30 + seed, 44)) for seed, kind in enumerate(["PNG", "JPEG", "GIF"])]
    body = {"images": [base64.b64encode(data).decode() for data in images], "labels": LABELS}
    for scores in ("softmax", "sigmoid", "cosine"):
        answer = service.post("/v1/zero-shot", {**body, "scores": scores})
        result = model.classify(images, LABELS, scores=scores)
        served = [scores_of(each, len(LABELS)) for each in answer["results"]]
        np.testing.assert_allclose(result.probabilities, served, atol=1e-5)
        assert answer["model"] == result.model_version
