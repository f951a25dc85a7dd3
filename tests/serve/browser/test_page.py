"""The page at `/` in a real browser on the real service. What it shows is compared with a direct call over HTTP."""

import base64
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.browser

LABELS = ["cat", "dog", "a bowl of soup", "red bicycle", "Éclair"]
HARMFUL = '<img src=x onerror="window.harmed=true">'


def encode(image, file_format="PNG", **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def colours(seed, size=(60, 44)):
    """Smooth random colours: what a resize leaves alone."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


PICTURE = encode(colours(0))


@pytest.fixture
def predict(service):
    """The service's predictions for a picture's bytes."""

    def predict(picture, labels, **options):
        image = base64.b64encode(picture).decode()
        answer = service.post("/v1/zero-shot", {"image": image, "labels": labels, **options})
        return answer["results"][0]["predictions"]

    return predict


def is_question(request_or_response):
    return request_or_response.url.endswith("/v1/zero-shot")


def pick(page, picture=PICTURE, name="picture.png", mime="image/png", field="#file"):
    page.set_input_files(field, {"name": name, "mimeType": mime, "buffer": picture})


def answer_to(page, act):
    """The request and the answer's status that `act` leads to."""
    with page.expect_response(is_question) as caught:
        act()
    caught.value.finished()
    return json.loads(caught.value.request.post_data), caught.value.status


def shown(page, labels):
    """Label, percentage and width of each bar once exactly these labels are there and nothing moves any more."""
    page.wait_for_function(
        """(labels) => JSON.stringify([...document.querySelectorAll("#bars .label")].map((e) => e.textContent).sort())
            === JSON.stringify([...labels].sort()) && document.getAnimations().length === 0""",
        arg=labels,
    )
    return page.evaluate(
        """() => [...document.querySelectorAll("#bars li")].map((row) => {
            const [all, fill] = [row.getBoundingClientRect(), row.querySelector(".fill").getBoundingClientRect()];
            const score = row.querySelector(".score").textContent;
            return [row.querySelector(".label").textContent, score, (fill.right - all.left) / all.width, all.top];
        })"""
    )


def assert_shows(page, predictions):
    """The bars are these predictions, best first; bars that an answer is about to replace are given a moment."""
    scores = {one["label"]: one["score"] for one in predictions}
    for _ in range(300):
        rows = shown(page, list(scores))
        texts = {label: float(text.strip("<%")) for label, text, *_ in rows}
        if texts == pytest.approx({label: 100 * score for label, score in scores.items()}, abs=0.051):
            break
        page.wait_for_timeout(100)
    else:
        raise AssertionError(f"{texts} are not {scores}")
    assert {label: width for label, _, width, _ in rows} == pytest.approx(scores, abs=0.01)
    in_order = [scores[label] for label, *_ in rows]
    assert in_order == pytest.approx(sorted(in_order, reverse=True), abs=1e-6)
    tops = [top for *_, top in rows]
    assert tops == sorted(tops)
    return [label for label, *_ in rows]


def test_a_picture_and_labels_as_they_are_typed(page, predict, service):
    assert "With a picture and a few labels" in page.inner_text("#empty")
    pick(page)
    page.locator("#preview").wait_for()
    assert page.inner_text("#empty") == "Now type a label or two."
    # The cursor is in the labels already.
    asked, _ = answer_to(page, lambda: page.keyboard.type("cat\ndog,a bowl of soup"))
    assert base64.b64decode(asked["image"]) == PICTURE, "a small picture is sent as it is"
    first = assert_shows(page, predict(PICTURE, LABELS[:3], scores="softmax"))

    page.keyboard.type("\nred bicycle, Éclair,")
    more = assert_shows(page, predict(PICTURE, LABELS, scores="softmax"))
    assert len(more) == 5
    assert [label for label in more if label in first] == first
    assert page.inner_text("#count") == "5 labels"
    _, answer, _ = service.ask("GET", "/v1/models")
    (version,) = [model["id"] for model in answer["data"] if model["share"] == 1]
    assert page.inner_text("#model") == f"Answered by {version}"
    assert version in page.inner_text("#models .answered")
    assert re.fullmatch(r"in \d+ ms", page.inner_text("#latency"))
    said = f"{more[0]} {page.locator('#bars .score').first.inner_text()}"
    page.wait_for_function("(said) => document.querySelector('[role=status]').textContent.startsWith(said)", arg=said)


def test_another_picture_moves_the_bars(page, predict):
    labels = [f"number {i}" for i in range(20)]
    page.fill("#labels", "\n".join(labels))
    orders = []
    for color in ("black", "white"):
        picture = encode(Image.new("RGB", (20, 20), color))
        answer_to(page, lambda picture=picture: pick(page, picture))
        orders.append(assert_shows(page, predict(picture, labels)))
    assert orders[0] != orders[1], "the pictures were chosen so that their orders differ"


def test_a_dropped_file(seen, predict, tmp_path):
    page = seen.page
    page.fill("#labels", "cat\ndog")
    (tmp_path / "dropped.png").write_bytes(PICTURE)
    devtools = seen.context.new_cdp_session(page)
    # Onto the middle of the text field: the whole window takes pictures.
    box = page.locator("#labels").bounding_box()
    data = {"items": [], "files": [str(tmp_path / "dropped.png")], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        devtools.send("Input.dispatchDragEvent", {"type": kind, "x": x, "y": y, "data": data})
    assert_shows(page, predict(PICTURE, ["cat", "dog"]))
    assert "dropped.png" in page.get_attribute("#preview", "alt")
    assert page.input_value("#labels") == "cat\ndog"


def test_a_pasted_picture(open_page, predict):
    page = open_page(permissions=["clipboard-read", "clipboard-write"]).page
    page.evaluate(
        """async (data) => {
            const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
            const picture = new Blob([bytes], {type: "image/png"});
            await navigator.clipboard.write([new ClipboardItem({"image/png": picture})]);
        }""",
        base64.b64encode(PICTURE).decode(),
    )
    page.fill("#labels", "cat\ndog")
    asked, _ = answer_to(page, lambda: page.keyboard.press("Control+V"))
    pasted = Image.open(io.BytesIO(base64.b64decode(asked["image"])))
    assert np.array_equal(np.asarray(pasted.convert("RGB")), np.asarray(colours(0)))
    assert_shows(page, predict(PICTURE, ["cat", "dog"]))
    # Text is still pasted as text.
    page.evaluate("navigator.clipboard.writeText('\\nhorse')")
    page.focus("#labels")
    page.keyboard.press("Control+End")
    page.keyboard.press("Control+V")
    assert_shows(page, predict(PICTURE, ["cat", "dog", "horse"]))


def test_a_drawn_character_with_its_labels(page):
    asked, status = answer_to(page, lambda: page.click("#characters button >> nth=0"))
    assert status == 200
    assert "latin small letter e with acute" in asked["labels"]
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(asked["image"]))).convert("L"))
    assert drawn.shape == (256, 256)
    assert drawn.min() < 50 < 200 < drawn[0].min(), "black in the middle, white at the edge"
    shown(page, asked["labels"])
    asked, _ = answer_to(page, lambda: page.click("text=Animals"))
    shown(page, asked["labels"])
    assert page.input_value("#labels").split("\n") == asked["labels"]


