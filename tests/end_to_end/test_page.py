"""The chat page in headless Chromium against the server, whose backend gives scripted replies."""

import json
import re
import shutil

import pytest
from page_script import scripted_backend
from server_thread import running

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")

BROWSER_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
COMPLETIONS = "**/v1/chat/completions"


@pytest.fixture(scope="module")
def address():
    with running(scripted_backend()) as server:
        yield f"{server.url}/"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=BROWSER_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    """open_page(**context options) opens a page and waits until it shows the model; a script error fails the test."""
    contexts, problems = [], []

    def open_one(**options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(5000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        page.get_by_text("scripted", exact=True).wait_for()
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert not problems


@pytest.fixture
def page(open_page):
    return open_page()


def send(page, text):
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_label("Message", exact=True).press("Enter")


def ask(page, text):
    """Sends `text` and waits for the whole reply. Returns its element."""
    send(page, text)
    return finished(page)


def finished(page):
    reply = page.locator(".assistant").last
    sync_api.expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    sync_api.expect(reply).to_have_attribute("aria-busy", "false")
    return reply


def last_request(page, action):
    """Returns the request that the page sends during `action()`."""
    with page.expect_request(COMPLETIONS) as request:
        action()
    return request.value.post_data_json


def fail_with(page, status, message, headers=None):
    """Makes the next completion fail."""
    body = json.dumps({"error": {"message": message, "type": "error", "param": None, "code": None}})
    page.route(COMPLETIONS, lambda route: route.fulfill(status=status, body=body, headers=headers or {}), times=1)


def test_a_message_is_answered_and_the_page_tells_speed_and_acceptance(page):
    reply = ask(page, "hello")
    assert reply.locator("strong").inner_text() == "several tokens"
    stats = reply.locator(".stats").inner_text()
    # Three steps: one token, then two drafts and one token, then three drafts and one token.
    assert re.fullmatch(r"8 tokens · [\d.]+ tokens/s · 2\.67 tokens a step", stats)
    assert page.get_by_label("Message", exact=True).input_value() == ""
    body = last_request(page, lambda: ask(page, "hello"))
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]


def test_text_arrives_while_the_model_writes_and_stop_keeps_it(page):
    send(page, "endless")
    reply = page.locator(".assistant").last
    sync_api.expect(reply).to_contain_text("word word word")
    sync_api.expect(reply).to_have_attribute("aria-busy", "true")
    page.get_by_role("button", name="Stop").click()
    finished(page)
    assert reply.get_by_text("Stopped.").is_visible()
    kept = reply.locator(".markdown").last.inner_text()
    page.reload()
    assert page.locator(".assistant .markdown").last.inner_text() == kept


@pytest.mark.slow
def test_retry_edit_and_new_conversation(page):
    ask(page, "hello")
    ask(page, "echo one")
    body = last_request(page, lambda: page.get_by_role("button", name="Retry").last.click())
    assert [message["content"] for message in body["messages"]][-1] == "echo one" and len(body["messages"]) == 3
    finished(page)
    page.locator(".user").first.hover()
    page.locator(".user").first.get_by_role("button", name="Edit").click()
    editor = page.get_by_label("Edit your message")
    assert editor.input_value() == "hello"
    editor.fill("echo two")
    page.get_by_role("button", name="Send again").click()
    finished(page)
    assert page.locator(".turn").all_inner_texts()[0].startswith("echo two")
    assert page.locator(".turn").count() == 2
    page.get_by_role("button", name="New conversation").click()
    sync_api.expect(page.locator(".turn")).to_have_count(0)
    assert page.get_by_role("heading", name="What shall we talk about?").is_visible()


@pytest.mark.slow
def test_copy(open_page):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    reply = ask(page, "code")
    reply.get_by_role("button", name="Copy code").click()
    sync_api.expect(reply.locator("figure")).to_contain_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "print('hello')"
    reply.locator(".actions").get_by_role("button", name="Copy").click()
    sync_api.expect(reply.locator(".actions")).to_contain_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()").startswith("```python")


@pytest.mark.slow
def test_errors_are_shown_with_a_way_on(page):
    fail_with(page, 500, "the engine is gone")
    reply = ask(page, "hello")
    assert "the engine is gone" in reply.locator(".error").inner_text()
    fail_with(page, 429, "the queue is full", {"Retry-After": "7"})
    reply.get_by_role("button", name="Retry").click()
    assert "Try again in 7 s." in finished(page).locator(".error").inner_text()
    page.route(COMPLETIONS, lambda route: route.abort(), times=1)
    page.get_by_role("button", name="Retry").click()
    assert "cannot be reached" in finished(page).locator(".error").inner_text()
    page.get_by_role("button", name="Retry").click()
    assert finished(page).locator("strong").inner_text() == "several tokens"
    assert page.locator(".error").count() == 0


def test_an_error_in_the_stream_keeps_the_text_before_it(page):
    reply = ask(page, "break")
    assert "so far" in reply.locator(".markdown").last.inner_text()
    assert "out of pages" in reply.locator(".error").inner_text()
    assert "out of pages" in page.locator("#announcer").inner_text()
    page.reload()
    assert "out of pages" in page.locator(".error").inner_text()


@pytest.mark.slow
def test_an_api_key_is_asked_for_and_kept_for_the_session_only(page):
    fail_with(page, 401, "no key")
    ask(page, "hello").get_by_role("button", name="Enter a key").click()
    field = page.get_by_label("API key")
    sync_api.expect(field).to_be_focused()
    field.fill("secret")
    page.get_by_role("button", name="Save").click()
    with page.expect_request(COMPLETIONS) as request:
        page.get_by_role("button", name="Retry").click()
    assert request.value.headers["authorization"] == "Bearer secret"
    finished(page)
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")


@pytest.mark.slow
def test_thinking_is_folded_and_given_back(page):
    toggle = page.get_by_role("button", name="Thinking")
    toggle.click()
    assert toggle.get_attribute("aria-pressed") == "true"
    body = last_request(page, lambda: send(page, "think"))
    assert body["chat_template_kwargs"] == {"enable_thinking": True}
    reply = finished(page)
    thought = reply.get_by_text("First, the question.")
    assert not thought.is_visible()
    reply.get_by_text(re.compile(r"Thought for [\d.]+ s")).click()
    assert thought.is_visible()
    assert reply.get_by_text("The answer.").is_visible()
    body = last_request(page, lambda: ask(page, "hello"))
    assert body["messages"][1] == {
        "role": "assistant",
        "content": "The answer.",
        "reasoning_content": "First, the question.",
    }


@pytest.mark.slow
def test_tool_calls_are_shown_and_take_results(page):
    page.get_by_role("button", name="Settings").click()
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
    page.get_by_label("Tools").fill("[{")
    page.get_by_role("button", name="Save").click()
    assert page.get_by_role("dialog").is_visible()  # the page does not save invalid JSON
    page.get_by_label("Tools").fill(json.dumps(tools))
    page.get_by_role("button", name="Save").click()
    assert last_request(page, lambda: send(page, "weather"))["tools"] == tools
    reply = finished(page)
    assert reply.locator("summary code").inner_text() == "get_weather"
    assert reply.locator(".tool-call pre").inner_text() == '{\n  "city": "Oslo"\n}'
    page.get_by_label("Result of get_weather").fill("4 degrees")
    body = last_request(page, lambda: page.get_by_role("button", name="Send result").click())
    call = body["messages"][1]["tool_calls"][0]
    assert call["function"]["name"] == "get_weather" and json.loads(call["function"]["arguments"]) == {"city": "Oslo"}
    assert body["messages"][2] == {"role": "tool", "tool_call_id": call["id"], "content": "4 degrees"}


@pytest.mark.slow
def test_a_call_that_was_cut_off_is_not_given_back(page):
    send(page, "endless call")
    sync_api.expect(page.locator(".tool-call pre")).to_contain_text("word word")
    page.get_by_role("button", name="Stop").click()
    assert finished(page).get_by_text("Stopped.").is_visible()
    messages = last_request(page, lambda: ask(page, "hello"))["messages"]
    assert [message["content"] for message in messages] == ["endless call", "Looking.", "hello"]
    assert "tool_calls" not in messages[1]


@pytest.mark.slow
def test_accepted_drafts_are_tinted_on_demand(page):
    reply = ask(page, "hello")
    drafted = reply.locator(".drafted")
    assert drafted.evaluate_all("nodes => nodes.map((node) => [node.textContent, node.dataset.position])") == [
        ["a", "1"],
        ["b", "2"],
    ]
    background = "node => getComputedStyle(node).backgroundColor"
    assert drafted.first.evaluate(background) == "rgba(0, 0, 0, 0)"
    page.get_by_role("button", name="Tint drafts").click()
    assert drafted.first.evaluate(background) != "rgba(0, 0, 0, 0)"
    page.reload()
    assert page.locator(".drafted").first.evaluate(background) != "rgba(0, 0, 0, 0)"


@pytest.mark.slow
def test_text_of_the_model_never_becomes_markup(page):
    reply = ask(page, "hostile")
    assert "<script>window.stolen = 1</script>" in reply.inner_text()
    assert reply.locator("script, img").count() == 0
    assert reply.locator("a").evaluate_all("nodes => nodes.map((node) => [node.href, node.rel, node.target])") == [
        ["https://example.org/a_b_c", "noopener noreferrer", "_blank"]
    ]
    assert "[click](javascript:window.stolen=1)" in reply.inner_text()
    assert page.evaluate("window.stolen") is None


MARKDOWN = {
    "plain": ("a < b & c", "<p>a &lt; b &amp; c</p>"),
    "headings": ("# One #\ntext\n## C#", "<h3>One</h3><p>text</p><h4>C#</h4>"),
    "emphasis": (
        "*a **b** c* ***d*** _e_ ~~f~~",
        "<p><em>a <strong>b</strong> c</em> <em><strong>d</strong></em> <em>e</em> <del>f</del></p>",
    ),
    "no emphasis": ("snake_case_name 2 * 3 * 4 **open", "<p>snake_case_name 2 * 3 * 4 **open</p>"),
    "escapes": (r"\*a\* \<b", "<p>*a* &lt;b</p>"),
    "code": ("`a*b*` ``c`d``", "<p><code>a*b*</code> <code>c`d</code></p>"),
    "links": ("[**a**](https://b.c/) https://d.e/f.", "<p><a><strong>a</strong></a> <a>https://d.e/f</a>.</p>"),
    "nested list": (
        "1. a\n   - b\n   - c\n2. d\n\nend",
        "<ol><li><p>a</p><ul><li><p>b</p></li><li><p>c</p></li></ul></li><li><p>d</p></li></ol><p>end</p>",
    ),
    "quote": ("> a\n> - b", "<blockquote><p>a</p><ul><li><p>b</p></li></ul></blockquote>"),
    "rule": ("a\n\n---\nb", "<p>a</p><hr><p>b</p>"),
    "no table": ("a|b\n-", "<p>a|b\n-</p>"),
    "table": (
        "a|b\n-|-\n1|2",
        "<div><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td>2</td></tr></tbody></table></div>",
    ),
    "open code": (
        "```py\na\n\n b",
        "<figure><figcaption><span>py</span><button>Copy</button></figcaption><pre><code>a\n\n b</code></pre></figure>",
    ),
}


