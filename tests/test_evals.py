"""Evaluation from outside: metrics without a network, the evaluate job under papermill, a kill in the middle, the report in a browser, every parameter felt."""
import json, os, re, shutil, signal, subprocess, sys, time
from html.parser import HTMLParser
from pathlib import Path

import psutil
import pytest
from conftest import REPO, missing

from aigc.cli.main import main
from aigc.core.errors import AigcError
from aigc.core.store import Store
from aigc.data.records import Record, write_jsonl
from aigc.evals.compare import compare_models, label_models
from aigc.evals.measure import read_items
from aigc.evals.report import EvalReport
from aigc.evals.scores import chrf, rouge_l
from aigc.evals.statistics import mean_interval, paired_bootstrap


def questions(count: int, groups: int = 5, start: int = 0) -> list[Record]:
    def ask(n): return f"Write the one-line docstring of this Python function.\n```python\ndef get_{n}(self):\n    return self.items[{n}]\n```"
    return [Record(id=f"f{n}", group=f"module{n % groups}", meta=dict(name=f"get_{n}"), messages=[dict(role="user", content=ask(n)), dict(role="assistant", content=f"Return item number {n}.")]) for n in range(start, start + count)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A store with `tiny` and a rounded copy of it, and a dataset of 20 + 6 questions."
    from aigc.models.sources import load_model, model_ref
    folder = tmp_path_factory.mktemp("evals")
    store = Store(folder/"store")
    model, tokenizer = load_model("tiny", store=store, device="cpu")
    for w in model.parameters():
        if w.ndim == 2: w.data = (w.data * 40).round() / 40
    with store.writing("model", "rounded", inputs=[model_ref("tiny", store)]) as target: model.save_pretrained(target); tokenizer.save_pretrained(target)
    write_jsonl(folder/"data/test.jsonl", questions(20)); write_jsonl(folder/"data/test_new.jsonl", questions(6, start=20))
    return folder


def environment(place: Path, **more) -> dict:
    return {**{k: v for k, v in os.environ.items() if not k.startswith("AIGC_RUN")}, "AIGC_STORE": str(place/"store"), **more}


def papermill(place: Path, out: Path, *words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "papermill", "--no-progress-bar", str(REPO/"nbs/jobs/40_evaluate.ipynb"), str(out), *map(str, words)], env=environment(place), capture_output=True, text=True, cwd=out.parent)


def test_metrics_need_no_network_and_no_cache(tmp_path):
    "In a process whose every connection fails and whose home cannot be written."
    code = """
import socket, sys
def refuse(*a, **k): raise OSError("no network here")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import evaluate
from aigc.evals.metrics import ChrF, Perplexity, RougeL, RuleScore
found = evaluate.combine([RougeL(), ChrF()]).compute(predictions=["返回长度。", "Return it."], references=["返回长度。", "Return it."])
assert found == {"rouge_l": 1.0, "chrf": 100.0}, found
assert RuleScore().compute(predictions=["Return it."])["rule_score"] == 1.0
assert Perplexity().compute(predictions=[[-1.0, -1.0]])["tokens"] == 2
import json; print(json.dumps(found))
"""
    home = tmp_path/"home"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "HOME": str(home), "HF_HOME": str(home/"hf")}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (home/"hf"/"metrics").exists()


