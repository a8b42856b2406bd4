"""The chat page of a model that hears and speaks, in headless Chromium with a microphone that beeps."""

import base64
import io
import shutil

import pytest
from fake_speech import PATCH, RATE, speech_backend
from server_thread import running

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
soundfile = pytest.importorskip("soundfile", reason="needs the extra audio")
CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="needs chromium"), pytest.mark.slow]
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--autoplay-policy=no-user-gesture-required",
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
]  # fmt: skip
COMPLETIONS = "**/v1/chat/completions"


@pytest.fixture(scope="module")
def address():
    with running(speech_backend()) as server:
        yield f"{server.url}/"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    problems = []
    context = browser.new_context(permissions=["microphone"])
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.add_init_script(COUNT_PLAYED)
    page.goto(address)
    page.get_by_text("speaker", exact=True).wait_for()
    yield page
    context.close()
    assert not problems


# Counts the seconds of sound that the page starts to play.
COUNT_PLAYED = """
window.played = 0;
const start = AudioBufferSourceNode.prototype.start;
AudioBufferSourceNode.prototype.start = function (...when) {
  window.played += this.buffer.duration;
  return start.apply(this, when);
};
"""


def finished(page):
    reply = page.locator(".assistant").last
    sync_api.expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    sync_api.expect(reply).to_have_attribute("aria-busy", "false")
    return reply


def record(page, seconds=1):
    page.get_by_role("button", name="Record").click()
    sync_api.expect(page.locator("#record")).to_have_text(f"Send {seconds} s")


def test_a_recording_is_sent_and_the_spoken_reply_is_played(page):
    page.get_by_role("button", name="Speak").click()
    page.get_by_label("Message", exact=True).fill("what is this")
    record(page)
    with page.expect_request(COMPLETIONS) as request:
        page.locator("#record").click()
    body = request.value.post_data_json
    text, recording = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "what is this"}
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(recording["input_audio"]["data"])))
    assert len(samples) / rate > 0.4 and abs(samples).max() > 0.05  # the beep of Chromium's microphone
    assert body["modalities"] == ["text", "audio"] and body["audio"] == {"format": "pcm16"}
    reply = finished(page)
    words = reply.locator(".markdown").last.inner_text().split()
    assert words[:3] == ["what", "is", "this"] and words[-1] == "seconds"
    spoken = len(words) * PATCH / RATE
    assert page.evaluate("window.played") == pytest.approx(spoken, abs=0.02)
    reply.get_by_role("button", name="Play").click()
    assert page.evaluate("window.played") == pytest.approx(2 * spoken, abs=0.02)
    with page.expect_request(COMPLETIONS) as request:
        page.get_by_label("Message", exact=True).fill("and now")
        page.get_by_label("Message", exact=True).press("Enter")
    assert request.value.post_data_json["messages"][1]["audio"]["id"].startswith("audio_")
    assert finished(page).locator(".markdown").last.inner_text().endswith("seconds")


def test_a_recording_is_not_kept_by_the_browser_and_can_be_dropped(page):
    record(page)
    page.keyboard.press("Escape")
    sync_api.expect(page.locator("#record")).to_have_text("Record")
    assert page.locator(".turn").count() == 0
    record(page)
    page.locator("#record").click()
    finished(page)
    assert page.locator(".user .voice").inner_text().startswith("Recording, ")
    stored = page.evaluate("JSON.stringify(localStorage)")
    assert "Recording" not in stored and len(stored) < 2000
    page.reload()
    page.get_by_text("speaker", exact=True).wait_for()
    assert page.locator(".user .voice").count() == 1
    with page.expect_request(COMPLETIONS) as request:
        page.get_by_role("button", name="Retry").click()
    assert "not kept" in request.value.post_data_json["messages"][0]["content"]
    finished(page)


def test_a_phone_needs_no_sideways_scroll(page):
    page.set_viewport_size({"width": 360, "height": 640})
    boxes = "nodes => nodes.every((node) => node.getBoundingClientRect().right <= 360)"
    assert page.locator("button:visible, textarea:visible").evaluate_all(boxes)