def test_a_large_photo_is_scaled_down_and_turned(page, predict):
    picture = colours(3, (3000, 2300))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    page.fill("#labels", "cat\ndog")
    photo = encode(picture, "JPEG", exif=exif, quality=95)
    asked, _ = answer_to(page, lambda: pick(page, photo, "IMG_1.JPG", "image/jpeg"))
    sent = base64.b64decode(asked["image"])
    image = Image.open(io.BytesIO(sent))
    assert image.size == (1024, round(1024 * 3000 / 2300))
    reference = picture.rotate(-90, expand=True).resize(image.size, Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(image, dtype=float) - np.asarray(reference, dtype=float)).mean() < 2
    assert_shows(page, predict(sent, ["cat", "dog"]))

    # A small one keeps its pixels unless it is to be turned.
    small = encode(colours(3), "JPEG")
    asked, _ = answer_to(page, lambda: pick(page, small, "small.jpg", "image/jpeg"))
    assert base64.b64decode(asked["image"]) == small
    turned = encode(colours(3), "JPEG", exif=exif)
    asked, _ = answer_to(page, lambda: pick(page, turned, "turned.jpg", "image/jpeg"))
    assert Image.open(io.BytesIO(base64.b64decode(asked["image"]))).size == (44, 60)


def test_typing_waits_for_a_pause(seen):
    page = seen.page
    pick(page)
    page.locator("#preview").wait_for()
    page.clock.install()
    page.clock.pause_at(4e12)
    asked = []
    page.on("request", lambda request: asked.append(json.loads(request.post_data)) if is_question(request) else None)
    for character in "cat, dog":
        page.keyboard.type(character)
        page.clock.run_for(100)
    assert asked == []
    with page.expect_response(is_question):
        page.clock.run_for(100)
    assert [question["labels"] for question in asked] == [["cat", "dog"]]