def test_scores_equal_the_reference_implementations_on_real_text(sample):
    "Real question-and-answer text: ROUGE-L as rouge-score where it is ASCII, chrF as sacrebleu everywhere."
    import sacrebleu
    from rouge_score import rouge_scorer
    rows = [json.loads(line) for line in sample("eval/gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()[:120]]
    texts = [r["answer"] for r in rows]
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    for a, b in zip(texts, texts[1:]):
        if (a + b).isascii(): assert rouge_l(a, b) == pytest.approx(scorer.score(b, a)["rougeL"].fmeasure, abs=1e-12)
        assert chrf(a, b) == pytest.approx(sacrebleu.sentence_chrf(a, [b]).score, abs=1e-9)


def test_paired_statistics_reproduce_a_published_comparison():
    "Two models of the GSM8K paper on 1,319 questions (306 both right, 152 only one, 209 only the other): the known paired interval, narrower than an unpaired one."
    a, b = [1.] * (306 + 152) + [0.] * (1319 - 306 - 152), [1.] * 306 + [0.] * 152 + [1.] * 209 + [0.] * (1319 - 306 - 152 - 209)
    difference = paired_bootstrap(a, b)
    assert difference.mean == pytest.approx(-57 / 1319) and difference.low == pytest.approx(-.0712, abs=2e-3) and difference.high == pytest.approx(-.0152, abs=2e-3)
    one, other = mean_interval(a), mean_interval(b)
    assert difference.high - difference.low < ((one.high - one.low) ** 2 + (other.high - other.low) ** 2) ** .5


class Links(HTMLParser):
    found: list = []
    def handle_starttag(self, tag, attrs): self.found += [v for k, v in attrs if k in ("src", "href")] + ([tag] if tag in ("script", "link", "iframe", "img") else [])


@pytest.mark.slow
def test_the_job_under_plain_papermill(place, tmp_path):
    done = papermill(place, tmp_path/"out.ipynb", "-y", json.dumps(dict(model="tiny", models=["tiny", "model/rounded"], names=["base", "again", "rounded"], source="tiny", data=str(place/"data"), limit=8, max_tokens=6, batch_size=4, out="judged")))
    assert done.returncode == 0, done.stderr[-2000:]
    store = Store(place/"store")
    artifact = store.get("report/judged")
    folder = store.path(artifact.ref, verify=True)
    assert {f.path for f in artifact.files} == {"summary.json", "items.jsonl", "report.html", "intervals.svg"}
    assert [i.split("@")[0] for i in artifact.inputs[:2]] == ["model/tiny", "model/rounded"] and artifact.metrics["drift.kl_low"] <= artifact.metrics["drift.kl"] <= artifact.metrics["drift.kl_high"]
    report = EvalReport.model_validate_json((folder/"summary.json").read_text())
    assert [(r.model, r.split, r.n) for r in report.rows] == [(m, s, n) for s, n in (("test", 8), ("test_new", 6)) for m in ("base", "rounded")]
    assert report.kept.source == "base" and report.kept.drift.kl.mean > 0 and set(report.rows[0].rules) == {"one_sentence", "imperative", "full_stop", "short"}
    assert {"data", "python", "torch", "threads", "load average", "decoding"} <= set(report.how)
    assert len(read_items(folder/"items.jsonl")) == 2 * (8 + 6)
    for row in report.rows:
        for interval in [*row.metrics.values(), *row.rules.values(), *row.versus.values()]: assert interval.low <= interval.mean <= interval.high
    links = Links(); links.found = []; links.feed((folder/"report.html").read_text())
    assert links.found == []


@pytest.mark.slow
def test_a_wrong_parameter_is_one_sentence(place, tmp_path):
    done = papermill(place, tmp_path/"out.ipynb", "-p", "split", "tset", "-p", "data", place/"data")
    assert done.returncode != 0 and "did you mean 'test'" in done.stderr


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_where_it_stopped(place):
    "SIGKILL of everything in the middle of `aigc run evaluate`; the same command then asks only what is missing."
    words = [sys.executable, "-m", "aigc", "run", "evaluate", "--set", "model=tiny", "--set", f"data={place/'data'}", "--set", "limit=0", "--set", "max_tokens=100", "--set", "batch_size=1", "--set", "out=killed"]
    process = subprocess.Popen(words, env=environment(place), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    def written(): return next((f for f in (place/"store").rglob("items.jsonl") if "evaluation" in f.parts and f.read_bytes().count(b"\n") >= 3), None)
    deadline = time.monotonic() + 240
    while not (found := written()) and time.monotonic() < deadline and process.poll() is None: time.sleep(.02)
    assert found, "the evaluation never wrote an item"
    for p in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        try: p.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess: pass
    process.wait()
    time.sleep(.5)
    first = [line for line in found.read_text(encoding="utf-8").split("\n")[:-1]]
    assert 3 <= len(first) < 26 and not any(a.name == "killed" for a in Store(place/"store").list("report"))
    done = subprocess.run(words, env=environment(place), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (Store(place/"store").path("report/killed")/"items.jsonl").read_text(encoding="utf-8").splitlines()
    page = Store(place/"store").path("report/killed")/"report.html"
    assert (page.parent/re.search(r"href='([^']+)'>its run", page.read_text(encoding="utf-8"))[1]).resolve().is_file()   # a report leads to its run
    assert lines[:len(first)] == first and len(lines) == 26 and len({(json.loads(x)["split"], json.loads(x)["id"]) for x in lines}) == 26


CHANGES = [dict(seed=1), dict(limit=3), dict(max_tokens=2), dict(split="test_new"), dict(new_split=True), dict(title="other"), dict(source="base"), dict(batch_size=1), dict(speed_prompts=2)]


def test_every_parameter_is_felt(place, tmp_path):
    "Each one changes what is asked, what is said, or how the report reads."
    store, rows = Store(place/"store"), {"base": "tiny", "rounded": "model/rounded"}
    def look(n, **changed):
        r = compare_models(rows, str(place/"data"), folder=tmp_path/str(n), store=store, **dict(limit=4, max_tokens=4, batch_size=2, speed_prompts=0) | changed)
        items = read_items(tmp_path/str(n)/"items.jsonl")
        return [(i.id, i.prediction) for i in items], [(x.model, x.split) for x in r.rows], r.title, r.kept is not None, r.how["decoding"], r.subjects[0].decode is not None
    plain = look("plain")
    assert look("same") == plain
    for n, change in enumerate(CHANGES): assert look(n, **change) != plain, change


def test_bad_input_is_one_sentence(place, tmp_path):
    store = Store(place/"store")
    for wrong, words in [(lambda: compare_models({"tiny": "tiny"}, str(place/"data"), folder=tmp_path, limit=1, store=store), "an interval needs two"),
                         (lambda: compare_models({"tiny": "tiny"}, str(place/"data"), folder=tmp_path, split="tets", store=store), "did you mean 'test'"),
                         (lambda: label_models(["tiny", "model/roundd"], store=store), "model/roundd"),
                         (lambda: label_models(["tiny"], ["a", "b", "c"], store=store), "3 names for 1 models")]:
        with pytest.raises(AigcError, match=re.escape(words)) as e: wrong()
        assert "\n" not in str(e.value)


def test_the_command_line(place, monkeypatch, capsys):
    monkeypatch.setenv("AIGC_STORE", str(place/"store"))
    def aigc(*words):
        capsys.readouterr()
        try: main(["eval", *map(str, words)]); code = 0
        except SystemExit as e: code = e.code or 0
        return code, *capsys.readouterr()
    code, out, err = aigc("drift", "model/rounded", "tiny", "--data", place/"data", "--json")
    found = json.loads(out)
    assert code == 0 and found["kl"]["low"] > 0 and found["sequences"] == 20, err
    code, out, err = aigc("run", "tiny", "model/rounded", "--data", place/"data", "--limit", 4, "--max-tokens", 4, "--json")
    assert code == 0 and [r["model"] for r in json.loads(out)["rows"]] == ["tiny", "rounded"], err
    code, out, err = aigc("drift", "tiny", "tinny")
    assert code == 2 and "did you mean 'tiny'" in err and "Traceback" not in err


@pytest.mark.parametrize("width", [1280, 420])
def test_the_report_fits_a_browser_window(place, tmp_path, width):
    browser = shutil.which("chromium") or shutil.which("google-chrome") or missing("chromium")
    chinese = [Record(id="z", group="m", meta=dict(name="求和"), messages=[dict(role="user", content="```python\ndef 求和(数字):\n    return sum(数字)" + "  # 很长的一行" * 20 + "\n```"), dict(role="assistant", content="返回所有数字之和。")])]
    write_jsonl(tmp_path/"test.jsonl", questions(5) + chinese)
    report = compare_models({"base": "tiny", "a model with quite a long name": "model/rounded"}, str(tmp_path/"test.jsonl"), folder=tmp_path/"work", source="base", max_tokens=4, batch_size=2, speed_prompts=2, store=Store(place/"store"))
    page = report.page().replace("</body>", "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script></body>")
    (tmp_path/"page.html").write_text(page, encoding="utf-8")
    done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", f"--user-data-dir={tmp_path/'profile'}", "--dump-dom", f"file://{tmp_path/'page.html'}"], capture_output=True, text=True, timeout=120)
    wide, window = map(int, re.search(r"<title>(\d+) of (\d+)</title>", done.stdout).groups())
    assert wide <= window and "求和" in done.stdout