@pytest.mark.slow
def test_markdown(page):
    script = """async (texts) => {
      const { MarkdownView } = await import("/page/markdown.js");
      return texts.map((text) => {
        const box = document.createElement("div");
        const view = new MarkdownView(box);
        for (let end = 0; end <= text.length; end += 1) view.update(text.slice(0, end), "0".repeat(end));
        for (const node of box.querySelectorAll("*")) {
          for (const name of node.getAttributeNames()) node.removeAttribute(name);
        }
        return box.innerHTML;
      });
    }"""
    rendered = page.evaluate(script, [text for text, _ in MARKDOWN.values()])
    assert dict(zip(MARKDOWN, rendered, strict=True)) == {name: html for name, (_, html) in MARKDOWN.items()}


@pytest.mark.slow
def test_marks_of_drafts_follow_their_text(page):
    """Each letter is marked once, through emphasis, escapes, entities, links, list indents and fences."""
    text = "# *ab* \\*c &amp; [d](http://b/)b\n\n- e\n  f\n\n> ```py\n> b\n> p\n> ```\n"
    marks = "".join({"b": "1", "p": "2", "f": "3"}.get(letter, "0") for letter in text)
    script = """async ([text, marks]) => {
      const { MarkdownView } = await import("/page/markdown.js");
      const box = document.createElement("div");
      new MarkdownView(box).update(text, marks);
      return [...box.querySelectorAll(".drafted")].map((node) => node.dataset.position + node.textContent);
    }"""
    assert page.evaluate(script, [text, marks]) == ["1b", "1b", "3f", "1b", "2p"]


