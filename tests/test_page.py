"""The page in a real browser: files, progress, questions, sources, comparison, errors, narrow screens, keyboard."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright
from serving import ingest, live

from kvlink_rag.server.settings import ServerSettings

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
STATIC = Path(__file__).parent.parent / "kvlink_rag" / "server" / "static"

if CHROMIUM is None and not os.environ.get("CI"):
    pytest.skip("no Chromium on this machine; the page is not tested", allow_module_level=True)
expect.set_options(timeout=60_000)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def server(open_rag):
    rag = open_rag()
    rag.add("The lighthouse was lit in 1871 for the first time.", "The fog horn of the lighthouse is called Bertha.")
    with live(rag, settings=ServerSettings(default_new_tokens=24, max_waiting=1)) as server:
        yield server


@pytest.fixture
def page(browser, server):
    """The page, opened; whatever it complains of in the console fails the test."""
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: None if request.url.startswith(server.url) else complaints.append(request.url))
    page.goto(server.url)
    expect(page.locator("#model")).to_have_text(server.model)
    page.complaints = complaints
    yield page
    page.close()
    assert [text for text in complaints if "status of" not in text] == []  # refused requests are part of some tests


def ask(page, question="What is the fog horn called?"):
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Ask").click()


def test_a_file_is_added_asked_about_and_deleted(page, server):
    expect(page.locator("#n-documents")).to_have_text("2")
    poem = {"name": "gulls.md", "mimeType": "text/markdown", "buffer": b"# Gulls\n\nThe gulls of Marrow nest in May."}
    picture = {"name": "x.jpg", "mimeType": "image/jpeg", "buffer": b"\xff"}
    page.get_by_label(re.compile("Drop files here")).set_input_files([poem, picture])
    expect(page.locator(".job .state")).to_have_text("1 read, 0 known")
    expect(page.locator(".job .skipped")).to_contain_text("x.jpg: not one of")
    expect(page.locator("#n-documents")).to_have_text("3")
    ask(page, "When do the gulls of Marrow nest?")
    expect(page.locator(".answer[aria-busy=false] .about")).to_contain_text("tokens reused")
    expect(page.locator("#sources .name").first).to_have_text("gulls.md")
    expect(page.locator("#sources .how").first).to_have_text("reused")
    page.locator("#sources summary").first.click()
    expect(page.locator("#sources .text").first).to_contain_text("nest in May")
    expect(page.locator("#n-rate")).to_have_text("100 %")
    page.get_by_role("button", name="Delete gulls.md").click()
    page.get_by_role("button", name="Really delete gulls.md").click()
    expect(page.locator("#n-documents")).to_have_text("2")


def test_one_click_deletes_nothing(page, server):
    """The second one on the same button does; what is clicked or focused between takes the first back."""
    page.get_by_role("button", name=re.compile("^Delete")).first.click()
    expect(page.get_by_role("button", name=re.compile("^Really delete"))).to_have_text("Really?")
    page.get_by_label("Question").focus()
    expect(page.get_by_role("button", name=re.compile("^Really delete"))).to_have_count(0)
    page.get_by_role("button", name=re.compile("^Delete")).first.click()
    with server.client() as client:
        assert len(client.get("/v1/documents").json()["data"]) == 2
    page.keyboard.press("Enter")
    expect(page.locator("#n-documents")).to_have_text("1")


def test_a_press_on_the_button_does_not_take_the_question_back(page):
    """Where pressing a button takes the focus away from it, as Safari does: else nothing could ever be deleted."""
    page.evaluate(
        "() => document.addEventListener('mousedown', (event) => "
        "{ if (!event.defaultPrevented) document.activeElement.blur(); event.preventDefault(); })"
    )
    page.get_by_role("button", name=re.compile("^Delete")).first.click()
    page.get_by_role("button", name=re.compile("^Really delete")).click()
    expect(page.locator("#n-documents")).to_have_text("1")


def test_the_document_whose_button_it_is_is_deleted(page, server):
    """Not the one that a browser makes of an id with dots between slashes."""
    with server.client() as client:
        ingest(
            client, json={"documents": [{"text": "One.", "id": "a/../important"}, {"text": "Two.", "id": "important"}]}
        )
    page.reload()
    page.get_by_role("button", name="Delete important").first.click()
    page.get_by_role("button", name="Really delete important").click()
    expect(page.locator("#n-documents")).to_have_text("3")
    with server.client() as client:
        ids = [document["id"] for document in client.get("/v1/documents").json()["data"]]
    assert "important" in ids and "a/../important" not in ids


def test_numbers_that_come_late_do_not_replace_newer_ones(page):
    """Two looks at the store overlap; the older one's reply arrives last."""
    held = []

    def hold_the_first(route):
        if held:
            route.continue_()
        else:
            held.append((route, route.fetch()))

    page.route("**/v1/store", hold_the_first)
    ask(page)
    expect(page.locator(".answer[aria-busy=false]")).to_have_count(1)
    page.wait_for_function("() => !document.getElementById('send').disabled")
    while not held:
        page.wait_for_timeout(10)
    page.get_by_role("button", name=re.compile("^Delete")).first.dblclick()
    expect(page.locator("#n-documents")).to_have_text("1")
    (route, old) = held[0]
    with page.expect_response("**/v1/store"):
        route.fulfill(response=old)
    expect(page.locator("#n-documents")).to_have_text("1")
    assert page.evaluate("() => document.querySelectorAll('#documents li').length") == 1