def test_a_late_answer_is_dropped(page, predict):
    pick(page)
    held, failures = [], []

    def note(request):
        failures.append((json.loads(request.post_data)["labels"], request.failure))

    page.on("requestfailed", note)
    page.route("**/v1/zero-shot", lambda route: held.append(route) if not held else route.continue_())
    page.focus("#labels")
    with page.expect_request(is_question):
        page.keyboard.type("cat")
    page.keyboard.type("\ndog")
    assert_shows(page, predict(PICTURE, ["cat", "dog"]))
    assert failures == [(["cat"], "net::ERR_ABORTED")]
    held[0].fulfill(json={"model": "late", "scores": "softmax", "results": [{"index": 0, "predictions": []}]})
    page.wait_for_timeout(200)
    assert [label for label, *_ in shown(page, ["cat", "dog"])]


def test_no_labels(seen):
    page = seen.page
    pick(page)
    answer_to(page, lambda: page.fill("#labels", "cat\ndog"))
    shown(page, ["cat", "dog"])
    before = len(seen.addresses)
    page.fill("#labels", " \n, ,\n")
    page.locator("#empty").wait_for()
    assert page.inner_text("#empty") == "Now type a label or two."
    assert page.locator("#bars li").count() == 0
    assert not page.is_visible("#error")
    assert len(seen.addresses) == before, "nothing is asked"
    answer_to(page, lambda: page.fill("#labels", 'cat, cat,"dog, brown"'))
    shown(page, ["cat", "dog, brown"])
    answer_to(page, lambda: page.fill("#labels", "cat"))
    assert "always 100%" in page.inner_text("#advice")


def test_a_broken_picture_has_its_line(seen, service):
    page = seen.page
    seen.refusals = True
    page.fill("#labels", "cat\ndog")
    for broken in (PICTURE[:60], b"no picture at all"):
        _, status = answer_to(page, lambda broken=broken: pick(page, broken, "broken.png"))
        image = base64.b64encode(broken).decode()
        expected, answer, _ = service.ask("POST", "/v1/zero-shot", {"image": image, "labels": ["cat", "dog"]})
        if expected == 200:
            answer = answer["results"][0]
        assert status == expected
        page.locator("#error").wait_for()
        assert page.inner_text("#error") == " ".join(answer["error"]["message"].split())
        assert page.locator("#bars li").count() == 0
    assert "broken.png cannot be shown" in page.inner_text(".drop")
    pick(page)
    shown(page, ["cat", "dog"])
    assert not page.is_visible("#error")