@pytest.mark.slow
@pytest.mark.parametrize("text", ["> " * 60 + "deep", "*x " * 10000], ids=["nested", "long"])
def test_a_block_beyond_the_limits_is_shown_as_written(page, text):
    script = """async (text) => {
      const { MarkdownView } = await import("/page/markdown.js");
      const box = document.createElement("div");
      new MarkdownView(box).update(text, "0".repeat(text.length));
      return [box.children.length, box.firstElementChild.tagName, box.textContent];
    }"""
    assert page.evaluate(script, text) == [1, "P", text]


@pytest.mark.slow
def test_hostile_markdown_costs_no_more_than_its_length(page):
    """Each text would take a backtracking parser minutes; the page's default timeout detects that."""
    opening = ["*", "[", "`a", "> ", "- ", "*a ", "_a*b", "~~a", "[a](", "***a", "|a", "1. ", "# ", "a|b\n-|- "]
    texts = [piece * 20000 for piece in opening] + ["# " + " " * 50000 + "x", "a|b\n-" + " " * 50000 + "x"]
    script = """async (texts) => {
      const { MarkdownView } = await import("/page/markdown.js");
      return texts.map((text) => {
        const box = document.createElement("div");
        new MarkdownView(box).update(text, "0".repeat(text.length));
        return box.children.length;
      });
    }"""
    assert all(page.evaluate(script, texts))


