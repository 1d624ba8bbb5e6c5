"""The page of the server, in a browser."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image
from serving import serving


@pytest.fixture(scope="module")
def server(tmp_path_factory, finished_vit):
    with serving(tmp_path_factory.mktemp("page"), finished_vit) as running:
        yield running


@pytest.fixture
def page(server, tab):
    page, problems = tab
    page.goto(f"http://127.0.0.1:{server.port}/")
    yield page
    assert [each for each in problems if "422" not in each] == []


def shown_picture(page):
    """Return the pixels of the picture on the page."""
    url = page.evaluate("""async () => {
        const picture = document.getElementById("picture");
        await picture.decode();
        const canvas = document.createElement("canvas");
        canvas.width = picture.naturalWidth;
        canvas.height = picture.naturalHeight;
        canvas.getContext("2d").drawImage(picture, 0, 0);
        return canvas.toDataURL();
    }""")
    return np.asarray(
        Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
    )


def test_chosen_picture_gets_bars(page, picture):
    page.set_input_files("#file", str(picture))
    page.wait_for_selector("#answer:not([hidden])")
    assert page.inner_text("#label") in ("across", "down")
    bars = page.locator("#bars li")
    assert bars.count() == 2
    percents = [float(text.rstrip("%")) for text in page.locator(".percent").all_inner_texts()]
    assert sum(percents) == pytest.approx(100, abs=0.2)
    widths = [box["width"] for box in (each.bounding_box() for each in page.locator(".fill").all())]
    assert widths[0] / widths[1] == pytest.approx(percents[0] / percents[1], rel=0.1)


def test_unreadable_picture_is_an_error_and_the_next_one_is_answered(page, picture, tmp_path):
    (tmp_path / "no.png").write_text("text")
    page.set_input_files("#file", str(tmp_path / "no.png"))
    page.wait_for_selector("#problem:not(:empty)")
    assert page.inner_text("#problem") == "cannot read image: not a known image format"
    page.set_input_files("#file", str(picture))
    page.wait_for_selector("#answer:not([hidden])")
    assert page.inner_text("#problem") == ""


def test_heat_map_replaces_the_picture(page, picture):
    page.set_input_files("#file", str(picture))
    page.wait_for_selector("#answer:not([hidden])")
    before = shown_picture(page)
    page.check("#heat")
    page.wait_for_selector("#picture[alt*=orange]")
    assert shown_picture(page).shape != before.shape


def test_camera_takes_a_picture(page):
    page.click("#camera")
    page.wait_for_selector("#live:not([hidden])")
    page.click("#shoot")
    page.wait_for_selector("#answer:not([hidden])")
    assert page.locator("#live").is_hidden()
    assert shown_picture(page).std() > 5


def test_camera_opens_once_and_is_switched_off(page):
    page.evaluate("""() => {
        window.streams = [];
        const open = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
        navigator.mediaDevices.getUserMedia = async (asked) => {
            const stream = await open(asked);
            window.streams.push(stream);
            return stream;
        };
        for (let i = 0; i < 3; i++) document.getElementById("camera").click();
    }""")
    page.wait_for_selector("#live:not([hidden])")
    page.click("#camera")
    page.click("#stop")
    states = "window.streams.map((stream) => stream.getTracks().map((track) => track.readyState))"
    assert page.evaluate(states) == [["ended"]]


def test_keyboard_reaches_everything(page, picture):
    # Choosers are intercepted from now on; enabled with the key press, that is too late at times.
    page.on("filechooser", lambda _: None)
    reached = []
    for _ in range(6):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert [name for name in reached if name in ("file", "camera", "heat")] == [
        "file",
        "camera",
        "heat",
    ]
    page.focus("#file")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(str(picture))
    page.wait_for_selector("#answer:not([hidden])")
    page.focus("#camera")
    page.keyboard.press("Enter")
    page.wait_for_selector("#live:not([hidden])")
    assert page.evaluate("document.activeElement.id") == "shoot"


def test_dropped_picture_is_answered(page, picture):
    page.evaluate(
        """async (bytes) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "dropped.png", {type: "image/png"}));
            document.getElementById("drop").dispatchEvent(
                new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
        }""",
        list(picture.read_bytes()),
    )
    page.wait_for_selector("#answer:not([hidden])")


@pytest.mark.parametrize("width", [320, 390])
def test_page_fits_a_phone(page, picture, width):
    page.set_viewport_size({"width": width, "height": 700})
    page.set_input_files("#file", str(picture))
    page.wait_for_selector("#answer:not([hidden])")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert all(box["height"] >= 40 for box in [page.locator("#camera").bounding_box()])


def test_nothing_is_loaded_from_elsewhere(server):
    for path in ("/", "/docs"):
        _, headers, body = server.call(path)
        text = body.decode()
        assert not re.findall(r"(?:src|href)=[\"']https?://", text)
        nonce = re.search(r"'nonce-(\S+)'", headers["content-security-policy"])[1]
        assert text.count(f'nonce="{nonce}"') == text.count("<script") + text.count("<style")