def test_a_label_is_text(page, predict):
    pick(page)
    page.fill("#labels", f"{HARMFUL}\n<script>window.harmed = true</script>\n&amp;")
    labels = page.input_value("#labels").split("\n")
    assert_shows(page, predict(PICTURE, labels))
    page.wait_for_timeout(1_200)  # the words for screen readers come after a pause
    assert HARMFUL in page.text_content("#summary") + page.text_content("#bars")
    assert page.locator("#answer img, #answer script").count() == 0
    assert page.evaluate("window.harmed") is None


def test_templates(page, predict, service):
    _, answer, _ = service.ask("GET", "/v1/templates")
    pick(page)
    asked, _ = answer_to(page, lambda: page.fill("#labels", "\n".join(LABELS)))
    by_default = answer["data"].get(asked["templates"], asked["templates"])
    assert by_default == answer["default"]
    assert_shows(page, predict(PICTURE, LABELS))
    name = next(name for name, templates in answer["data"].items() if templates != answer["default"])
    asked, _ = answer_to(page, lambda: page.select_option("#template", name))
    assert asked["templates"] == name
    assert_shows(page, predict(PICTURE, LABELS, templates=name))

    asked, _ = answer_to(page, lambda: page.select_option("#template", label="Your own"))
    assert asked["templates"] == ["a photo of a {}."]
    own = ["never {} again", "{} {{}}", HARMFUL.replace("x", "{}")]
    asked, _ = answer_to(page, lambda: page.fill("#custom", "\n".join(own) + "\n\n"))
    assert asked["templates"] == own
    assert_shows(page, predict(PICTURE, LABELS, templates=own))


def test_a_template_without_a_place_for_the_label(seen, service):
    page = seen.page
    seen.refusals = True
    pick(page)
    answer_to(page, lambda: page.fill("#labels", "cat"))
    answer_to(page, lambda: page.select_option("#template", label="Your own"))
    answer_to(page, lambda: page.fill("#custom", "a photo"))
    page.locator("#error").wait_for()
    body = {"image": base64.b64encode(PICTURE).decode(), "labels": ["cat"], "templates": ["a photo"]}
    status, answer, _ = service.ask("POST", "/v1/zero-shot", body)
    assert status >= 400
    assert page.inner_text("#error") == " ".join(answer["error"]["message"].split())


def test_any_number_of_labels_may_be_true(page, predict):
    pick(page)
    answer_to(page, lambda: page.fill("#labels", "\n".join(LABELS)))
    page.focus("[name=scores]:checked")
    asked, _ = answer_to(page, lambda: page.keyboard.press("ArrowRight"))
    assert asked["scores"] == "sigmoid"
    assert_shows(page, predict(PICTURE, LABELS, scores="sigmoid"))


def test_a_named_label_set(page, predict, service):
    labels = ["sun, bright", "rain", "snow"]
    body = {"labels": labels, "templates": ["it is {}"]}
    status, put, _ = service.ask("PUT", "/v1/label-sets/browser-test", body)
    assert status < 300, put
    page.reload()
    pick(page)
    page.locator("#sets").wait_for()
    asked, _ = answer_to(page, lambda: page.select_option("#set", "browser-test"))
    assert asked["label_set"] == "browser-test"
    assert "labels" not in asked
    assert asked["templates"] == ["it is {}"]
    assert_shows(page, predict(PICTURE, labels, templates=["it is {}"]))
    # Edited it is a list of labels like any other.
    page.focus("#labels")
    page.keyboard.press("Control+End")
    asked, _ = answer_to(page, lambda: page.keyboard.type("y"))
    assert asked["labels"] == ["sun, bright", "rain", "snowy"]
    assert page.input_value("#set") == ""
    service.ask("DELETE", "/v1/label-sets/browser-test")


def test_many_labels(page, predict):
    labels = [f"number {i}" for i in range(30)]
    pick(page)
    asked, _ = answer_to(page, lambda: page.fill("#labels", ",".join(labels)))
    assert asked["top_k"] == 20
    assert_shows(page, predict(PICTURE, labels, top_k=20))
    answer_to(page, lambda: page.click("text=Show all 30"))
    assert_shows(page, predict(PICTURE, labels))
    assert not page.is_visible("#more")