@pytest.mark.slow
def test_everything_works_by_keyboard(page):
    keyboard = page.keyboard
    message = page.get_by_label("Message", exact=True)
    sync_api.expect(message).to_be_focused()
    keyboard.type("first")
    keyboard.press("Shift+Enter")
    keyboard.type("endless")
    assert message.input_value() == "first\nendless"
    keyboard.press("Enter")
    sync_api.expect(page.locator(".assistant")).to_contain_text("word")
    keyboard.press("Escape")
    finished(page)
    sync_api.expect(message).to_be_focused()
    names = []
    while "Skip to the message field" not in names:
        keyboard.press("Shift+Tab")
        names.append(page.evaluate("document.activeElement.ariaLabel || document.activeElement.innerText"))
        assert page.evaluate("document.activeElement.matches(':focus-visible')")
    names.reverse()
    assert names[1:] == ["New conversation", "Settings", "Dark theme", "Copy", "Edit", "Copy", "Retry"]
    keyboard.press("Enter")
    sync_api.expect(message).to_be_focused()
    page.get_by_role("button", name="Settings").focus()
    keyboard.press("Enter")
    sync_api.expect(page.get_by_role("dialog")).to_be_visible()
    keyboard.press("Escape")
    sync_api.expect(page.get_by_role("dialog")).to_be_hidden()
    sync_api.expect(page.get_by_role("button", name="Settings")).to_be_focused()