def test_a_newcomer_is_told_what_to_do_first(page, server):
    expect(page.locator("#welcome")).to_contain_text("Ask about the documents")
    with server.client() as client:
        for document in client.get("/v1/documents").json()["data"]:
            client.delete(f"/v1/documents/{document['id']}")
    page.reload()
    expect(page.locator("#welcome")).to_have_text("Add a document, then ask about it.")


def test_dropped_files_are_added(page):
    transfer = page.evaluate_handle(
        "() => { const t = new DataTransfer(); t.items.add(new File(['The mole is long.'], 'mole.txt')); return t; }"
    )
    page.locator("#drop").dispatch_event("drop", {"dataTransfer": transfer})
    expect(page.locator(".job .state")).to_have_text("1 read, 0 known")


def test_the_answer_streams_with_sources_before_its_end(page, server):
    """While it is under way there is text already, the sources stand beside it, and it can be stopped."""
    server.services.settings.__dict__["default_new_tokens"] = 1000  # long enough to be seen on its way
    page.get_by_label("Question").fill("What is the fog horn called?")
    page.keyboard.press("Enter")
    expect(page.locator(".answer[aria-busy=true] .text")).not_to_be_empty()
    expect(page.locator("#sources li")).to_have_count(2)
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("alert")).to_have_text("Stopped.")
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")


def test_both_ways_are_shown_side_by_side_with_their_clocks(page):
    page.get_by_role("switch", name="Compare with full prefill").check()
    ask(page)
    expect(page.locator(".answer")).to_have_count(2)
    expect(page.locator(".answer").nth(1).locator(".about")).to_contain_text("0 tokens reused")
    expect(page.get_by_role("article", name="From stored KV").locator(".seconds")).to_have_text(
        re.compile(r"^\d+\.\d\d$")
    )
    left, right = (page.locator(".answer").nth(n).bounding_box() for n in (0, 1))
    assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"]
    expect(page.locator("#said")).to_contain_text("by full prefill")


def test_what_goes_wrong_is_said_in_words(page, server):
    ask(page, "x" * 5000)
    expect(page.get_by_role("alert")).to_contain_text("the model's window is 2048")
    page.get_by_label(re.compile("Drop files here")).set_input_files(
        [{"name": "empty.txt", "mimeType": "text/plain", "buffer": b" "}]
    )
    expect(page.locator(".job.failed")).to_contain_text("holds no text")
    server.services.scheduler._num_places += 5
    ask(page)
    expect(page.get_by_role("alert")).to_contain_text("The queue is full")
    server.services.scheduler._num_places -= 5
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page)
    expect(page.get_by_role("alert")).to_be_visible()
    page.complaints.clear()


def test_untrusted_text_stays_text(page, server):
    """Names and contents full of markup are shown as they are, and nothing of them runs."""
    evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    page.get_by_label(re.compile("Drop files here")).set_input_files(
        [{"name": "<b>bold.txt", "mimeType": "text/plain", "buffer": f"The gull says {evil}".encode()}]
    )
    expect(page.locator(".job .state")).to_have_text("1 read, 0 known")
    ask(page, "What does the gull say?")
    expect(page.locator("#sources .text", has_text="The gull says")).to_contain_text("onerror")
    expect(page.locator("#documents .name", has_text="<b>bold.txt")).to_have_count(1)
    assert page.title() == "kvlink" and page.locator("img, #sources b, #sources script").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_shows_everything_without_scrolling_sideways(page, scheme):
    page.set_viewport_size({"width": 360, "height": 700})
    page.emulate_media(color_scheme=scheme)
    page.get_by_role("switch").check()
    ask(page, "W" * 80)
    expect(page.locator(".answer")).to_have_count(2)
    expect(page.locator("#send")).to_be_enabled()
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
    first, second = (page.locator(".answer").nth(n).bounding_box() for n in (0, 1))
    assert first["y"] + first["height"] <= second["y"]


def test_the_keyboard_reaches_everything_in_order(page):
    expect(page.locator(".delete").first).to_be_visible()  # the documents are listed
    reached = []
    for _ in range(9):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("() => document.activeElement.id || document.activeElement.className"))
    assert reached[:5] == ["skip", "question", "compare", "send", "files"] and "delete" in reached


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_are_told_apart_from_their_ground(page, scheme):
    """WCAG AA: 4.5 to 1, for all text of the page."""
    page.emulate_media(color_scheme=scheme)
    ask(page)
    expect(page.locator(".answer[aria-busy=false]")).to_have_count(1)
    pairs = page.evaluate("""() => [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility() &&
        [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())).map((e) => {
      let ground = e;
      while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
      return [e.className || e.tagName, getComputedStyle(e).color, getComputedStyle(ground).backgroundColor];
    })""")
    assert len(pairs) > 20
    assert [(name, color, ground) for name, color, ground in pairs if contrast(color, ground) < 4.5] == []


def contrast(one, other):
    def light(color):
        channels = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_page_is_only_our_own_text_under_a_strict_policy(server):
    with server.client() as client:
        policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for path in STATIC.iterdir():
        text = path.read_text("utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\son\w+=", text), (
            path.name
        )
        assert set(re.findall(r"https?://[^\s\"']+", text)) <= {"http://www.w3.org/2000/svg"}, path.name
