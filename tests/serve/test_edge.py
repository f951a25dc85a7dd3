"""Requests at the edge of what clients send: read, or refused with the name of what is wrong; nothing cut unsaid."""

import base64
import gzip
import io
import json
import re
import urllib.parse

import numpy as np
import pytest
from huggingface_hub import InferenceClient
from PIL import Image

from rayclip.serve.routes import _notices
from rayclip.serve.service import score
from rayclip.serve.towers.encoders import ClassMatrix

LONG = "word " * 300


def uris(data):
    """The same image in forms of a data: URI that people and programs write."""
    text = base64.b64encode(data).decode()
    return [
        f"data:image/png;base64,{text}",
        f"DATA:IMAGE/PNG;BASE64,{text}",
        f"  data: image/png ; base64 , {text[:40]} \n{text[40:]}",
        f"data:image/png;name=a%20b.png;charset=utf-8;base64,{text}",
        f"data:image/x-unknown;base64,{text}",
        f"data:application/octet-stream;base64,{text}",
        f"data:;base64,{text}",
        f"data:image/png;base64,{urllib.parse.quote(text, safe='')}",
        f"data:image/png;base64,{text.rstrip('=')}",
        f"data:image/png,{urllib.parse.quote_from_bytes(data)}",
    ]


def bodies(uri):
    """A request of every kind that takes an image, with what errors call it."""
    labels = ["a", "b"]
    task = {"parameters": {"candidate_labels": labels}}
    return [
        ("/v1/zero-shot", {"image": uri, "labels": labels}, "image"),
        ("/v1/zero-shot-image-classification", {"inputs": uri, **task}, "inputs"),
        ("/", {"inputs": {"image": uri}, **task}, "inputs"),
        ("/v1/embeddings", {"input": uri}, "input"),
        ("/v1/embeddings", {"input": ["a", uri, "b"]}, "input[1]"),
        ("/v1/rank", {"query": uri, "candidates": ["a", "b"]}, "query"),
        ("/v1/rank", {"query": "a", "candidates": ["b", uri]}, "candidates[1]"),
        ("/v1/rank", {"query": "a", "candidates": ["b", {"image": uri}]}, "candidates[1].image"),
    ]


@pytest.mark.parametrize("place", range(8))
def test_a_data_uri_is_an_image_in_every_endpoint(service, make_image, place):
    data = make_image(3)
    first, *others = uris(data)
    path, body, _ = bodies(first)[place]
    wanted = service.post(path, body)
    plain = base64.b64encode(data).decode()
    if "embeddings" in path:
        explicit = service.post(path, {"input": plain, "modality": "image"})["data"][0]["embedding"]
        np.testing.assert_allclose(
            wanted["data"][-2 if len(wanted["data"]) > 1 else 0]["embedding"], explicit, atol=1e-6
        )
    for uri in others:
        got = service.post(path, bodies(uri)[place][1])
        if "embeddings" in path:
            for one, other in zip(got["data"], wanted["data"], strict=True):
                np.testing.assert_allclose(one["embedding"], other["embedding"], atol=1e-6)
        else:
            assert got == wanted, uri[:60]


@pytest.mark.parametrize("place", range(8))
def test_a_data_uri_that_is_no_image_is_refused_by_its_name(service, place):
    for uri in ("data:text/plain;base64,aGVsbG8=", "data:,hello", "data:image/png;base64,%%%", "data:image/png;base64"):
        path, body, name = bodies(uri)[place]
        status, answer, _ = service.ask("POST", path, body)
        error = answer.get("error")
        assert status == 422, (uri, answer)
        assert error["code"].startswith("image_")
        assert error["param"] == (name if path != "/" and "zero" not in path else error["param"])