@pytest.mark.slow
def test_settings_reach_the_request_and_outlive_a_reload(page):
    values = {"System prompt": "Be brief.", "Temperature": "0.5", "Top-p": "0.9", "Top-k": "40", "Max tokens": "64"}
    values["Seed"] = "7"
    page.get_by_role("button", name="Settings").click()
    for label, value in values.items():
        page.get_by_label(label).fill(value)
    page.get_by_role("button", name="Save").click()
    page.reload()
    body = last_request(page, lambda: ask(page, "hello"))
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert [body[name] for name in ("temperature", "top_p", "top_k", "max_tokens", "seed")] == [0.5, 0.9, 40, 64, 7]
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Reset").click()
    page.get_by_role("button", name="Save").click()
    assert "temperature" not in last_request(page, lambda: ask(page, "hello"))


@pytest.mark.slow
def test_a_phone_needs_no_sideways_scroll(open_page):
    page = open_page(viewport={"width": 360, "height": 640}, has_touch=True)
    for text in ("wide", "hostile", "weather"):
        ask(page, text)
    page.get_by_role("button", name="Tint drafts").click()
    page.get_by_role("button", name="Settings").click()
    widths = "nodes => nodes.filter((node) => node.scrollWidth > node.clientWidth).map((node) => node.id)"
    assert page.locator("html, body, header, main, footer, dialog").evaluate_all(widths) == []
    boxes = "nodes => nodes.every((node) => node.getBoundingClientRect().right <= 360)"
    assert page.locator("button, input, textarea, article").evaluate_all(boxes)


CONTRAST = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (color) => {
    const linear = (share) => (share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4);
    const [red, green, blue] = channels(color).map((channel) => linear(channel / 255));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor;
      if ((channels(color)[3] ?? 1) > 0) return color;
    }
    throw new Error("no ground");
  };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility()) continue;
    const [low, high] = [luminance(getComputedStyle(node).color), luminance(ground(node))].sort((a, b) => a - b);
    if ((high + 0.05) / (low + 0.05) < 4.5) poor.push(node.outerHTML);
  }
  return poor;
}"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_follow_the_system_and_have_contrast(open_page, scheme):
    page = open_page(color_scheme=scheme, reduced_motion="reduce")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(channel) for channel in re.findall(r"\d+", ground)) < 384) == (scheme == "dark")
    page.get_by_role("button", name="Tint drafts").click()
    for text in ("hello", "wide", "weather"):
        ask(page, text)
    fail_with(page, 401, "no key")
    ask(page, "hello")
    page.evaluate("for (const node of document.querySelectorAll('details')) node.open = true")
    assert page.evaluate(CONTRAST) == []
    page.get_by_role("button", name="Settings").click()
    assert page.evaluate(CONTRAST) == []
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Dark theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != ground
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != ground


@pytest.mark.slow
def test_every_control_has_a_name_and_only_ends_are_announced(page):
    page.evaluate(
        """() => {
          window.heard = [];
          const node = document.getElementById("announcer");
          new MutationObserver(() => window.heard.push(node.textContent)).observe(node, { childList: true });
        }"""
    )
    ask(page, "hello")
    assert page.evaluate("window.heard") == ["Waiting for the reply", "Reply complete. A **several tokens** ab"]
    unnamed = "nodes => nodes.filter((n) => !(n.labels?.length || n.ariaLabel || n.innerText.trim())).map((n) => n.id)"
    page.get_by_role("button", name="Settings").click()
    assert page.locator("button:visible, input:visible, textarea:visible").evaluate_all(unnamed) == []
    identifiers = page.evaluate("[...document.querySelectorAll('[id]')].map((node) => node.id)")
    assert len(identifiers) == len(set(identifiers))
