"""What strangers may send, in families of cases."""

import base64
import functools
import gzip
import json
import urllib.parse
from collections.abc import Callable, Iterator

import numpy as np

from tests.serve import evil_images
from tests.serve.evil_images import image as image_file
from tests.serve.evil_images import plain
from tests.serve.wire import ANY, FORM, JSON, MEGABYTE, NOT_HTTP, PNG, REFUSED, Case, form, post, request

FAMILIES: dict[str, Callable[[], Iterator["Case"]]] = {}


def family(cases: Callable[[], Iterator[Case]]) -> Callable[[], Iterator[Case]]:
    """Adds to FAMILIES."""
    FAMILIES[cases.__name__.strip("_")] = cases
    return cases


@functools.cache
def good_bodies() -> dict[str, dict]:
    """A body that each route takes."""
    text = base64.b64encode(image_file()).decode()
    return {
        "/v1/zero-shot": {
            "image": text,
            "labels": ["a", "b"],
            "templates": "photo",
            "top_k": 1,
            "scores": "softmax",
            "multi_label": False,
            "model": "clip",
        },
        "/v1/zero-shot-image-classification": {
            "inputs": text,
            "parameters": {"candidate_labels": ["a", "b"], "hypothesis_template": "a {}"},
        },
        "/": {
            "inputs": {"image": text},
            "parameters": {"candidate_labels": ["a", "b"]},
        },
        "/v1/embeddings": {
            "input": ["a", "b"],
            "model": "clip",
            "encoding_format": "float",
            "dimensions": 16,
            "modality": "text",
            "user": "me",
        },
        "/v1/rank": {"query": "a", "candidates": ["b", {"text": "c"}, {"image": text}], "top_k": 2, "model": "clip"},
    }


@family
def json_that_is_none() -> Iterator[Case]:
    """Bodies that are not JSON, or not an object, or more of it than anyone needs."""
    deep, million = 100_000, MEGABYTE
    bodies = {
        "empty": b"",
        "null": b"null",
        "number": b"0",
        "text": b'"a"',
        "true": b"true",
        "list": b"[]",
        "object": b"{}",
        "half": b'{"input": "a',
        "brace": b"{",
        "comma": b'{"input": "a",}',
        "comment": b'{"input": "a" /* b */}',
        "quotes": b"{'input': 'a'}",
        "two": b'{"input": "a"}{"input": "a"}',
        "bom": b'\xef\xbb\xbf{"input": "a"}',
        "utf-16": '{"input": "a"}'.encode("utf-16"),
        "utf-32": '{"input": "a"}'.encode("utf-32"),
        "no utf-8": b'{"input": "\xff\xfe", "query": "\xc0\xaf"}',
        "half a character": b'{"input": "\xe2\x82"}',
        "nul": b"\0" * 1000,
        "nul within": b'{"input\0": "a"}',
        "nan": b'{"input": NaN, "query": NaN, "labels": NaN}',
        "infinity": b'{"input": [Infinity, -Infinity]}',
        "1e999": b'{"input": "a", "dimensions": 1e999, "top_k": 1e999}',
        "long number": b'{"input": "a", "dimensions": ' + b"9" * 100_000 + b"}",
        "long fraction": b'{"input": "a", "dimensions": 0.' + b"1" * million + b"}",
        "lone surrogate": rb'{"input": "\ud800", "query": "\udfff", "image": "\ud800"}',
        "lone surrogate as a key": rb'{"\ud800": "a"}',
        "twice": b'{"input": "a", "input": 5, "input": {}}',
        "deep lists": b'{"input": ' + b"[" * deep + b"]" * deep + b"}",
        "deep lists without end": b"[" * million,
        "deep objects": b'{"input": ' * deep + b"1" + b"}" * deep,
        "deep in a known key": b'{"labels": ' + b"[" * 150 + b"]" * 150 + b"}",
        "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94",
        "xml": b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>',
        "gzip": gzip.compress(b'{"input": "a"}'),
        "prototype": b'{"__proto__": {}, "constructor": {}, "__class__": "a", "__init__": 0}',
    }
    for path in good_bodies():
        for name, body in bodies.items():
            allowed = (
                ANY if name in ("bom", "utf-16", "utf-32") else REFUSED
            )  # old encodings of JSON, which may be read
            yield Case(f"{path} {name}", post(path, body), allowed)


