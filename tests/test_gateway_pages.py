"""What people see of the gateway: the chat page with its thumbs, the dashboard, Prometheus and the feedback file."""
import json
import os
import socket
import subprocess

import httpx
import pytest
from gateway_help import CHAT, body, browser, eventually, start  # noqa: F401


def test_feedback_is_joined_to_its_request_and_to_nobody_elses(start, tmp_path):
    from aigc.serve.feedback import as_records, read_feedback
    g = start(feedback=str(tmp_path/"feedback.jsonl"))
    asked = g.ask(text="Mail max@example.com about add(a, b)", stream=True)
    request_id = asked.headers["x-request-id"]
    def say(who="alice", **fields): return httpx.post(g.url + "/v1/feedback", json={"request_id": request_id, "rating": "down"} | fields, headers=g.headers(who))
    eventually(lambda: say(correction="Return the sum.").status_code == 200)
    assert say("mallory").status_code == 404 and say(request_id="req-none").status_code == 404 and say("boss").status_code == 403 and say(None).status_code == 401
    assert say(rating="meh").status_code == 400 and say(odd=1).status_code == 400 and httpx.get(g.url + "/v1/feedback", headers=g.headers()).status_code == 405
    pair = next(iter(as_records(read_feedback(tmp_path/"feedback.jsonl"), "preference")))
    assert pair.chosen[0].content == "Return the sum." and pair.rejected[0].content.startswith("stub:Mail <EMAIL> about") and "max@" not in (tmp_path/"feedback.jsonl").read_text()
    assert 'aigc:feedback_total{rating="down"} 1.0' in g.metrics()


def picture(page, name):
    if os.environ.get("AIGC_PICTURES"): page.screenshot(path=f"{os.environ['AIGC_PICTURES']}/{name}.png")


def watched(browser, **how):
    "A page, and what went wrong in it."
    page, wrong = browser.new_context(locale="en-US", **how).new_page(), []
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" and not any(x in m.text for x in ("401", "403", "404", "favicon")) else None)
    return page, wrong


@pytest.mark.parametrize("width", [1280, 390])
def test_thumbs_and_words_on_the_chat_page_become_records(start, browser, tmp_path, width):
    from typer.testing import CliRunner
    from aigc.cli.main import app
    g = start(({"name": "stub", "words": 6},), page=True, feedback=str(tmp_path/"said.jsonl"))
    page, wrong = watched(browser, viewport={"width": width, "height": 800}, has_touch=width < 500)
    page.goto(g.url)
    eventually(lambda: "API key" in page.inner_text("#state"))
    page.click("#more")
    page.fill("#key", g.secrets["alice"])
    page.keyboard.press("Tab")
    page.wait_for_selector(".column select")
    page.click("#more")

    def ask(question):
        before = page.locator(".rate").count()
        page.fill("#question", question)
        page.keyboard.press("Enter")
        eventually(lambda: page.locator(".rate").count() == before + 1, 10)
        return page.locator(".rate").last

    rate = ask("Mail max@example.com about add(a, b)")
    picture(page, f"page-answer-{width}")
    rate.locator(".down").click()
    eventually(lambda: rate.locator(".said").inner_text() == "Thank you.")
    assert rate.locator(".down").get_attribute("aria-pressed") == "true" and rate.locator(".up").get_attribute("aria-pressed") == "false"
    rate.locator("textarea").nth(0).fill("<b>it</b> only repeats the question")
    rate.locator("textarea").nth(1).fill("Return the sum of a and b.")
    picture(page, f"page-words-{width}")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    rate.locator(".tell").click()
    eventually(lambda: "kept" in rate.locator(".said").inner_text())
    assert not rate.locator("form").is_visible()
    rate = ask("And sub(a, b)?")
    rate.locator(".up").click()
    eventually(lambda: rate.locator(".said").inner_text() == "Thank you.")
    assert rate.locator("textarea").nth(1).is_hidden()                                    # a good answer needs no better one
    rate.get_by_text("Not now").click()
    page.click("#language")
    assert rate.locator(".up").get_attribute("title") == "回答得好" and rate.locator(".said").inner_text() == "谢谢。"
    picture(page, f"page-both-{width}")
    g.gateway.book.answers.clear()                                                        # the server forgot: the page says so
    rate.locator(".down").click()
    eventually(lambda: "remembered" in rate.locator(".said").inner_text())
    assert not wrong, wrong
    for kind, count in (("preference", 1), ("sft", 2), ("eval", 1)):
        done = CliRunner().invoke(app, ["data", "feedback", str(tmp_path/"said.jsonl"), "--kind", kind, "--out", str(tmp_path/f"{kind}.jsonl")])
        assert done.exit_code == 0 and len((tmp_path/f"{kind}.jsonl").read_text().splitlines()) == count, done.output
    pair = json.loads((tmp_path/"preference.jsonl").read_text())
    assert pair["chosen"][0]["content"] == "Return the sum of a and b." and pair["rejected"][0]["content"].startswith("stub:Mail <EMAIL>") and pair["meta"]["comment"] == "<b>it</b> only repeats the question" and "max@" not in json.dumps(pair)
    second = json.loads((tmp_path/"sft.jsonl").read_text().splitlines()[1])["messages"]
    assert [m["role"] for m in second] == ["user", "assistant", "user", "assistant"] and second[2]["content"] == "And sub(a, b)?"