def test_the_curl_command(page, tmp_path):
    if not shutil.which("curl"):
        pytest.skip("curl is not there")
    pick(page, name="it's a picture.png")
    labels = ["it's", 'a "quote"', "100% `cat` $HOME \\n", "Éclair"]
    answer_to(page, lambda: page.fill("#labels", "\n".join(labels)))
    rows = shown(page, labels)
    page.click("text=As curl")
    with page.expect_download() as caught:
        page.click("#save")
    caught.value.save_as(tmp_path / "it's a picture.png")
    printed = subprocess.run(
        ["bash", "-c", page.inner_text("#curl")], cwd=tmp_path, check=True, capture_output=True, timeout=60
    ).stdout
    predictions = json.loads(printed)["results"][0]["predictions"]
    assert [one["label"] for one in predictions] == [label for label, *_ in rows]
    assert_shows(page, predictions)


def test_a_key_is_asked_for_when_the_service_wants_one(seen, predict):
    """A gateway in front that wants a key, for the service of these tests wants none."""
    page = seen.page
    seen.refusals = True

    def guard(route):
        headers = route.request.headers
        if headers.pop("authorization", None) == "Bearer right":
            return route.continue_(headers=headers)
        return route.fulfill(status=401, json={"error": {"message": "unknown API key", "type": "authentication_error"}})

    assert not page.is_visible("#key-form")
    page.route("**/v1/**", guard)
    page.reload()
    page.locator("#key").wait_for()
    assert not page.is_visible("#error")
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    page.locator("#error").wait_for()
    assert page.inner_text("#error") == "unknown API key"
    page.fill("#key", "right")
    page.keyboard.press("Enter")
    page.locator("#models .answered, #models li").first.wait_for()
    assert not page.is_visible("#key-form")
    pick(page)
    page.fill("#labels", "cat\ndog")
    assert_shows(page, predict(PICTURE, ["cat", "dog"]))
    assert '-H "Authorization: Bearer $RAYCLIP_KEY"' in page.text_content("#curl")
    assert "right" not in page.text_content("#curl")
    # The tab keeps it.
    page.reload()
    page.locator("#models li").first.wait_for()
    assert not page.is_visible("#key-form")
    assert page.evaluate("[Object.values(sessionStorage), Object.values(localStorage)]") == [["right"], []]


def test_a_busy_service_is_asked_again(seen, predict):
    page = seen.page
    seen.refusals = True
    refused = []

    def refuse_once(route):
        if refused:
            return route.continue_()
        refused.append(route)
        body = {"error": {"message": "512 pictures wait already", "type": "rate_limit_error"}}
        return route.fulfill(status=429, json=body, headers={"Retry-After": "1"})

    page.route("**/v1/zero-shot", refuse_once)
    pick(page)
    page.fill("#labels", "cat\ndog")
    page.locator("#error").wait_for()
    assert page.inner_text("#error") == "512 pictures wait already"
    assert_shows(page, predict(PICTURE, ["cat", "dog"]))
    assert not page.is_visible("#error")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(open_page, scheme):
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True, "color_scheme": scheme}
    page = open_page(**phone).page
    widths = "[document.documentElement.scrollWidth, document.body.scrollWidth]"
    assert page.evaluate(widths) == [360, 360]
    assert page.is_visible("text=Take a photo")
    assert page.get_attribute("#camera", "capture") == "environment"
    long = "x" * 300
    pick(page, field="#camera")
    page.fill("#labels", f"cat\n{long}")
    shown(page, ["cat", long])
    page.select_option("#template", label="Your own")
    page.click("text=As curl")
    assert page.evaluate(widths) == [360, 360]
    small = page.evaluate(
        """() => [...document.querySelectorAll("button, select, textarea, summary, .button, .drop label")]
            .filter((element) => element.checkVisibility())
            .map((element) => [element.textContent, element.getBoundingClientRect()])
            .filter(([, box]) => box.width < 40 || box.height < 40 || box.right > 360 || box.left < 0)"""
    )
    assert small == []
    page.wait_for_function("() => document.getAnimations().length === 0")
    assert min(contrasts(page).values()) >= 4.5


