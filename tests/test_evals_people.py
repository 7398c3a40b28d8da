"""Judges and people: a judge behind a real endpoint that talks rubbish or dies, and two voters at a served blind page."""
import contextlib
import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from conftest import missing
from endpoint_help import Scripted, served

from aigc.cli.main import main
from aigc.core.errors import AigcError
from aigc.evals.judge import Pair, judge_report, read_vote_file, vote_all
from aigc.models.generate import OpenAIGenerator

PAIRS = [Pair(id=f"p{n}", ask=f"问题 {n}?" if n % 2 else f"Question {n}?", baseline="worse <b>x</b></script>", candidate=f"good answer {n}") for n in range(12)]


def test_several_judges_behind_endpoints(tmp_path):
    "One always likes what stands first, one talks rubbish: the report says so, and votes that are there are not bought again."
    first, rubbish = Scripted("Short reason. [[A]]", name="first"), Scripted("As a language model I cannot", name="rubbish")
    with served(first, rubbish) as endpoint:
        judges = [OpenAIGenerator(f"{endpoint.url}/v1", name, parallel=4, retries=0) for name in ("first", "rubbish")]
        votes = [v for j in judges for v in vote_all(j, PAIRS, tmp_path/"votes.jsonl", batch_size=5)]
        report = judge_report(PAIRS, votes)
        assert (report.win_rate.mean, report.swap_consistency, report.first_place, report.ties, report.unusable) == (.5, 0, 1, 1, .5) and report.judges == ["first", "rubbish"]
        asked = len(first.requests)
        assert asked == 24 and vote_all(judges[0], PAIRS, tmp_path/"votes.jsonl") == votes[:12] and len(first.requests) == asked
        changed = [PAIRS[0].model_copy(update={"candidate": "another"}), *PAIRS[1:]]
        vote_all(judges[0], changed, tmp_path/"votes.jsonl")
        assert len(first.requests) == asked + 2  # a vote counts only for what was judged
    with open(tmp_path/"votes.jsonl", "a", encoding="utf-8") as f: f.write('{"id": "torn')
    more = [Pair(id="new", ask="?", baseline="a", candidate="b")]
    with pytest.raises(AigcError, match="no endpoint answers"): vote_all(judges[0], PAIRS + more, tmp_path/"votes.jsonl")
    assert len(read_vote_file(tmp_path/"votes.jsonl")) == 25  # the torn line is gone, nothing else


def test_people_vote_at_a_served_page(tmp_path, capsys):
    "`aigc eval blind --serve`: two voters in browsers of their own, a stranger's rubbish is refused, a dead server is told, and `aigc eval votes` makes records."
    browser = shutil.which("chromium") or shutil.which("google-chrome") or missing("chromium")
    playwright = __import__("playwright.sync_api").sync_api
    (tmp_path/"pairs.jsonl").write_text("".join(p.model_dump_json() + "\n" for p in PAIRS[:4]), encoding="utf-8")
    words = [sys.executable, "-u", "-m", "aigc", "eval", "blind", str(tmp_path/"pairs.jsonl"), "--out", str(tmp_path/"blind"), "--serve", "--port", "0", "--language", "zh"]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        url = server.stdout.readline().split()[2]
        for path, body, wanted in (("votes", b"{}", 400), ("votes", b'{"page": "x", "who": "../../x", "votes": []}', 400), ("key.json", None, 404), ("pairs.jsonl", None, 404)):
            with pytest.raises(urllib.error.HTTPError) as e: urllib.request.urlopen(urllib.request.Request(url + path, body), timeout=20)
            assert e.value.code == wanted, path
        with playwright.sync_playwright() as p:
            window = p.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
            for likes in (True, False):
                page, errors, foreign = window.new_context(viewport={"width": 390, "height": 800}).new_page(), [], []
                page.on("console", lambda m: errors.append(m.text)); page.on("pageerror", lambda e: errors.append(str(e))); page.on("request", lambda r: foreign.append(r.url) if not r.url.startswith(url) else None)
                page.goto(url)
                for n in range(4):
                    good = "left" if "good" in page.locator("#left").inner_text() else "right"
                    with page.expect_response(lambda r: r.url.endswith("/votes")) as answer: page.click(f"[data-vote={good if likes or n == 0 else {'left': 'right', 'right': 'left'}[good]}]")
                    assert answer.value.status == 204
                assert page.locator("#both").is_hidden() and page.locator("#lost").is_hidden() and errors == [] == foreign
            server.terminate(); server.wait(20)
            page.click("#undo")
            page.locator("#lost").wait_for(state="visible", timeout=20_000)
            window.close()
    finally:
        server.kill(); server.wait()
    assert len(list((tmp_path/"blind").glob("votes-*.json"))) == 2
    capsys.readouterr()
    with contextlib.suppress(SystemExit): main(["eval", "votes", str(tmp_path/"blind"), "--records", str(tmp_path/"preferred.jsonl"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["votes"] == 8 and found["win_rate"]["mean"] == 5 / 8 and found["agreement"] == .25 and found["records"] == 1, found
    assert json.loads((tmp_path/"preferred.jsonl").read_text(encoding="utf-8"))["chosen"][0]["content"].startswith("good answer")


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.timeout(1200)
def test_people_vote_in_label_studio(label_studio):
    "Pairs and answers go to a real server with both templates, two people answer there, and their votes and grades come back as ours."
    from aigc.data.annotate import LabelStudio
    from aigc.evals.judge import Pair
    from aigc.evals.people import blind_page, label_studio_grades, label_studio_votes, preference_records, push_answers, push_pairs
    server = LabelStudio(*label_studio)
    pairs = [Pair(id=f"p{n}", ask=f"问题 {n}?", baseline="worse <b>x</b>", candidate=f"好的回答 {n}") for n in range(6)]
    _, key = blind_page(pairs, seed=5)
    project = push_pairs(server, "pairs", pairs, key)

    def annotate(project, result):
        tasks = server._call("GET", f"/api/projects/{project}/tasks?page_size=100")
        for task in tasks: server._call("POST", f"/api/tasks/{task['id']}/annotations/", {"result": result(task["data"])})
        return len(tasks)
    def likes_the_candidate(data): return [{"from_name": "vote", "to_name": "ask", "type": "choices", "value": {"choices": ["left" if "好" in data["left"] else "right"]}}]
    assert annotate(project, likes_the_candidate) == annotate(project, likes_the_candidate) == 6
    votes = label_studio_votes(server.export(project), key)
    assert len(votes) == 12 and {v.score for v in votes} == {1.0} and {v.id for v in votes} == set(key["candidate_left"]) and votes[0].judge.startswith("label-studio-")
    assert [r.chosen[0].content for r in preference_records(pairs, votes)] == [p.candidate for p in pairs]
    graded = push_answers(server, "answers", [{"id": p.id, "ask": p.ask, "answer": p.candidate} for p in pairs])
    annotate(graded, lambda data: [{"from_name": "grade", "to_name": "answer", "type": "rating", "value": {"rating": 4}}, {"from_name": "reason", "to_name": "answer", "type": "textarea", "value": {"text": ["清楚"]}}])
    assert label_studio_grades(server.export(graded)) == {p.id: [.75] for p in pairs}
    with pytest.raises(AigcError, match="refused"): server.create("broken", form="<View><Nonsense name=")