def test_no_thumbs_where_nobody_keeps_them(start, browser):
    g = start(({"words": 3},), page=True)
    page, wrong = watched(browser)
    page.goto(g.url)
    page.click("#more")
    page.fill("#key", g.secrets["alice"])
    page.keyboard.press("Tab")
    page.wait_for_selector(".column select")
    page.check("#probabilities")                                                          # guards leave none, the text is there all the same
    page.fill("#question", "Hi")
    page.keyboard.press("Enter")
    eventually(lambda: page.locator(".meta").count() == 1, 10)
    assert page.locator(".rate").count() == 0 and page.locator(".assistant .text").inner_text() == "stub:Hi w1 w2" and not wrong


def test_the_dashboard_in_a_browser(start, browser):
    g = start(({"name": "<b>one</b>", "words": 4, "weight": 90}, {"name": "two", "words": 4, "weight": 10}), dashboard=True)
    for n in range(30): g.ask(text=f"q{n}", stream=True)
    page, wrong = watched(browser, viewport={"width": 1200, "height": 900})
    page.goto(g.url + "/dashboard")
    for key, said in ((g.secrets["alice"], "not an administrator's"), ("nonsense", "not known")):
        page.fill("#key", key)
        page.click("button")
        eventually(lambda: said in page.inner_text("#said"))
    assert page.is_hidden("#all")
    page.fill("#key", g.secrets["boss"])
    page.click("button")
    page.wait_for_selector(".card[data-name='requests/s']")
    cards = {c.get_attribute("data-name"): c.query_selector("b").text_content() for c in page.query_selector_all(".card")}
    assert cards["requests/s"] == "0.5" and cards["errors"] == "0.0 %" and cards["tokens/s"] == "2.0" and "ms" in cards["latency p50"], cards
    rows = [r for r in ([c.inner_text() for c in row.query_selector_all("td")] for row in page.query_selector_all("#rows tr")) if r[0].startswith("docs")]
    assert len(rows) == 2 and rows[0][1] == "90.0 %" and sum(int(r[2]) for r in rows) == 30
    engines = [[c.inner_text() for c in row.query_selector_all("td")] for row in page.query_selector_all("#engines tr")]
    assert len(engines) == 4 and engines[0][1] == "0" and engines[0][3] == "0.0 %", engines   # two models ask two back ends
    before = page.inner_text("#rows")
    g.stubs[0].kill(), g.stubs[1].kill()
    g.ask()
    eventually(lambda: page.inner_text("#rows") != before, 8)                             # it looks again by itself
    picture(page, "dashboard-1200")
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")            # wide tables scroll in themselves
    picture(page, "dashboard-390")
    assert not wrong, wrong


@pytest.mark.services
def test_alert_rules_and_a_real_prometheus(start, tmp_path):
    import shutil
    from conftest import REPO, missing
    for program in ("promtool", "prometheus"):
        if not shutil.which(program): missing(program)
    watch = REPO/"aigc"/"serve"/"watch"
    checked = subprocess.run(["promtool", "check", "rules", watch/"alerts.yml"], capture_output=True, text=True)
    assert checked.returncode == 0 and "SUCCESS" in checked.stdout, checked.stdout + checked.stderr
    tested = subprocess.run(["promtool", "test", "rules", REPO/"tests"/"alerts_test.yml"], capture_output=True, text=True, cwd=REPO/"tests")
    assert tested.returncode == 0, tested.stdout + tested.stderr
    g = start()
    for n in range(20): g.ask(text=f"q{n}", stream=True)
    (tmp_path/"key").write_text(g.secrets["boss"])
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    (tmp_path/"prometheus.yml").write_text(json.dumps({"global": {"scrape_interval": "500ms"}, "rule_files": [str(watch/"alerts.yml")], "scrape_configs": [
        {"job_name": "aigc", "authorization": {"credentials_file": str(tmp_path/"key")}, "static_configs": [{"targets": [g.url.removeprefix("http://")]}]}]}))
    process = subprocess.Popen(["prometheus", f"--config.file={tmp_path/'prometheus.yml'}", f"--storage.tsdb.path={tmp_path/'tsdb'}", f"--web.listen-address=127.0.0.1:{port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        def ask(query):
            try: return httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": query}, timeout=5).json()
            except (httpx.HTTPError, ValueError):  # while it starts, Prometheus answers in plain text
                return {"data": {"result": []}}
        eventually(lambda: any(float(r["value"][1]) >= 20 for r in ask('sum(aigc:request_success_total)')["data"]["result"]), 30)
        board = json.loads((watch/"grafana.json").read_text())
        queries = [t["expr"].replace("$__rate_interval", "1m").replace("$model", ".*") for p in board["panels"] for t in p.get("targets", [])]
        assert len(queries) >= 10
        for query in queries:
            answer = ask(query)
            assert answer["status"] == "success", (query, answer)
        known = set(httpx.get(f"http://127.0.0.1:{port}/api/v1/label/__name__/values").json()["data"])
        import re
        wanted = {name for q in [*queries, (watch/"alerts.yml").read_text()] for name in re.findall(r"aigc:\w+", q)}
        families = {line.split()[2] for line in g.metrics().splitlines() if line.startswith("# TYPE")}
        assert not {n for n in wanted if n not in known and re.sub(r"_(bucket|sum|count|total)$", "", n) not in families and n not in families}
        rules = httpx.get(f"http://127.0.0.1:{port}/api/v1/rules").json()["data"]["groups"]
        assert sum(len(x["rules"]) for x in rules) >= 9 and all(r["health"] != "err" for x in rules for r in x["rules"])
    finally:
        process.terminate()
        process.wait(10)