@family
def ten_megabytes_of_json() -> Iterator[Case]:
    """Each was minutes and gigabytes where a list's or an object's errors were all collected."""
    n = 10 * MEGABYTE
    fillings = {
        "spaces": b" " * n,
        "a text": b'"' + b"a" * n + b'"',
        "an escaped text": b'"' + rb"\u0001" * (n // 6) + b'"',
        "numbers": b"[" + b"0," * (n // 2) + b"0]",
        "texts": b"[" + b'"a",' * (n // 4) + b'"a"]',
        "empty texts": b"[" + b'"",' * (n // 3) + b'""]',
        "lists": b"[" + b"[]," * (n // 3) + b"[]]",
        "objects": b"[" + b"{}," * (n // 3) + b"{}]",
        "texts as objects": b"[" + b'{"text":"a"},' * (n // 13) + b'{"text":"a"}]',
        "keys": b"{" + b",".join(b'"%d":0' % i for i in range(n // 10)) + b"}",
    }
    for path, key, names in (
        ("/v1/zero-shot", "labels", tuple(fillings)),
        ("/v1/embeddings", "input", ("a text", "numbers", "texts", "lists", "keys")),
        ("/v1/rank", "candidates", ("numbers", "texts", "texts as objects")),
        ("/v1/zero-shot-image-classification", "parameters", ("numbers", "keys")),
    ):
        rest = json.dumps({k: v for k, v in good_bodies()[path].items() if k != key})[:-1].encode()
        for name in names:
            body = rest + b', "' + key.encode() + b'": ' + fillings[name] + b"}"
            yield Case(f"{path} {key}: 10 MB of {name}", post(path, body), REFUSED)
    yield Case("a million keys", post("/v1/rank", fillings["keys"]), frozenset({422}))


@family
def wrong_values() -> Iterator[Case]:
    """Every key of every body, with what does not belong there."""
    values = [None, True, 0, -1, 2**63, 10**30, 1.5, "", "\0", [], {}, [[]], [None], [{}], {"image": {}}, {"text": 5}]
    for path, body in good_bodies().items():
        for key in body:
            for value in values:
                yield Case(f"{path} {key}={value!r}"[:100], post(path, {**body, key: value}))
    path, body = "/v1/zero-shot-image-classification", good_bodies()["/v1/zero-shot-image-classification"]
    for key in body["parameters"]:
        for value in values:
            inner = {**body, "parameters": {**body["parameters"], key: value}}
            yield Case(f"{path} {key}={value!r}"[:100], post(path, inner))
    for key in ("query", "candidates"):
        for value in values:
            inner = {"query": "a", "candidates": ["a"], key: {"text": value} if key == "query" else [{"image": value}]}
            yield Case(f"/v1/rank {key} of {value!r}"[:100], post("/v1/rank", inner))
    for key in ("labels", "templates"):
        for value in values:
            data = json.dumps({"labels": ["a"], key: value}).encode()
            yield Case(f"PUT {key}={value!r}"[:100], request("PUT", "/v1/label-sets/hostile", data, JSON))


@family
def too_much() -> Iterator[Case]:
    """More than the limits allow, and as much as they do."""
    text = base64.b64encode(image_file()).decode()
    shot, too_many = "/v1/zero-shot", frozenset({422})
    bodies = {
        "10,000 labels": {"image": text, "labels": [f"label {i}" for i in range(10_000)]},
        "10,000 equal labels": {"image": text, "labels": ["a"] * 10_000},
        "labels times templates": {"image": text, "labels": ["a"] * 2000, "templates": ["{}"] * 100},
        "10,000 templates": {"image": text, "labels": ["a"], "templates": ["{}"] * 10_000},
        "a huge label": {"image": text, "labels": ["a" * 5 * MEGABYTE]},
        "a huge label of few characters": {"image": text, "labels": ["\U0001f600" * MEGABYTE]},
        "a huge template": {"image": text, "labels": ["a"], "templates": "{}" * MEGABYTE},
        "a template that names its place often": {"image": text, "labels": ["a" * 2000], "templates": "{}" * 1000},
        "a huge name of a template set": {"image": text, "labels": ["a"], "templates": "a" * MEGABYTE},
        "10,000 pictures": {"images": [text[:4]] * 10_000, "labels": ["a"]},
        "65 pictures": {"images": [text] * 65, "labels": ["a"]},
        "base64 with a wrong end": {"image": "A" * 14 * MEGABYTE + "!", "labels": ["a"]},
        "line breaks": {"image": "\n" * 5 * MEGABYTE, "labels": ["a"]},
        "a huge data URI": {"image": "data:image/png;" + "base64;" * MEGABYTE + ",", "labels": ["a"]},
        "a huge type of a data URI": {"image": "data:" + "a" * 5 * MEGABYTE, "labels": ["a"]},
    }
    for name, body in bodies.items():
        yield Case(name, post(shot, body), too_many)
    for number in (2_050, 100_000):
        yield Case(f"{number} texts", post("/v1/embeddings", {"input": ["a"] * number}), too_many)
        yield Case(f"{number} candidates", post("/v1/rank", {"query": "a", "candidates": ["a"] * number}), too_many)
    yield Case("a long query", post("/v1/rank", {"query": "a" * MEGABYTE, "candidates": ["a"]}), too_many)
    yield Case("a long model", post(shot, {**good_bodies()[shot], "model": "a" * MEGABYTE}), frozenset({404}))
    for size in (300, 2001, 60_000):
        data = json.dumps({"labels": ["a"]}).encode()
        path = "/v1/label-sets/" + "a" * size
        yield Case(f"a name of {size}", request("PUT", path, data, JSON), too_many)
        yield Case(f"a name of {size} that is not there", request("GET", path), frozenset({404}))
    yield Case("a body of 21 MB", post(shot, b" " * 21 * MEGABYTE), frozenset({413}))
    yield Case("as many labels as may be", post(shot, {"image": text, "labels": ["a"] * 2000}), frozenset({200}))
    yield Case("as many texts as may be", post("/v1/embeddings", {"input": ["a"] * 2_048}), frozenset({200}))
    yield Case("as many pictures as may be", post(shot, {"images": [text] * 64, "labels": ["a"]}), frozenset({200}))


@family
def strange_texts() -> Iterator[Case]:
    """Texts as labels, templates, queries and names."""
    texts = {
        "emoji": "\U0001f468‍\U0001f469‍\U0001f467‍\U0001f466\U0001f3f3️‍\U0001f308",
        "right to left": "‮שלום‬ مرحبا",
        "control characters": "".join(map(chr, range(1, 32))) + "\x7f\x80\x9f",
        "nul": "a\0b",
        "not characters": "￿﷐\U0010ffff",
        "combining": "a" + "́" * 1000,
        "no width": "​﻿⁠",
        "spaces": "\u00a0\u2003\u3000a",
        "only spaces": " \u00a0\u2003\t\r\n",
        "ligatures": "ﷺ" * 500,
        "terminal": "\x1b[2J\x1b]0;owned\x07",
        "line breaks": "a\r\nSet-Cookie: b=c\r\n\r\n<html>",
        "format": "{0.__class__.__mro__} {} {{}} {a!r} %s %n ${jndi:ldap://a/b}",
        "html": "<script>alert(1)</script>",
        "sql": "'; DROP TABLE models; --",
        "entities": "&lt;&#0;&#xffffffff;&#999999999999999999999;",
        "path": "../../../../etc/passwd",
        "url": "http://example.org/",
        "bytes of a broken encoding": "Ã¢â‚¬â„¢" * 100,
    }
    text = base64.b64encode(image_file()).decode()
    for name, value in texts.items():
        image = {"image": text, "labels": ["a"]}
        yield Case(f"label: {name}", post("/v1/zero-shot", {**image, "labels": [value, "b"]}))
        yield Case(f"template: {name}", post("/v1/zero-shot", {**image, "templates": [value + "{}"]}))
        yield Case(f"model: {name}", post("/v1/zero-shot", {**image, "model": value}), frozenset({404}))
        yield Case(f"label set: {name}", post("/v1/zero-shot", {"image": text, "label_set": value}), frozenset({404}))
        yield Case(f"picture: {name}", post("/v1/zero-shot", {**image, "image": value}), frozenset({422}))
        yield Case(f"text: {name}", post("/v1/embeddings", {"input": value}), frozenset({200}))
        yield Case(f"query: {name}", post("/v1/rank", {"query": value, "candidates": [value]}), frozenset({200}))
        yield Case(f"key: {name}", post("/v1/rank", {"query": "a", "candidates": ["a"], value: 1}), frozenset({422}))
        path = "/v1/label-sets/" + urllib.parse.quote(value, safe="")
        for method in ("PUT", "GET", "DELETE"):
            body = json.dumps({"labels": [value]}).encode() if method == "PUT" else b""
            yield Case(f"{method} set: {name}", request(method, path, body, JSON))


@family
def bombs() -> Iterator[Case]:
    """Pictures that are small as files and large as anything else."""
    for name, data, allowed in evil_images.bombs():
        kind = name.split()[0].lower()
        yield Case(name, post("/v1/zero-shot?labels=a", data, (("Content-Type", f"image/{kind}"),)), allowed)
        if "49 million" in name:  # which take a second
            continue
        text = f"data:image/{kind};base64," + base64.b64encode(data).decode()
        yield Case(f"{name}, in JSON", post("/v1/zero-shot", {"image": text, "labels": ["a"]}), allowed)
        files = form(("labels", b"a"))[: -len(b"--B--\r\n")] + form(("images", data), is_file=True)
        yield Case(f"{name}, in a form", post("/v1/zero-shot", files, FORM), ANY)
    text = base64.b64encode(plain("PNG")).decode()
    several = {"images": [text] * 4, "labels": ["a"]}
    yield Case("four of 49 million pixels", post("/v1/zero-shot", several), frozenset({200}))


@family
def broken_images() -> Iterator[Case]:
    """Cut off, with bits turned, of other kinds, or no pictures at all."""
    path = "/v1/zero-shot?labels=a"
    random = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "AVIF"):
        data = image_file(kind)
        for part in range(8):
            yield Case(f"{part}/8 of a {kind}", post(path, data[: len(data) * part // 8], PNG))
        for seed in range(12):
            turned = np.frombuffer(data, np.uint8).copy()
            turned[random.integers(0, len(turned), 5)] = random.integers(0, 256, 5)
            yield Case(f"{kind} with bits turned, {seed}", post(path, turned.tobytes(), PNG))
    for texts in (["%%%"], ["%%%"] * 64, ["AAAA"], ["%%%", "AAAA"], ["http://a.test/"]):
        body = {"images": texts, "labels": ["a"]}
        yield Case(f"nothing but broken ones, {len(texts)} {texts[0]}", post("/v1/zero-shot", body), frozenset({200}))
    others = {
        "nothing": b"",
        "zeros": b"\0" * MEGABYTE,
        "noise": random.bytes(MEGABYTE),
        "BMP": image_file("BMP"),
        "TIFF": image_file("TIFF"),
        "ICO": image_file("ICO", (16, 16)),
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/etc/passwd) (r) file\n",
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "PDF": b"%PDF-1.7\n",
        "ZIP": b"PK\x03\x04" + b"\0" * 100,
        "HTML": b"<html><script>alert(1)</script></html>",
        "a PNG's beginning": b"\x89PNG\r\n\x1a\n",
        "a JPEG's beginning": b"\xff\xd8\xff",
        "a WebP's beginning": b"RIFF\xff\xff\xff\xffWEBPVP8 \xff\xff\xff\xff",
        "a GIF's beginning": b"GIF89a",
        "a WAV file": b"RIFF\x24\0\0\0WAVEfmt ",
    }
    for name, data in others.items():
        yield Case(name, post(path, data, PNG), frozenset({422}))
        for kind in ("application/octet-stream", "image/../../x", "image/"):
            yield Case(f"{name} as {kind}", post(path, data, (("Content-Type", kind),)), frozenset({422}))


@family
def forms() -> Iterator[Case]:
    """Forms that are none, or too much of one."""
    path = "/v1/zero-shot"
    whole = form(("labels", b"a"))[: -len(b"--B--\r\n")] + form(("image", image_file()), is_file=True)
    head = b"--B\r\nContent-Disposition: form-data; "
    bodies = {
        "nothing": b"",
        "no end": whole[:-8],
        "half": whole[: len(whole) // 2],
        "only a boundary": b"--B\r\n",
        "only the end": b"--B--\r\n",
        "no name": head + b"\r\n\r\na\r\n--B--\r\n",
        "no disposition": b"--B\r\n\r\na\r\n--B--\r\n",
        "no line ends": whole.replace(b"\r\n", b"\n"),
        "10,000 fields": form(*[("labels", b"a")] * 10_000),
        "10,000 files": form(*[("images", b"a")] * 10_000, is_file=True),
        "10,000 unknown fields": form(*[(f"a{i}", b"a") for i in range(10_000)]),
        "2,000 fields of many labels": form(*[("labels", b"[" + b'"a",' * 1000 + b'"a"]')] * 2_000),
        "deep lists": form(("labels", b"[" * MEGABYTE)),
        "numbers": form(("labels", b"[" + b"0," * MEGABYTE + b"0]")),
        "a long number": form(("labels", b"[" + b"9" * 100_000 + b"]")),
        "a long top_k": form(("labels", b"a"), ("top_k", b"9" * 100_000), ("image", b"aGk=")),
        "a huge field": form(("labels", b"a" * 15 * MEGABYTE)),
        "a huge name": form(("a" * MEGABYTE, b"a")),
        "a huge file": form(("image", b"\0" * 15 * MEGABYTE), is_file=True),
        "a long header": b"--B\r\nX-A: " + b"a" * MEGABYTE + b"\r\n\r\n\r\n--B--\r\n",
        "many headers": b"--B\r\n" + b"X-A: a\r\n" * 100_000 + b"\r\n\r\n--B--\r\n",
        "a path as a file's name": head + b'name="image"; filename="../../../etc/passwd"\r\n\r\na\r\n--B--\r\n',
        "a file's name in no encoding": head + b"name=\"image\"; filename*=x''%ff\r\n\r\na\r\n--B--\r\n",
        "a name in no encoding": head + b"name*=x''%ff; filename=a\r\n\r\na\r\n--B--\r\n",
        "a name that is no text": head + b'name="\xff\xfe"\r\n\r\na\r\n--B--\r\n',
        "labels as a file": form(("labels", b"a"), is_file=True),
        "a form in a form": head + b'name="image"\r\nContent-Type: multipart/mixed; boundary=C\r\n\r\n--C\r\n--B--\r\n',
    }
    for name, body in bodies.items():
        yield Case(name, post(path, body, FORM), REFUSED)
    for boundary in ("", '""', "B" * 5000, "\xff", "B; boundary=C", '"B', "--", " ", "B\t", "%42", "x\0"[:1]):
        kind = f"multipart/form-data; boundary={boundary}"
        yield Case(f"boundary {boundary[:10]!r}", post(path, whole, (("Content-Type", kind),)), ANY)
    for charset in (
        "undefined",
        "punycode",
        "idna",
        "unicode_escape",
        "utf-16",
        "utf-7",
        "hex",
        "zip",
        "x",
        "a" * 5000,
    ):
        body = form(("\\ud800" * 100 + "a" * 300_000 + "-b", b"\\ud800" * 1000))
        kind = f"multipart/form-data; boundary=B; charset={charset}"
        yield Case(f"charset {charset[:20]}", post(path, body, (("Content-Type", kind),)), frozenset({415}))


@family
def content_types() -> Iterator[Case]:
    """Kinds of bodies and how they are packed."""
    bomb = gzip.compress(b" " * 50 * MEGABYTE)
    for path, body in good_bodies().items():
        for kind in (
            "",
            "text/plain",
            "application/xml",
            "application/x-www-form-urlencoded",
            "a",
            "/",
            "\xff",
            "a" * 9999,
        ):
            yield Case(f"{path} as {kind[:20]!r}", post(path, body, (("Content-Type", kind),)))
        for coding in ("gzip", "deflate", "br", "zstd", "gzip, gzip", "x"):
            headers = (*JSON, ("Content-Encoding", coding))
            yield Case(f"{path}, bomb in {coding}", post(path, bomb, headers), REFUSED)
    packed = post("/v1/zero-shot?labels=a", gzip.compress(image_file()), (*PNG, ("Content-Encoding", "gzip")))
    yield Case("a packed picture", packed, frozenset({200}))
    for query in ("labels", "labels=&labels=", "labels=" + "%5B" * 10_000, "&".join(["labels=a"] * 5_000), "%ff=%ff",
                  "labels=a&top_k=" + "9" * 5_000, "labels=a&multi_label=maybe", "labels=a&model=%00", "a=b", "=&=&;",
                  "labels=[%22%5Cud800%22]", "labels=a&image=x", "labels=" + "a" * 50_000):  # fmt: skip
        yield Case(f"query {query[:20]}", post(f"/v1/zero-shot?{query}", image_file(), PNG))


@family
def urls() -> Iterator[Case]:
    """Tries to have the service ask its own network, with URLs switched off."""
    for url in SSRF:
        for path, body in (
            ("/v1/zero-shot", {"image": url, "labels": ["a"]}),
            ("/v1/zero-shot-image-classification", {"inputs": url, "parameters": {"candidate_labels": ["a"]}}),
            ("/v1/embeddings", {"input": url, "modality": "image"}),
            ("/v1/rank", {"query": {"image": url}, "candidates": ["a"]}),
        ):
            yield Case(f"{path} {url[:60]}", post(path, body), frozenset({422}))


@family
def methods_and_paths() -> Iterator[Case]:
    """What there is not."""
    nothing = frozenset({404})
    for path in ("/v1/zero-shot", "/v1/embeddings", "/v1/models", "/v1/label-sets", "/healthz", "/metrics", "/"):
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "PROPFIND", "PURGE"):
            yield Case(f"{method} {path}", request(method, path), ANY)
    for path in (
        "/page/../../etc/passwd",
        "/page/..%2f..%2f..%2fetc%2fpasswd",
        "/page/%2e%2e/%2e%2e/etc/passwd",
        "/page/..%5c..%5capi.py",
        "/page/....//....//etc/passwd",
        "/page/%252e%252e%252fetc%252fpasswd",
        "/page//etc/passwd",
        "/page/app.js%00.png",
        "/page/app.js/",
        "/page/",
        "/page",
        "/page/.",
        "/page/__init__.py",
        "/../serve/api.py",
        "/v1",
        "/v1/",
        "/V1/MODELS",
        "//v1/models",
        "/v1/models/",
        "/v1//models",
        "/v1/models/%2e%2e",
        "/v1/label-sets/",
        "/v1/label-sets/a/b",
        "/v1/label-sets/..%2f..%2fetc",
        "/v1/label-sets/%zz",
        "/v1/label-sets/%ff%fe",
        "/v1/label-sets/%ed%a0%80",
        "/.env",
        "/.git/config",
        "/admin",
        "/redoc/",
        "/docs/../v1/models",
        "/-/nothing",
        "/api/jobs/",
        "/%",
        "/%00",
        "/?" + "a=b&" * 10_000,
        "/" + "a" * 60_000,
        "/" + "%61" * 20_000,
        "/" + "a/" * 30_000,
    ):
        allowed = frozenset({200}) if path.startswith("/?") else nothing
        yield Case(f"GET {path[:60]}", request("GET", path), allowed)


@family
def headers() -> Iterator[Case]:
    """Headers that are HTTP and no good."""
    body = json.dumps({"input": "a"}).encode()
    for name, given in {
        "of 100 KB": [("X-A", "a" * 100_000)],
        "ninety": [(f"X-{i}", "a") for i in range(90)],
        "20,000 cookies": [("Cookie", "a=b; " * 20_000)],
        "8 bits": [("X-A", b"\xff\xfe\x80")],
        "an agent": [("User-Agent", b"() { :;}; echo \xff")],
        "forwarded": [("X-Forwarded-For", "127.0.0.1, ::1"), ("X-Forwarded-Proto", "file"), ("Forwarded", "for=a")],
        "prefix": [("X-Forwarded-Prefix", "/../.."), ("X-Script-Name", "/a"), ("X-Original-URL", "/admin")],
        "method": [("X-HTTP-Method-Override", "DELETE")],
        "range": [("Range", "bytes=0-18446744073709551615," * 100 + "0-1")],
        "origin": [("Origin", b"\xff"), ("Access-Control-Request-Method", "PUT")],
        "languages": [
            ("Accept", "*/*;q=" + "9" * 5_000),
            ("Accept-Encoding", "gzip;q=9e999"),
            ("Accept-Language", "-"),
        ],
        "expectations": [("Expect", "200-something")],
        "dates": [("If-Modified-Since", "0"), ("If-None-Match", "*"), ("Date", "9" * 1000)],
        "keys where none are asked": [("Authorization", b"Bearer \xff"), ("X-Api-Key", "a" * 50_000)],
        "tracing": [("traceparent", "00-" + "f" * 500), ("tracestate", "a=b," * 500), ("baggage", "a" * 9000)],
        "long request id": [("X-Request-ID", "a" * 60_000)],
    }.items():
        yield Case(name, post("/v1/embeddings", body, (*JSON, *given)), frozenset({200}))


@family
def not_http() -> Iterator[Case]:
    """Bytes that are no HTTP, or not quite."""
    body = b'{"input": "a"}'
    hello = b"GET /v1/models HTTP/1.1\r\nHost: a\r\n"
    chunked = (*JSON, ("Transfer-Encoding", "chunked"))
    for name, data in {
        "nothing of a kind": b"\0\x01\x02\xff\r\n\r\n",
        "TLS": b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + b"\0" * 512,
        "HTTP/0.9": b"GET /\r\n\r\n",
        "HTTP/9.9": request("GET", "/v1/models", version="9.9"),
        "HTTP/1.x": request("GET", "/v1/models", version="1.x"),
        "SSH": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        "memcached": b"stats\r\n\r\n",
        "a proxy's greeting": b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n" + request("GET", "/v1/models"),
        "no host": b"GET /v1/models HTTP/1.1\r\n\r\n"[:-2] + b"Connection: close\r\n\r\n",
        "two hosts": hello + b"Host: b\r\nConnection: close\r\n\r\n",
        "only line ends": b"GET /v1/models HTTP/1.1\nHost: a\nConnection: close\n\n",
        "a header without a colon": hello + b"garbage\r\n\r\n",
        "a header with a space": hello + b"X A: b\r\n\r\n",
        "a header without a name": hello + b": a\r\n\r\n",
        "a header's name of 8 bits": hello + b"X-\xff: a\r\n\r\n",
        "a header with a nul": hello + b"X-A: a\0b\r\n\r\n",
        "a folded header": hello + b"X-A: a\r\n b\r\nConnection: close\r\n\r\n",
        "a header of 1 MB": hello + b"X-A: " + b"a" * MEGABYTE + b"\r\n\r\n",
        "5,000 headers": hello + b"X-A: a\r\n" * 5_000 + b"\r\n",
        "a path of 1 MB": request("GET", "/" + "a" * MEGABYTE),
        "a path of 8 bits": request("GET", "/v1/label-sets/\xff"),
        "a path with a space": request("GET", "/v1/a b"),
        "no path": request("GET", "v1/models"),
        "another host's path": request("GET", "http://169.254.169.254/latest/meta-data"),
        "asterisk": request("OPTIONS", "*"),
        "no such method": request("FROBNICATE", "/v1/models"),
        "a method in small letters": request("get", "/v1/models"),
        "a method of 100 KB": request("A" * 100_000, "/v1/models"),
        "a negative length": request("POST", "/v1/embeddings", body, (*JSON, ("Content-Length", "-1"))),
        "a length that is none": request("POST", "/v1/embeddings", body, (*JSON, ("Content-Length", "a"))),
        "a hexadecimal length": request("POST", "/v1/embeddings", body, (*JSON, ("Content-Length", "0xe"))),
        "a length with a sign": request("POST", "/v1/embeddings", body, (*JSON, ("Content-Length", "+14"))),
        "two lengths": request(
            "POST", "/v1/embeddings", body, (*JSON, ("Content-Length", "14"), ("Content-Length", "3"))
        ),
        "a length of 19 nines": request("POST", "/v1/embeddings", body, (*JSON, ("Content-Length", "9" * 19))),
        "a length of 50 nines": request("POST", "/v1/embeddings", body, (*JSON, ("Content-Length", "9" * 50))),
        "too short a length": request("POST", "/v1/embeddings", body, (*JSON, ("Content-Length", "3"))),
        "a length and chunks": request("POST", "/v1/embeddings", body, (*chunked, ("Content-Length", "14"))),
        "a chunk without a length": request("POST", "/v1/embeddings", b"zz\r\n" + body, chunked),
        "a negative chunk": request("POST", "/v1/embeddings", b"-5\r\n" + body, chunked),
        "a chunk of 2^64": request("POST", "/v1/embeddings", b"1" + b"0" * 16 + b"\r\n" + body, chunked),
        "a chunk that is longer than it says": request("POST", "/v1/embeddings", b"3\r\n" + body + b"\r\n", chunked),
        "trailers of 1 MB": request(
            "POST", "/v1/embeddings", b"e\r\n" + body + b"\r\n0\r\nX-A: " + b"a" * MEGABYTE + b"\r\n\r\n", chunked
        ),
        "another transfer coding": request("POST", "/v1/embeddings", body, (*JSON, ("Transfer-Encoding", "x"))),
        "gzip as a transfer coding": request(
            "POST",
            "/v1/embeddings",
            b"e\r\n" + body + b"\r\n0\r\n\r\n",
            (*JSON, ("Transfer-Encoding", "gzip, chunked")),
        ),
        "a request in another's body": request(
            "POST", "/v1/embeddings", b"0\r\n\r\n" + request("GET", "/metrics"), (*chunked, ("Content-Length", "5"))
        ),
    }.items():
        yield Case(name, data, NOT_HTTP | {200} if name in _MAY_SUCCEED else NOT_HTTP)
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    key = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    yield Case("a websocket", hello + upgrade + key, frozenset({403}))
    for version in ("1.0", "1.1"):
        yield Case(f"HTTP/{version}", request("POST", "/v1/embeddings", body, JSON, version), frozenset({200}))
        yield Case(f"HTTP/{version}, chunked", request("GET", "/healthz", version=version), frozenset({200}))


_MAY_SUCCEED = ("HTTP/9.9", "no host", "only line ends", "a folded header")

SSRF = (
    "http://169.254.169.254/latest/meta-data/iam/security-credentials/",
    "http://metadata.google.internal/computeMetadata/v1/",
    "http://localhost:8265/api/jobs/",
    "http://127.0.0.1:8265/",
    "http://127.1/",
    "http://0/",
    "http://0.0.0.0:22/",
    "http://2130706433/",
    "http://0x7f000001/",
    "http://0177.0.0.1/",
    "http://[::1]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[fe80::1%25eth0]/",
    "http://192.168.0.1/",
    "http://10.0.0.1/",
    "http://localhost.localdomain/",
    "http://127.0.0.1.nip.io/",
    "http://a@127.0.0.1/",
    "http://allowed.test@127.0.0.1/",
    "http://127.0.0.1#@allowed.test/",
    "http://127.0.0.1\\@allowed.test/",
    "http://allowed.test:80@127.0.0.1:80/",
    "http:///etc/passwd",
    "http://%31%32%37.0.0.1/",
    "http://①②⑦.⓪.⓪.①/",
    "http://127。0。0。1/",
    "http://\r\nHost: a/",
    "http://127.0.0.1:99999/",
    "http://127.0.0.1:-1/",
    "HTTP://127.0.0.1/",
    "file:///etc/passwd",
    "file://localhost/etc/passwd",
    "FILE:///etc/passwd",
    "gopher://127.0.0.1:6379/_FLUSHALL",
    "dict://127.0.0.1:11211/stats",
    "ftp://127.0.0.1/",
    "ldap://127.0.0.1/",
    "s3://bucket/key",
    "unix:///var/run/docker.sock",
    "javascript://alert(1)",
    "http://" + "a" * 3000 + ".test/",
    "http://" + "a." * 500 + "test/",
    "//127.0.0.1/",
    "/etc/passwd",
    "data:text/html;base64,aGk=",
    "data:image/png,aGk=",
)