def contrasts(page):
    """The contrast of texts with the colour behind them, as WCAG defines it."""
    colors = page.evaluate(
        """() => {
            const pixel = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
            const rgba = (color) => {
                pixel.clearRect(0, 0, 1, 1);
                pixel.fillStyle = color;
                pixel.fillRect(0, 0, 1, 1);
                return [...pixel.getImageData(0, 0, 1, 1).data];
            };
            const behind = (element) => {
                const color = rgba(getComputedStyle(element).backgroundColor);
                return color[3] === 255 ? color : behind(element.parentElement);
            };
            const found = {};
            for (const selector of ["h1", ".intro p", "#count", "#labels", "#bars .score", "li.best .label",
                ".switch span", "#meta", "summary", "pre", "footer a", "select"]) {
                const element = document.querySelector(selector);
                const ground = selector.startsWith("li.best") ? element.parentElement.firstChild : element;
                found[selector] = [rgba(getComputedStyle(element).color), behind(ground)];
            }
            return found;
        }"""
    )

    def luminance(color):
        channels = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color[:3]]
        return float(np.dot(channels, [0.2126, 0.7152, 0.0722]))

    found = {}
    for selector, pair in colors.items():
        dark, light = sorted(map(luminance, pair))
        found[selector] = (light + 0.05) / (dark + 0.05)
    return found


def test_with_the_keyboard_alone(page):
    pick(page)
    answer_to(page, lambda: page.fill("#labels", "cat\ndog"))
    shown(page, ["cat", "dog"])
    page.click("h1")  # the keyboard starts from there
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        name, outlined = page.evaluate(
            """() => {
                const element = document.activeElement;
                const hidden = element.matches("input[type=file], input[type=radio]");
                const style = getComputedStyle(hidden ? element.nextElementSibling : element);
                return [element.id || element.name || element.textContent, style.outlineStyle !== "none"];
            }"""
        )
        if name in reached or page.evaluate("document.activeElement === document.body"):
            break
        assert outlined, name
        reached.append(name)
    wanted = ["file", "é", "labels", "Animals", "As curl", "scores", "template"]
    assert [name for name in reached if name in wanted] == wanted


def test_hugging_face_form_from_a_page(page, service):
    image = base64.b64encode(PICTURE).decode()
    body = {"inputs": {"image": image}, "parameters": {"candidate_labels": LABELS}}
    answer = page.evaluate(
        """async (body) => {
            const headers = {"Content-Type": "application/json"};
            const options = {method: "POST", headers, body: JSON.stringify(body)};
            return await (await fetch("v1/zero-shot-image-classification", options)).json();
        }""",
        body,
    )
    assert sorted(one["label"] for one in answer) == sorted(LABELS)
    assert all(set(one) == {"label", "score"} for one in answer)
    scores = [one["score"] for one in answer]
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(1, abs=1e-4)
    expected = service.post("/v1/zero-shot-image-classification", body)
    assert {one["label"]: one["score"] for one in answer} == pytest.approx(
        {one["label"]: one["score"] for one in expected}, abs=1e-5
    )


def test_the_documentation_is_shown_and_tries_a_request(open_page):
    page = open_page("/docs", ready=".opblock").page
    assert page.locator(".opblock").count() > 10
    operation = page.locator("#operations-default-models_v1_models_get")
    operation.locator(".opblock-summary-control").click()
    operation.get_by_role("button", name="Try it out").click()
    operation.get_by_role("button", name="Execute").click()
    operation.locator(".live-responses-table .response-col_status", has_text="200").wait_for()
