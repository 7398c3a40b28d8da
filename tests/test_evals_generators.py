"""The same tasks of everything that generates: a model, its engine, an adapter, a quantized copy, an endpoint; and from there to a page, a gate and the run's own record."""
import json
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import REPO
from endpoint_help import served

from aigc.cli.main import main
from aigc.core.errors import GateError, AigcError
from aigc.core.store import Store
from aigc.evals.board import run_suite, save_run
from aigc.evals.gate import Policy, Rule, gate_report
from aigc.evals.suites import Task
from aigc.evals.verdict import read_run

ROWS = [{"n": n, "sum": 2 * n, "wrong": [2 * n + 1, 2 * n, 7 * n + 3], "text": f"The sum of {n} and {n} is {2 * n}."} for n in range(1, 11)]
TASKS = [Task(name="sums", rows=lambda: ROWS, prompt="What is {{ n }} + {{ n }}?", answer="sum", verifier={"kind": "overlap", "measure": "chrf"}, max_tokens=6),
         Task(name="choices", kind="choice", rows=lambda: ROWS, prompt="{{ n }} + {{ n }} =", choices="wrong", answer="{{ sum }}"),
         Task(name="texts", kind="text", rows=lambda: ROWS, prompt="{{ text }}")]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    "A store with `tiny` in float32, a LoRA adapter of it and a quantized copy."
    from peft import LoraConfig, get_peft_model
    import aigc.quant.plugin  # noqa: F401
    from aigc.models.sources import load_model
    from aigc.quant.artifacts import save_quantized
    from aigc.quant.format import FORMATS, QuantConfig
    from aigc.quant.methods import quantize_model
    store = Store(tmp_path_factory.mktemp("generators")/"store")
    model, tokenizer = load_model("tiny", dtype=torch.float32, device="cpu", store=store)
    with (work := store.writing("model", "exact")) as folder: model.save_pretrained(folder); tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    with store.writing("adapter", "tuned", inputs=[work.artifact.ref]) as folder: get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=64, target_modules=["q_proj", "up_proj"], init_lora_weights=False)).save_pretrained(folder)
    rounded, _ = load_model("model/exact", device="cpu", store=store)
    report = quantize_model(rounded, QuantConfig.read(FORMATS["w4a16"].model_dump() | dict(method="rtn")))
    save_quantized(store, "small", rounded, tokenizer, report, source=work.artifact.ref)
    return store


def scores(summary): return {(t, m): i.mean for t, s in summary.tasks.items() for m, i in s.metrics.items()}


def answers(folder): return {(r.task, r.id): r.answer for r in read_run(str(folder)).results if r.task != "texts"}


def test_whatever_generates_answers_the_same_suite(store, tmp_path):
    "Engine and endpoint say what the model says; an adapter and a quantized copy something else, and each is known by its own digest and size."
    from aigc.serve.llm import LLM
    from aigc.serve.worker import process_engine
    found = {name: run_suite(f"{kind}/{name}", TASKS, tmp_path/name, store=store) for kind, name in (("model", "exact"), ("adapter", "tuned"), ("model", "small"))}
    engine = LLM.load("model/exact", dtype=torch.float32, device="cpu", store=store)
    found["engine"] = run_suite("model/exact", TASKS, tmp_path/"engine", generator=engine, batch_size=5, store=store)
    assert scores(found["engine"]) == pytest.approx(scores(found["exact"]), abs=1e-4) and answers(tmp_path/"engine") == answers(tmp_path/"exact")
    assert found["engine"].digest == found["exact"].digest == store.get("model/exact").digest and not any(r.cached for r in read_run(str(tmp_path/"engine")).results)
    assert len({s.digest for s in found.values()}) == 3 and found["small"].bytes < .5 * found["exact"].bytes < .5 * found["tuned"].bytes
    merged = run_suite("adapter/tuned", TASKS[:1], tmp_path/"merged", generator=LLM.load("adapter/tuned", dtype=torch.float32, device="cpu", store=store), store=store)
    assert {k: v for k, v in answers(tmp_path/"tuned").items() if k[0] == "sums"} == answers(tmp_path/"merged") and merged.digest == found["tuned"].digest
    for other in ("tuned", "small"):
        assert answers(tmp_path/other) != answers(tmp_path/"exact") and abs(scores(found[other])["texts", "bits_per_byte"] - scores(found["exact"])["texts", "bits_per_byte"]) > 1e-3, other
    with served(process_engine("model/exact", name="exact", dtype=torch.float32, device="cpu", store=store)) as endpoint:
        at = f"{endpoint.url}/v1"
        found["endpoint"] = run_suite("exact", TASKS[:1], tmp_path/"endpoint", endpoint=at, store=store)
        with pytest.raises(AigcError, match="log-probabilities"): run_suite("exact", TASKS[1:2], tmp_path/"no", endpoint=at, store=store)
    assert scores(found["endpoint"]) == pytest.approx({k: v for k, v in scores(found["exact"]).items() if k[0] == "sums"}, abs=1e-12) and found["endpoint"].digest == ""
    with pytest.raises(AigcError, match="does not know the digest"): gate_report(Policy(rules=[Rule(task="sums", at_least=0)]), str(tmp_path/"endpoint"), "0" * 64, store=store)


