"""The site over all runs, looked at in a real browser from the disk; sweeps from the command line."""
import json
import shutil

import pytest
from conftest import missing
from test_run import aigc, make_job

from aigc.core.store import Store
from aigc.run.listing import list_runs
from aigc.run.runner import run_job
from aigc.run.site import write_site
from aigc.run.sweep import list_sweeps, run_sweep
from aigc.run.warm import warm_running


@pytest.fixture(scope="module", autouse=True)
def warm():
    with warm_running(): yield


@pytest.fixture
def lab(tmp_path):
    (tmp_path/"store").mkdir()
    return tmp_path


@pytest.fixture
def site(lab):
    "Two jobs, five runs: three trainings on one dataset, one of them failed."
    store = Store(lab/"store")
    prepare = make_job(lab, "10_prepare", "rows: int = 3\nseed: int = 1", "with (w := Store().writing('dataset', 'docs')) as f: (f/'train.jsonl').write_text('x\\n'*rows)\nrun.output('dataset', w.artifact)")
    train = make_job(lab, "20_train", "data: str = ''\nlr: float = 0.1\nmethod: str = 'lora'", "from IPython.display import HTML\nfor step in range(40): run.log(step=step, loss=2.0*(1 - lr)**step + 0.1, accuracy=1 - (1 - lr)**step)",
                     "if method == 'full': raise ValueError('<b>out of memory</b>')", "with (w := Store().writing('model', f'm{lr}', inputs=[data])) as f: (f/'weights').write_text(str(lr))\nrun.output('model', w.artifact)\nprint('the executed notebook')")
    data = run_job(prepare, store=store).outputs["dataset"]
    for told in ({"lr": 0.05}, {"lr": 0.1}, {"lr": 0.2}, {"lr": 0.1, "method": "full"}): run_job(train, {"data": data, **told}, store=store)
    return write_site(store)


def browser():
    if missing_playwright(): missing("playwright")
    from playwright.sync_api import sync_playwright
    path = shutil.which("chromium") or shutil.which("google-chrome") or missing("chromium")
    return sync_playwright(), path


def missing_playwright():
    import importlib.util
    return importlib.util.find_spec("playwright") is None


def test_the_site_works_from_the_disk(site, tmp_path):
    start, path = browser()
    with start as p:
        chromium = p.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        page, errors, asked = chromium.new_page(viewport={"width": 1280, "height": 1000}), [], []
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None); page.on("pageerror", lambda e: errors.append(str(e)))
        page.on("request", lambda r: asked.append(r.url))
        page.goto(f"file://{site}")
        rows = lambda: page.locator("#runs tbody tr")
        assert rows().count() == 5 and "5 of 5 runs" in page.inner_text("#count")
        assert "<b>out of memory</b>" in page.inner_text("#runs")  # as text
        page.select_option("#job", "train"); assert rows().count() == 4
        page.fill("#find", "lr<0.15 method=lora"); assert rows().count() == 2
        page.fill("#find", ""); page.select_option("#status", "failed"); assert rows().count() == 1
        page.select_option("#status", "succeeded")
        page.click("#runs th[data-by='p:lr']")
        assert [rows().nth(i).inner_text().count("0.05") > 0 for i in range(3)][0]
        for i in range(3): rows().nth(i).locator("input").click()
        assert page.locator("#curves figure").count() == 2 and page.locator("#curves figure").first.locator("polyline").count() == 3
        assert "lr" in page.inner_text(".diff") and page.locator("#parallel polyline").count() == 3
        assert page.locator(".graph rect").count() == 4  # one dataset, three models
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280
        address = page.url
        page.goto(address); page.reload()
        assert page.locator("#curves figure").count() == 2  # a comparison has an address
        page.locator(".legend a").first.click()
        assert "the executed notebook" in page.content()
        page.click("text=← all runs")
        assert page.locator(".legend span.key").count() == 1
        page.set_viewport_size({"width": 390, "height": 800}); assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert not errors and all(u.startswith("file://") for u in asked), (errors, asked)
        chromium.close()


