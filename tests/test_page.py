"""The web page in a real browser: streaming, two models, probabilities, hostile answers, both languages, a phone."""
import shutil

import pytest
from conftest import missing
from endpoint_help import Scripted, eventually, served

from aigc.models.tiny import make_tiny

ATTACK = "<img src=x onerror=\"window.hacked=1\"><script>window.hacked=2</script>\n```html\n<b onclick='window.hacked=3'>bold</b>\n```\n`<i>` [link](javascript:window.hacked=4) 你好 🙂"


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api") if shutil.which("chromium") or shutil.which("google-chrome") else missing("chromium")
    with sync_api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"])
        yield b
        b.close()


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    from aigc.serve.engine import model_engine
    folder = make_tiny(tmp_path_factory.mktemp("models")/"tiny-model")
    with served(model_engine(str(folder), name="tiny"), Scripted(ATTACK, name="hostile", cut=5, delay=0.005)) as e: yield e


@pytest.fixture
def page(browser, endpoint):
    "A page whose every fault is a failure: errors, and requests to anybody else."
    context = browser.new_context(locale="en-US", viewport={"width": 1280, "height": 800})
    page, faults = context.new_page(), []
    page.on("pageerror", lambda e: faults.append(str(e)))
    page.on("console", lambda m: faults.append(m.text) if m.type == "error" and "400" not in m.text and "Executing inline script" not in m.text else None)
    page.on("request", lambda r: None if r.url.startswith((endpoint.url, "data:", "blob:")) else faults.append(r.url))
    page.goto(endpoint.url)
    page.wait_for_selector(".column select")
    yield page
    assert not faults, faults
    context.close()


def ask(page, question):
    page.fill("#question", question)
    page.keyboard.press("Enter")
    page.wait_for_selector("body:not(.busy) .assistant:not(.busy)")


def test_a_chat_streams_and_remembers(page):
    page.click("#more"); page.fill("#max_tokens", "12"); page.fill("#seed", "1")
    ask(page, "Hi")
    ask(page, "And then?")
    assert page.locator(".user").all_inner_texts() == ["Hi", "And then?"] and page.locator(".assistant .text").count() == 2
    assert "tokens/s" in page.locator(".meta").first.inner_text()
    page.click("#fresh")
    assert page.locator(".user").count() == 0 and page.locator(".empty").count() == 1


def test_what_a_model_writes_is_text(page):
    page.select_option(".column select", "hostile")
    ask(page, "<b>attack</b>")
    assert page.evaluate("window.hacked") is None and page.locator(".talk img, .talk script, .talk b, .talk a, .talk i").count() == 0
    assert page.locator(".user").inner_text() == "<b>attack</b>" and page.locator(".assistant pre").inner_text().startswith("<b onclick=") and "你好 🙂" in page.locator(".assistant .text").inner_text()
    policy = page.request.get(page.url).headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert page.evaluate("(() => { const s = document.createElement('script'); s.textContent = 'window.inline=1'; document.head.append(s); return window.inline; })()") is None  # the policy forbids it


def test_probabilities_of_every_token(page):
    page.click("#more"); page.fill("#max_tokens", "8"); page.check("#probabilities")
    ask(page, "Hi")
    assert page.locator(".token").count() == 8
    page.locator(".token").nth(3).hover()
    shown = page.locator("#alternatives")
    assert shown.is_visible() and shown.locator("div").count() >= 5 and shown.locator(".chosen").count() == 1 and "%" in shown.inner_text()


def test_two_models_side_by_side(page):
    page.click("#more"); page.fill("#max_tokens", "10"); page.click("#compare")
    assert page.locator(".column").count() == 2
    ask(page, "Both of you")
    eventually(lambda: page.locator(".assistant.busy").count() == 0)
    assert page.locator(".user").all_inner_texts() == ["Both of you"]*2 and page.locator(".assistant .text").count() == 2
    a, b = (c.bounding_box() for c in page.locator(".column").all())
    assert a["x"] + a["width"] <= b["x"] + 1 and abs(a["width"] - b["width"]) < 3


def test_refusals_and_stopping(page):
    page.click("#more"); page.fill("#max_tokens", "9"); page.fill("#system", "word "*700)
    ask(page, "Hi")
    assert "context" in page.locator(".fault").inner_text() or "tokens" in page.locator(".fault").inner_text()
    page.fill("#system", ""); page.fill("#max_tokens", "400"); page.click("#fresh")
    page.fill("#question", "Go on"); page.keyboard.press("Enter")
    page.wait_for_selector("body.busy"); page.click("#send")
    page.wait_for_selector("body:not(.busy)")


def test_chinese_and_a_phone(browser, endpoint, tmp_path):
    context = browser.new_context(locale="zh-CN", viewport={"width": 360, "height": 640}, device_scale_factor=2, has_touch=True)
    page = context.new_page()
    page.goto(endpoint.url); page.wait_for_selector(".column select")
    assert page.locator("html").get_attribute("lang") == "zh" and "想了解什么" in page.inner_text("main")
    page.select_option(".column select", "hostile")
    ask(page, "你好")
    for _ in range(2):  # nothing sticks out to the side, with the settings open too
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth && [...document.querySelectorAll('header *, #composer, .talk > div')].every(e => e.getBoundingClientRect().right <= innerWidth + 1)")
        page.click("#more")
    page.click("#more"); page.click("#language")
    assert page.locator("html").get_attribute("lang") == "en" and page.locator("#language").inner_text() == "中文"
    context.close()


def test_a_key_is_asked_for(browser, tmp_path):
    with served(Scripted("so", name="m"), keys=["a-key"]) as e:
        context = browser.new_context(locale="en-US")
        page = context.new_page()
        page.goto(e.url)
        eventually(lambda: "API key" in page.inner_text("#state"))
        page.click("#more"); page.fill("#key", "a-key"); page.keyboard.press("Tab")
        page.wait_for_selector(".column select")
        ask(page, "Hi")
        assert page.locator(".assistant .text").inner_text() == "so"
        context.close()