def test_a_release_asks_the_gate(store, tmp_path):
    "One call: the policy's verdict on a report, bound to the model's digest."
    for name in ("exact", "small"):
        run_suite(f"model/{name}", TASKS[:1], tmp_path/name, store=store)
        save_run(tmp_path/name, f"of-{name}", store=store)
    (tmp_path/"p.yaml").write_text("rules: [{task: sums, allowed_loss: 1.0}, {size_ratio: 0.5}]")
    digest = store.get("model/small").digest
    verdict = gate_report(tmp_path/"p.yaml", "report/of-small", digest, baseline="report/of-exact", store=store)
    assert verdict.passed and verdict.model_digest == digest and verdict.report_digest == store.get("report/of-small").digest and verdict.baseline_digest == store.get("report/of-exact").digest
    with pytest.raises(AigcError, match="is about"): gate_report(tmp_path/"p.yaml", "report/of-small", store.get("model/exact").digest, baseline="report/of-exact", store=store)
    with pytest.raises(GateError, match="the gate said no; .* 0.01 is allowed") as e: gate_report(Policy(rules=[Rule(size_ratio=.01)]), "report/of-small", digest, baseline="report/of-exact", store=store)
    assert e.value.exit_code == 3


def aigc(capsys, *words):
    capsys.readouterr()
    try: main([*map(str, words)]); code = 0
    except SystemExit as e: code = e.code or 0
    return code, *capsys.readouterr()