def test_compare_says_what_differs(site, lab):
    ids = [r.id for r in list_runs(Store(lab/"store")) if r.job == "20_train"]
    compared = json.loads(aigc(lab, "runs", "compare", ids[1], ids[2], "--json").stdout)
    assert {("parameter", "lr"), ("metric", "loss")} <= {(d["part"], d["name"]) for d in compared["differs"]} and ("parameter", "method") not in {(d["part"], d["name"]) for d in compared["differs"]}
    assert "lr" in aigc(lab, "runs", "compare", ids[1], ids[2]).stdout and aigc(lab, "runs", "compare", ids[1]).returncode == 2


# ---- sweeps

FIT = ("rate: float = 0.1\nwidth: int = 8\nseed: int = 0\nsteps: int = 1", "import random\nfor step in range(1, steps + 1):\n    run.log(step=step, loss=(rate - 0.3)**2 + 1/step + 0.001*random.Random(seed).random())\n    if steps > 1: time.sleep(0.06)",
       "with (w := Store().writing('model', 'fit')) as f: (f/'weights').write_text(f'{rate} {seed}')\nrun.output('model', w.artifact)")


def test_a_sweep_from_the_command_line(lab):
    job = make_job(lab, "10_fit", *FIT)
    done = aigc(lab, "sweep", job, "--grid", "rate=0.1,0.3", "--grid", "width=4,8", "--metric", "loss", "--seeds", "1,2", "--slots", "2", "--promote", "chosen", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and len(found["rows"]) == 4 and found["rows"][found["best"]]["values"]["rate"] == 0.3
    assert all(len(r["reached"]) == 2 for r in found["rows"])
    made = Store(lab/"store").get(found["promoted"])
    assert made.name == "chosen" and "best of 4 trials by loss" in made.card["chosen"] and made.ref not in [a.ref for a in Store(lab/"store").gc(older_than=0)]
    table = aigc(lab, "sweep", job, "--grid", "rate=0.1,0.3", "--grid", "width=4,8", "--metric", "loss", "--seeds", "1,2", "--slots", "2").stdout
    assert "±" in table and "best: rate=0.3" in table
    assert {r.status for r in list_runs(Store(lab/"store"))} == {"succeeded", "cached"} and len(list_sweeps(Store(lab/"store"))) == 2
    for wrong, sentence in {("--grid", "rats=1,2"): "did you mean 'rate'", ("--grid", "rate=0..1"): "a grid needs a list", ("--grid", "rate=1,2", "--sampler", "tpe"): "an optimizer needs to know what is good",
                            ("--grid", "rate=1,2", "--set", "rate=3"): "is set and varied", (): "needs something to vary"}.items():
        refused = aigc(lab, "sweep", job, *wrong)
        assert refused.returncode == 2 and sentence in refused.stderr, refused.stderr
    unknown = aigc(lab, "sweep", job, "--grid", "rate=0.1,0.2", "--metric", "lost")
    assert unknown.returncode == 2 and "did you mean 'loss'" in unknown.stderr


def test_a_trial_that_fails_is_never_the_best(lab):
    job = make_job(lab, "10_fit", "rate: float = 0.1", "run.log(loss=rate)\nif rate < 0.2: raise ValueError('diverged')")
    sweep = run_sweep(job, ["rate=0.1,0.3"], metric="loss", store=Store(lab/"store"), slots=2)
    assert sweep.best.values == {"rate": 0.3} and [r.status for r in sweep.rows] == ["failed", "succeeded"]


@pytest.mark.slow
def test_optuna_finds_the_place_and_stops_the_weak(lab):
    job, store = make_job(lab, "10_fit", *FIT), Store(lab/"store")
    found = run_sweep(job, ["rate=0.0..1.0"], metric="loss", sampler="tpe", trials=25, seed=3, store=store, slots=2)
    assert abs(found.best.values["rate"] - 0.3) < 0.1 and len(found.rows) == 25
    seen = set()
    pruned = run_sweep(job, ["rate=0.0..1.0"], metric="loss", sampler="tpe", trials=8, seed=3, prune=True, parameters={"steps": 40}, store=store, slots=2, show=lambda s: seen.update((r.status, s.figure(r).endswith("…")) for r in s.rows))
    assert ("running", True) in seen  # the table shows what a trial has reported so far
    statuses = [r.status for r in pruned.rows]
    assert "pruned" in statuses and pruned.best is not None and pruned.best.status == "succeeded", statuses
    early = next(r for r in pruned.rows if r.status == "pruned")
    assert next(r for r in list_runs(store) if r.id == early.runs[0]).status == "killed"  # its own record tells what happened to it


def test_random_draws_repeat(lab):
    job, draws = make_job(lab, "10_fit", *FIT), []
    for _ in range(2): draws.append([r.values for r in run_sweep(job, ["rate=1e-4..1:log"], sampler="random", trials=4, seed=7, metric="loss", store=Store(lab/"store")).rows])
    assert draws[0] == draws[1] and len({d["rate"] for d in draws[0]}) == 4
    assert sum(r.status == "cached" for r in list_runs(Store(lab/"store"))) == 4


# ---- over pipelines

CHAIN = """
name: chain
parameters: {rows: 3, seed: 0}
jobs:
  make: {job: 10_make.ipynb, set: {rows: $rows}}
  fit:  {job: 20_fit.ipynb, set: {data: $make.dataset, seed: $seed}}
  judge: {job: 30_judge.ipynb, set: {model: $fit.model}}
"""


@pytest.fixture
def chain(lab):
    make_job(lab, "10_make", "rows: int = 1", "with (w := Store().writing('dataset', 'd')) as f: (f/'train.jsonl').write_text('x\\n'*rows)\nrun.output('dataset', w.artifact)")
    make_job(lab, "20_fit", "data: str = ''\nrate: float = 0.1\nseed: int = 0", "with (w := Store().writing('model', 'fit', inputs=[data])) as f: (f/'rate').write_text(str(rate + seed/100))\nrun.output('model', w.artifact)\nrun.log(loss=99)")
    make_job(lab, "30_judge", "model: str = ''", "run.log(loss=abs(float((Store().path(model)/'rate').read_text()) - 0.3))")
    (lab/"chain.yaml").write_text(CHAIN)
    return lab/"chain.yaml"


def test_a_sweep_over_a_pipeline(lab, chain):
    done = aigc(lab, "sweep", chain, "--grid", "fit.rate=0.1,0.3", "--metric", "judge.loss", "--seeds", "1,2", "--slots", "2", "--promote", "chosen", "--output", "fit.model", "--json")
    found, store = json.loads(done.stdout), Store(lab/"store")
    assert done.returncode == 0 and found["rows"][found["best"]]["values"] == {"fit.rate": 0.3} and [len(r["reached"]) for r in found["rows"]] == [2, 2], done.stderr
    assert (store.path(found["promoted"])/"rate").read_text() in ("0.31", "0.32")
    runs = list_runs(store)
    assert [sum(r.job == j for r in runs) for j in ("10_make", "20_fit", "30_judge")] == [4, 4, 4]
    assert sum(r.status == "succeeded" for r in runs if r.job == "10_make") == 1  # what the trials share is done once
    for wrong, sentence in {("--grid", "fit.rats=1,2"): "did you mean 'fit.rate'", ("--grid", "rows=1,2", "--set", "fit.seeds=1"): "did you mean 'fit.seed'", ("--grid", "rows=1,2", "--set", "rows=4"): "is set and varied"}.items():
        refused = aigc(lab, "sweep", chain, *wrong)
        assert refused.returncode == 2 and sentence in refused.stderr, refused.stderr


def test_a_failed_pipeline_is_never_the_best(lab, chain):
    make_job(lab, "20_fit", "data: str = ''\nrate: float = 0.1\nseed: int = 0", "if rate > 0.2: raise ValueError('diverged')\nwith (w := Store().writing('model', 'fit')) as f: (f/'rate').write_text('0.3')\nrun.output('model', w.artifact)")
    sweep = run_sweep(chain, ["fit.rate=0.1,0.3"], metric="loss", store=Store(lab/"store"), slots=2)
    assert sweep.best.values == {"fit.rate": 0.1} and [r.status for r in sweep.rows] == ["succeeded", "failed"]