def test_a_form_takes_a_data_uri_too(service, make_image):
    fields = [("image", uris(make_image(3))[2]), ("labels", "a"), ("labels", "b")]
    parts = [f'--B\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in fields]
    body = ("".join(parts) + "--B--\r\n").encode()
    answer = service.ask("POST", "/v1/zero-shot", body, {"Content-Type": "multipart/form-data; boundary=B"})
    assert answer[0] == 200, answer


def test_a_caption_about_data_is_a_text(service):
    answer = service.post("/v1/embeddings", {"input": ["Data: cats, dogs and image captions"]})
    assert answer["usage"]["prompt_tokens"] > 3


def test_encoding_format_may_be_null(service):
    answer = service.post("/v1/embeddings", {"input": "a", "encoding_format": None, "dimensions": None, "user": None})
    assert isinstance(answer["data"][0]["embedding"], list)


@pytest.mark.parametrize(
    ("path", "body", "param", "said"),
    [
        ("/v1/embeddings", {"input": ["a", ""]}, "input[1]", "at least 1 character"),
        ("/v1/embeddings", {"input": ""}, "input", "at least 1 character"),
        ("/v1/embeddings", {"input": ["a", 5]}, "input[1]", "valid string"),
        ("/v1/embeddings", {"input": [1, 2, 3]}, "input", "arrays of tokens are not read"),
        ("/v1/embeddings", {"input": [[1, 2], [3]]}, "input", "arrays of tokens are not read"),
        ("/v1/embeddings", {"input": ["a", "b" * 3000]}, "input[1]", "input[1] has 3000 characters"),
        ("/v1/embeddings", {"input": "b" * 3000}, "input", "input has 3000 characters"),
        ("/v1/embeddings", {"input": ["a"] * 2049}, "input", "2049 inputs; at most 2048 are allowed"),
        ("/v1/rank", {"query": "", "candidates": ["a"]}, "query", "at least 1 character"),
        ("/v1/rank", {"query": "a", "candidates": ["a", ""]}, "candidates[1]", "at least 1 character"),
        ("/v1/rank", {"query": "a", "candidates": ["a", {"text": ""}]}, "candidates[1].text", "at least 1 character"),
        ("/v1/rank", {"query": "a" * 3000, "candidates": ["a"]}, "query", "query has 3000 characters"),
        ("/v1/rank", {"query": "a", "candidates": ["a", "b" * 3000]}, "candidates[1]", "3000 characters"),
        ("/v1/rank", {"query": "a", "candidates": ["a", {"image": "%%"}]}, "candidates[1].image", "base64"),
        ("/v1/rank", {"query": {"image": "QUJD"}, "candidates": ["a"]}, "query.image", "cannot be decoded"),
        ("/v1/rank", {"query": "a", "candidates": ["a"] * 2049}, "candidates", "at most"),
        ("/v1/zero-shot", {"image": "QUJD", "labels": ["a", ""]}, "labels[1]", "at least 1 character"),
    ],
)
def test_the_item_that_is_wrong_is_named(service, path, body, param, said):
    status, answer, _ = service.ask("POST", path, body)
    assert (status, answer["error"]["param"]) == (422, param), answer
    assert said in answer["error"]["message"]


def test_as_many_inputs_as_openai_takes(service):
    texts = [f"text {i}" for i in range(2048)]
    answer = service.post("/v1/embeddings", {"input": texts, "encoding_format": "base64"})
    assert [each["index"] for each in answer["data"]] == list(range(2048))
    assert len(service.post("/v1/rank", {"query": "text 7", "candidates": texts})["results"]) == 2048


def test_a_text_that_is_cut_is_said(service, encoded):
    answer = service.post("/v1/embeddings", {"input": ["a", LONG, "b"]})
    alone = service.post("/v1/embeddings", {"input": LONG})
    short = service.post("/v1/embeddings", {"input": ["a", "b"]})
    assert "warnings" not in short and short["usage"]["truncated_texts"] == 0
    assert (answer["usage"]["truncated_texts"], alone["usage"]["truncated_texts"]) == (1, 1)
    assert answer["usage"]["total_tokens"] == short["usage"]["total_tokens"] + alone["usage"]["total_tokens"]
    (notice,) = answer["warnings"]
    assert (notice["code"], notice["params"]) == ("text_truncated", ["input[1]"])

    shot = {"image": encoded(1), "labels": ["a", LONG, "b"], "templates": "plain"}
    (notice,) = service.post("/v1/zero-shot", shot)["warnings"]
    assert notice["params"] == ["labels[1]"]
    assert service.post("/v1/zero-shot", shot)["warnings"] == [notice]  # from the cache too
    # Not the label, but what the template makes of it.
    by_template = service.post("/v1/zero-shot", {**shot, "labels": ["a"], "templates": [LONG + "{}"]})
    assert by_template["warnings"][0]["params"] == ["labels[0]"]
    assert "warnings" not in service.post("/v1/zero-shot", {**shot, "labels": ["a", "b"]})

    ranked = service.post("/v1/rank", {"query": LONG, "candidates": ["a", LONG]})
    assert ranked["warnings"][0]["params"] == ["query", "candidates[1]"]

    task = {"inputs": encoded(1), "parameters": {"candidate_labels": ["a", LONG]}}
    assert "candidate_labels[1]" in service.ask("POST", "/", task)[2]["x-warning"]

    for path, body, param in (
        ("/v1/embeddings", {"input": ["a", LONG]}, "input[1]"),
        ("/v1/rank", {"query": "a", "candidates": ["b", LONG]}, "candidates[1]"),
        ("/v1/zero-shot", shot, "labels[1]"),
    ):
        status, answer, _ = service.ask("POST", path, {**body, "truncate": False})
        assert (status, answer["error"]["code"], answer["error"]["param"]) == (422, "text_truncated", param)
    assert service.ask("POST", "/v1/embeddings", {"input": ["a", "b"], "truncate": False})[0] == 200


def test_a_long_list_of_what_was_cut_is_shortened():
    (notice,) = _notices([f"input[{i}]" for i in range(500)])
    assert len(notice.params) == 20
    assert "input[0] and 499 more" in notice.message


def test_head_wherever_there_is_get(service):
    for path in ("/", "/docs", "/healthz", "/livez", "/v1/models", "/metrics", "/openapi.json", "/page/app.js"):
        status, body, headers = service.ask("HEAD", path)
        assert (status, body) == (200, b""), path
        assert headers["content-type"] == service.ask("GET", path)[2]["content-type"]
    assert service.ask("HEAD", "/nothing")[0] == 404
    assert service.ask("HEAD", "/v1/rank")[0] == 405


def test_probes(service):
    for path in ("/healthz", "/health", "/readyz", "/livez"):
        assert service.ask("GET", path)[:2] == (200, b"ok\n")


def test_one_model(service):
    (model,) = service.ask("GET", "/v1/models")[1]["data"]
    for name in (model["id"], urllib.parse.quote(model["id"], safe="")):
        assert service.ask("GET", f"/v1/models/{name}")[:2] == (200, model)
    status, answer, _ = service.ask("GET", "/v1/models/nothing/7")
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


def test_hugging_faces_client_at_the_services_own_address(service, make_image):
    for address in (service.url, f"{service.url}/"):
        answer = InferenceClient(model=address).zero_shot_image_classification(
            make_image(21), candidate_labels=["a cat", "a dog"], hypothesis_template="a {}"
        )
        assert {each.label for each in answer} == {"a cat", "a dog"}
        assert sum(each.score for each in answer) == pytest.approx(1, abs=1e-5)


def test_the_documentation_comes_from_the_service_alone(service):
    page = service.ask("GET", "/docs")[1].decode()
    links = [part.split('"')[0] for mark in ('href="', 'src="') for part in page.split(mark)[1:]]
    links = [link for link in links if not link.startswith("data:")]
    assert len(links) >= 4
    for link in links:
        assert service.ask("GET", f"/{link}")[0] == 200, link
    assert "SwaggerUIBundle" in service.ask("GET", "/page/swagger-ui-bundle.js")[1].decode()


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_work_behind_a_proxy_that_takes_a_prefix_away(service, path):
    """As under --root-path: whatever a page asks for lies below the address that the page has outside."""
    page = service.ask("GET", path)[1].decode()
    links = [part.split('"')[0] for mark in ('href="', 'src="') for part in page.split(mark)[1:]]
    scripts = [service.ask("GET", f"/{link}")[1].decode() for link in links if link in ("page/app.js", "page/docs.js")]
    asked = [found for script in scripts for found in re.findall(r"""["'`](\/?(?:v1|openapi)[^"'`$]*)""", script)]
    assert scripts and asked
    for link in (*links, *asked):
        if not link.startswith(("data:", "#", "https://")):
            assert urllib.parse.urljoin(f"http://h/models/clip{path}", link).startswith("http://h/models/clip/"), link


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP, identity"])
def test_a_body_may_be_in_gzip(service, encoding):
    body = {"input": [f"text {i}" for i in range(50)]}
    data = json.dumps(body).encode()
    two = gzip.compress(data[:100]) + gzip.compress(data[100:])
    for packed in (gzip.compress(data), two):
        headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
        status, answer, _ = service.ask("POST", "/v1/embeddings", packed, headers)
        assert status == 200, answer
        assert len(answer["data"]) == 50


@pytest.mark.parametrize(
    ("packed", "encoding", "status", "code"),
    [
        (gzip.compress(b" " * 30_000_000), "gzip", 413, "body_too_large"),
        (gzip.compress(b'{"input": "a"}')[:-9], "gzip", 400, "bad_gzip"),
        (gzip.compress(b'{"input": "a"}')[:12], "gzip", 400, "bad_gzip"),
        (b'{"input": "a"}', "gzip", 400, "bad_gzip"),
        (gzip.compress(b'{"input": "a"}') + b"rest", "gzip", 400, "bad_gzip"),
        (b"", "gzip", 400, "bad_gzip"),
        (b'{"input": "a"}', "br", 415, "unsupported_encoding"),
        (gzip.compress(gzip.compress(b'{"input": "a"}')), "gzip, gzip", 415, "unsupported_encoding"),
    ],
    # The data hold the time that they were packed at: as names of tests they would differ between processes.
    ids=["bomb", "cut at its end", "cut early", "not packed", "more behind it", "empty", "other encoding", "twice"],
)
def test_a_packed_body_that_cannot_be_read_says_why(service, packed, encoding, status, code):
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    got, answer, headers = service.ask("POST", "/v1/embeddings", packed, headers)
    assert (got, answer["error"]["code"]) == (status, code)
    assert headers.get("accept-encoding") == ("gzip" if status == 415 else None)


def test_cosines_stay_within_one(service):
    answer = service.post("/v1/rank", {"query": "a cat", "candidates": ["a cat", "a dog"] * 50})
    assert all(-1 <= each["score"] <= 1 for each in answer["results"])
    row = np.full((1, 3), 0.57735034, np.float32)
    assert float((row @ row.T)[0, 0]) > 1
    matrix = ClassMatrix(np.concatenate([row, -row]), row[0], 14.0)
    assert score(row, matrix, "cosine").tolist() == [[1.0, -1.0]]


def test_avif_is_read(service, make_image):
    pixels = Image.open(io.BytesIO(make_image(5, "PNG", (64, 48)))).resize((16, 16)).resize((64, 48))
    rows = []
    for kind, options in (("PNG", {}), ("AVIF", {"quality": 100})):
        file = io.BytesIO()
        pixels.save(file, kind, **options)
        body = {"input": f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"}
        rows.append(service.post("/v1/embeddings", body)["data"][0]["embedding"])
    assert np.dot(*rows) > 0.99