def test_drift_with_tasks_on_the_command_line(store, tmp_path, monkeypatch, capsys):
    "Figures, layers and the differences on a task, as JSON and as a page without a link to anywhere."
    from aigc.data.records import Record, write_jsonl
    monkeypatch.setenv("AIGC_STORE", str(store.url))
    write_jsonl(tmp_path/"test.jsonl", [Record(id=str(n), group=f"g{n % 4}", messages=[dict(role="user", content=f"{n} + {n}?"), dict(role="assistant", content=f"It is {2 * n}.")]) for n in range(8)])
    (tmp_path/"sums.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    (tmp_path/"sums.yaml").write_text("name: sums\nkind: choice\ndata: sums.jsonl\nprompt: '{{ n }} + {{ n }} ='\nchoices: wrong\nanswer: '{{ sum }}'\n")
    code, out, err = aigc(capsys, "eval", "drift", "model/small", "model/exact", "--data", tmp_path/"test.jsonl", "--tasks", tmp_path/"sums.yaml", "--out", tmp_path/"drift", "--json")
    found = json.loads(out)
    assert code == 0 and 0 < found["kl"]["mean"] <= found["kl_max"] and found["top5"]["mean"] < 1 and len(found["layers"]) == 5 and found["layers"][0] < found["layers"][-1], err
    assert found["perplexity_ratio"]["low"] <= found["perplexity_ratio"]["mean"] and found["tasks"][0]["task"] == "sums" and found["tasks"][0]["difference"]["n"] == 10
    page = (tmp_path/"drift/drift.html").read_text(encoding="utf-8")
    assert "Q5_K_M" in page and page.count("<svg") == 2 and "<h2>sums</h2>" in page and not re.search(r"(src|href)=", page)


def test_the_harness_runs_a_folder_of_its_own_tasks(store, tmp_path, monkeypatch, capsys):
    "A user's lm-evaluation-harness YAML: `--harness lm-eval --include FOLDER --tasks NAME`."
    monkeypatch.setenv("AIGC_STORE", str(store.url))
    (tmp_path/"rows.jsonl").write_text("".join(json.dumps(dict(id=r["n"], q=f"{r['n']} + {r['n']} =", c=[str(w) for w in r["wrong"]], a=1)) + "\n" for r in ROWS))
    (tmp_path/"mine.yaml").write_text(f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path/'rows.jsonl'}}}}}\ntest_split: test\noutput_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: c\ndoc_to_target: a\nmetric_list: [{{metric: acc}}]\nmetadata: {{version: 1}}\n")
    code, out, err = aigc(capsys, "eval", "run", "model/exact", "--harness", "lm-eval", "--include", tmp_path, "--tasks", "mine", "--limit", 0, "--out", tmp_path/"out", "--save", "mine", "--json")
    assert code == 0, err
    run = read_run(json.loads(out)["artifact"], store=store)
    assert run.summary.tasks["mine"].n == 10 and run.results[0].ask.endswith("+ 1 =") and run.summary.how["through"] == "lm-evaluation-harness" and run.summary.digest == store.get("model/exact").digest
    ours = run_suite("model/exact", TASKS[1:2], tmp_path/"ours", store=store)
    assert run.summary.tasks["mine"].metrics["acc"].mean == ours.tasks["choices"].metrics["accuracy"].mean
    code, out, err = aigc(capsys, "eval", "run", "model/exact", "--harness", "lm-eval", "--include", tmp_path, "--tasks", "mein")
    assert code == 2 and "did you mean 'mine'" in err and "Traceback" not in err


def test_the_suites_job_and_the_way_back_to_its_run(store, tmp_path, monkeypatch, capsys):
    "`aigc run suites`, through the engine, against a baseline: a report artifact whose page leads to the run's page, as does a comparison written elsewhere."
    import subprocess
    import sys
    from aigc.evals.suites import find_tasks
    (tmp_path/"rows").mkdir()
    (tmp_path/"rows/sums.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    (tmp_path/"sums.yaml").write_text("name: sums\ndata: sums.jsonl\nprompt: 'What is {{ n }} + {{ n }}?'\nanswer: sum\nverifier: {kind: overlap, measure: chrf}\nmax_tokens: 6\n")
    run_suite("model/small", find_tasks([str(tmp_path/"sums.yaml")], tmp_path/"rows"), tmp_path/"first", limit=6, store=store)
    save_run(tmp_path/"first", "first", store=store)
    given = {"model": "model/exact", "tasks": tmp_path/"sums.yaml", "data": tmp_path/"rows", "limit": 6, "through": "engine", "baseline": "report/first", "out": "second"}
    environment = {**{k: v for k, v in os.environ.items() if not k.startswith("AIGC_RUN")}, "AIGC_STORE": str(store.url), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "aigc", "run", "suites", *(w for k, v in given.items() for w in ("--set", f"{k}={v}"))], env=environment, capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr[-2000:]
    artifact, run = store.get("report/second"), read_run("report/second", store=store)
    assert run.run and artifact.run == run.run and run.summary.tasks["sums"].n == 6 and run.summary.how["kind"] == "LLM" and store.get("report/first").run == ""
    page = store.path("report/second")/"report.html"
    there = page.parent/re.search(r"href='([^']+)'>its run", page.read_text(encoding="utf-8"))[1]
    assert there.resolve() == (Path(store.local)/"runs"/run.run/"page.html").resolve() and there.is_file() and "report/second@" in there.read_text(encoding="utf-8")
    monkeypatch.setenv("AIGC_STORE", str(store.url))
    assert aigc(capsys, "eval", "compare", "report/first", "report/second", "--out", tmp_path/"c.html")[0] == 0
    link, = re.findall(r"href='([^']+)'>its run", (tmp_path/"c.html").read_text(encoding="utf-8"))
    assert (tmp_path/link).resolve() == there.resolve()
