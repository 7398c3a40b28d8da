"""Warm forks, slots, honest keys, settings, memory limits: what the runner promises beyond running."""
import json
import os
import subprocess
import sys
import threading
import time

import pytest
from test_run import aigc, make_job, only_run, start, until

from aigc.core.errors import UsageError
from aigc.core.store import Store
from aigc.run.pipeline import Pipeline, Step, run_pipeline
from aigc.run.processes import run_processes
from aigc.run.listing import list_runs
from aigc.run.record import runs_folder
from aigc.run.runner import run_job
from aigc.run.slots import Stop
from aigc.run.warm import _open, warm_parent, warm_running


@pytest.fixture(scope="module", autouse=True)
def warm():
    with warm_running(): yield


@pytest.fixture
def lab(tmp_path):
    (tmp_path/"store").mkdir()
    return tmp_path


FIFTY = """
import os
from aigc.run.runner import _environment
from aigc.run.warm import warm_running, warm_parent
from aigc.core.store import Store
from aigc.run.runner import run_job
store = Store(os.environ["AIGC_STORE"])
with warm_running():
    sums = [run_job(os.environ["JOB"], {"n": n}, store=store) for n in range(50)]
    assert [r.status for r in sums] == ["succeeded"]*50, [r.error for r in sums if r.error]
    assert len({r.metrics["parent"] for r in sums}) == 1 and len({r.metrics["pid"] for r in sums}) == 50
    assert all(r.metrics["product"] == 64.0*r.metrics["n"]*64*64 for r in sums)
    assert len({r.metrics["dice"] for r in sums}) == 50   # numpy is seeded anew in each fork
    print(len(sums), "forks multiplied")
"""


def test_fifty_forks_multiply(lab, monkeypatch):
    "torch with two threads, in fifty forks of one parent that has imported torch and TRL and computed nothing."
    job = make_job(lab, "10_multiply", "n: int = 1", "import numpy, torch\nfrom trl import SFTTrainer\na = torch.full((64, 64), float(n)); b = torch.ones(64, 64)\nrun.log(product=float((a @ b).sum()), n=n, pid=os.getpid(), parent=os.getppid(), threads=torch.get_num_threads(), dice=float(numpy.random.rand()))")
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", FIFTY], env={**os.environ, "AIGC_STORE": str(lab/"store"), "JOB": str(job), "OMP_NUM_THREADS": "2"}, capture_output=True, text=True)
    assert done.returncode == 0 and "50 forks multiplied" in done.stdout, done.stderr[-3000:]
    runs = list_runs(Store(lab/"store"))
    assert {r.metrics["threads"] for r in runs} == {2}
    later = sorted(r.wall_seconds for r in runs)[25]
    assert later < 3 and time.monotonic() - begin < 300, later  # importing torch and TRL alone takes ten


def test_outputs_are_those_of_a_kernel(lab, monkeypatch):
    cells = ("import asyncio\nfrom IPython.display import HTML, display\ndisplay(HTML('<b>bold</b>'))\nprint('said')\nprint('warned', file=sys.stderr)\n6*7", "await asyncio.sleep(0)\nimport matplotlib.pyplot as plt\nplt.plot([1, 2]);",
             "1/0")
    job, kinds = make_job(lab, "10_show", "x: int = 1", *cells), {}
    for way in ("forked", "spawned"):
        if way == "spawned": monkeypatch.setenv("AIGC_SPAWN", "1")
        record = run_job(job, store=Store(lab/"store"))
        assert (record.status, record.error.kind, record.error.message, record.error.cell) == ("failed", "ZeroDivisionError", "ZeroDivisionError: division by zero", 5)
        notebook = json.loads((runs_folder(Store(lab/"store"))/record.id/"notebook.ipynb").read_text())
        kinds[way] = [[(o["output_type"], *sorted(o.get("data", {})), o.get("name", "")) for o in c["outputs"]] for c in notebook["cells"] if c["cell_type"] == "code"]
        assert "said" in (runs_folder(Store(lab/"store"))/record.id/"log.txt").read_text()
    assert kinds["forked"] == kinds["spawned"]


def test_a_fork_is_found_by_its_run_and_dies_with_its_parent(lab):
    job = make_job(lab, "10_wait", "x: int = 1", "import multiprocessing\np = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,)); p.start()\npathlib.Path(os.environ['MARK']).write_text(str(p.pid))\ntime.sleep(60)")
    results, mark = [], lab/"mark"
    os.environ["MARK"] = str(mark)
    thread = threading.Thread(target=lambda: results.append(run_job(job, store=Store(lab/"store"))))
    thread.start()
    until(mark.exists, 300, "the job's mark")
    run = only_run(lab)
    assert len(run_processes(run.id)) == 2  # the job and what it forked: /proc shows their run
    _open[0]["all"][-1].process.kill()
    thread.join(20)
    assert results[0].status == "killed" and not run_processes(run.id)
    assert run_job(make_job(lab, "10_next", "x: int = 1", "run.log(x=x)"), store=Store(lab/"store")).status == "succeeded"  # from a new parent


def test_a_parent_with_old_source_is_replaced(lab, monkeypatch):
    environment = dict(os.environ)
    first = warm_parent(environment)
    assert warm_parent(environment) is first and warm_parent({**environment, "OMP_NUM_THREADS": "7"}) is not first
    monkeypatch.setattr("aigc.run.warm._sources", lambda: {"core/store.py": 1})
    assert warm_parent(environment) is not first


def test_no_fork_with_cuda(monkeypatch):
    from aigc.run.warm import can_fork
    monkeypatch.delenv("AIGC_SPAWN", raising=False)
    assert can_fork("cpu: x") == sys.platform.startswith("linux") and not can_fork("cuda: H100")


# ---- limits

@pytest.mark.parametrize("way", ["forked", "spawned"])
def test_a_job_over_its_memory_limit_is_killed(lab, monkeypatch, way):
    if way == "spawned": monkeypatch.setenv("AIGC_SPAWN", "1")
    job = make_job(lab, "30_eat", "x: int = 1", "hoard = []\nfor i in range(400):\n    hoard.append(b'x'*10_000_000); time.sleep(0.01)", "run.log(survived=1)")
    record = run_job(job, store=Store(lab/"store"), memory=900*2**20)
    assert (record.status, record.error.kind) == ("killed", "MemoryLimit") and "more than their limit of 900 MiB" in record.error.message
    assert "survived" not in record.metrics and not run_processes(record.id)


def test_another_thread_can_stop_a_run(lab):
    job, stopping, results = make_job(lab, "30_wait", "x: int = 1", "time.sleep(60)"), Stop(), []
    thread = threading.Thread(target=lambda: results.append(run_job(job, store=Store(lab/"store"), stopping=stopping)))
    thread.start(); time.sleep(3); stopping.ask("SIGINT"); thread.join(20)
    assert (results[0].status, results[0].error.kind) == ("killed", "SIGINT")


# ---- an honest key

@pytest.fixture
def house(lab, monkeypatch):
    "A package of our own, two imports deep."
    (lab/"lib"/"house").mkdir(parents=True)
    for name, text in {"__init__": "", "door": "from house.lock import turn\n", "lock": "from aigc.core.settings import settings\ndef turn(): return 1, settings().threads\n", "attic": "dust = 1\n"}.items(): (lab/"lib"/"house"/f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(lab/"lib")); monkeypatch.setenv("PYTHONPATH", str(lab/"lib"))
    from aigc.run.closure import _root
    _root.cache_clear()
    yield lab/"lib"/"house"
    _root.cache_clear()


def test_the_key_is_honest(lab, house, monkeypatch):
    "One helper edited deep in the import closure: again. Only Markdown, an unread setting, a module nobody imports: cached."
    job, store = make_job(lab, "10_open", "n: int = 1", "from house.door import turn\nrun.log(turned=turn()[0])"), Store(lab/"store")
    status = lambda **more: run_job(job, store=store, **more).status
    assert (status(), status()) == ("succeeded", "cached")
    notebook = json.loads(job.read_text()); notebook["cells"][0]["source"] = "# Another story"; job.write_text(json.dumps(notebook))
    (house/"attic.py").write_text("dust = 2\n")
    monkeypatch.setenv("AIGC_MODAL_GPU", "H100")
    assert status() == "cached"
    monkeypatch.setenv("AIGC_THREADS", "2")  # it is read
    assert (status(), status()) == ("succeeded", "cached")
    (house/"lock.py").write_text((house/"lock.py").read_text().replace("return 1", "return 2"))
    assert (status(), status()) == ("succeeded", "cached")
    assert "nothing had changed since" in aigc(lab, "runs", "why", "last").stdout
    changed = aigc(lab, "runs", "why", list_runs(store)[1].id).stdout
    assert "house.lock" in changed and "-def turn(): return 1" in changed and "+def turn(): return 2" in changed


def test_an_undeclared_setting_fails_under_the_runner(lab, monkeypatch):
    sly = "from aigc.core import settings as module\nrun.log(seed=getattr(module.settings(), 'rejected_' + 'share'))"
    record = run_job(make_job(lab, "10_sly", "n: int = 1", sly), store=Store(lab/"store"))
    assert record.status == "failed" and "the setting 'rejected_share' is read, but this job does not declare it" in record.error.message
    job = make_job(lab, "10_open", "n: int = 1", sly)
    job.write_text(job.read_text().replace("check(globals())", "check(globals(), settings=['rejected_share'])"))
    told = run_job(job, store=Store(lab/"store"))
    assert told.status == "succeeded" and told.key_parts["settings"] == {"rejected_share": 0.2}
    job.write_text(job.read_text().replace("'rejected_share']", "'rejected_shard']"))
    with pytest.raises(UsageError, match="did you mean 'rejected_share'"): run_job(job, store=Store(lab/"store"))


def test_a_notebook_edited_while_it_runs_belongs_to_the_next_run(lab):
    job = make_job(lab, "10_slow", "x: int = 1", "pathlib.Path(os.environ['MARK']).write_text('')\ntime.sleep(1.5)", "run.log(answer=1)")
    aigc_run = start(lab, "run", job)
    job.write_text(job.read_text().replace("answer=1", "answer=2"))
    aigc_run.communicate(timeout=60)
    first = only_run(lab)
    second = run_job(job, store=Store(lab/"store"))
    assert (first.metrics["answer"], second.metrics["answer"], second.status) == (1, 2, "succeeded") and first.key != second.key


def test_a_library_edited_while_a_job_runs_is_no_answer_later(lab, house):
    job, store, results = make_job(lab, "10_open", "n: int = 1", "from house.door import turn\npathlib.Path(os.environ['MARK']).write_text('')\ntime.sleep(1.5)"), Store(lab/"store"), []
    os.environ["MARK"] = str(lab/"mark")
    thread = threading.Thread(target=lambda: results.append(run_job(job, store=store)))
    thread.start(); until((lab/"mark").exists, 300, "the job's mark")
    text = (house/"lock.py").read_text()
    (house/"lock.py").write_text(text + "# edited\n"); thread.join()
    (house/"lock.py").write_text(text)
    assert results[0].status == "succeeded" and run_job(job, store=store).status == "succeeded"  # not cached: nobody knows which text ran


# ---- pipelines, side by side

def graph(lab, fail=""):
    "Two branches from one start: make → left → end, make → right."
    write = "with (w := Store().writing('dataset', out)) as f: (f/'train.jsonl').write_text(str(n))\nrun.output('dataset', w.artifact)\nrun.log(begin=begin, end=time.time())"
    job = make_job(lab, "10_step", "n: int = 1\nout: str = 'a'\ndata: str = ''\nfail: bool = False\nseconds: float = 0.0", "begin = time.time()\nif fail: raise ValueError('this branch fails')\ntime.sleep(seconds)", write)
    step = lambda **told: Step(job=str(job), set=told)
    return Pipeline(name="fork", jobs={"make": step(out="m"), "left": step(data="$make.dataset", out="l", seconds=1.5, fail=fail == "left"), "right": step(data="$make.dataset", out="r", seconds=1.5), "end": step(data="$left.dataset", out="e")})


def test_branches_run_side_by_side(lab):
    results = {r.name: r.record for r in run_pipeline(graph(lab), store=Store(lab/"store"), slots=2)}
    assert {n: r.status for n, r in results.items()} == dict.fromkeys(("make", "left", "right", "end"), "succeeded")
    assert results["right"].metrics["begin"] < results["left"].metrics["end"] and results["left"].metrics["begin"] < results["right"].metrics["end"]


def test_a_failed_branch_leaves_the_other_alone(lab):
    results = {r.name: r for r in run_pipeline(graph(lab, "left"), store=Store(lab/"store"), slots=2)}
    assert {n: r.status for n, r in results.items()} == {"make": "succeeded", "left": "failed", "right": "succeeded", "end": "skipped"} and results["end"].why == "it needs left"


def test_rerun_from_any_point(lab):
    store, pipeline = Store(lab/"store"), graph(lab)
    first = {r.name: r.record for r in run_pipeline(pipeline, store=store)}
    again = {r.name: r.record for r in run_pipeline(pipeline, store=store, begin="left")}
    assert again["make"].id == first["make"].id and {n: r.status for n, r in again.items() if n in ("left", "end")} == {"left": "succeeded", "end": "succeeded"}
    part = run_pipeline(pipeline, store=store, until="left", force=True)
    assert [(r.name, r.status) for r in part] == [("make", "succeeded"), ("left", "succeeded")]
    with pytest.raises(UsageError, match="no finished run to go on from"): run_pipeline(pipeline, store=Store(lab/"other"), begin="end")
    with pytest.raises(UsageError, match="did you mean 'left'"): run_pipeline(pipeline, store=store, begin="lefd")


# ---- clocks

def test_a_clock_that_jumps_changes_no_status(lab, monkeypatch):
    "The wall clock leaps a day ahead and two back while a job runs: limits and durations follow the monotonic clock, and a living run is never called dead."
    from datetime import datetime, timedelta, timezone
    from aigc.run import record as records
    from aigc.run import runner

    class Jumping(datetime):
        shift = timedelta(0)
        @classmethod
        def now(cls, tz=None): return datetime.now(tz) + cls.shift

    for module in (records, runner): monkeypatch.setattr(module, "datetime", Jumping)
    job, store, results = make_job(lab, "10_wait", "x: int = 1", "time.sleep(3)\nrun.log(x=x)"), Store(lab/"store"), []
    thread = threading.Thread(target=lambda: results.append(run_job(job, store=store, timeout=60)))
    thread.start()
    until(lambda: list_runs(store), 30, "the run's record")
    seen = set()
    for shift in (timedelta(days=1), timedelta(days=-2), timedelta(0)):
        Jumping.shift = shift
        for _ in range(8): seen.add(list_runs(store)[0].status); time.sleep(0.1)
    thread.join()
    assert seen <= {"running", "succeeded"} and results[0].status == "succeeded" and 2.5 < results[0].wall_seconds < 60
    assert Jumping.now(timezone.utc) - results[0].created < timedelta(minutes=5)


# ---- parameters

def test_ranges_and_secrets_by_reference(lab, monkeypatch):
    monkeypatch.setenv("MY_WORD", "open-sesame-0123"); monkeypatch.setenv("AIGC_STORE", str(lab/"store"))
    job = make_job(lab, "10_call", "from typing import Annotated\nshare: Annotated[float, '0..1'] = 0.5  # a part\nwidth: Annotated[int, '> 0'] = 8\napi_key: str = ''  # where the key is",
                   "from aigc.run.redact import read_secret\nkey = read_secret(api_key)\nprint('using', key)\nrun.log(length=len(key), note=key)")
    for setting, sentence in {"share=1.5": "wants float at least 0 and at most 1, got 1.5", "width=0": "wants int above 0, got 0", "api_key=open-sesame": "is a secret, and parameters are recorded; put it into the environment, and pass a reference: api_key=env:API_KEY"}.items():
        refused = aigc(lab, "run", job, "--set", setting)
        assert refused.returncode == 2 and sentence in refused.stderr, refused.stderr
    record = run_job(job, {"api_key": "env:MY_WORD", "share": 1.0}, store=Store(lab/"store"))
    assert (record.status, record.metrics["length"], record.metrics["note"], record.parameters["api_key"]) == ("succeeded", 16, "[secret]", "env:MY_WORD")
    for path in (lab/"store").rglob("*"):
        if path.is_file(): assert "open-sesame-0123" not in path.read_text(errors="replace"), path
    shown = aigc(lab, "run", job, "--help").stdout
    assert "--share" in shown and "float at least 0 and at most 1" in shown and "where the key is" in shown and "0.5" in shown
    assert aigc(lab, "run", job, "--share", "0.25", "--dry-run", "--json").stdout.count("0.25") >= 1
    unknown = aigc(lab, "run", job, "--shares", "0.25")
    assert unknown.returncode == 2 and "did you mean 'share'" in unknown.stderr


def test_debug_notebook_of_a_failed_run(lab):
    record = run_job(make_job(lab, "10_half", "n: int = 2", "half = 1/(n - 3)", "print('never')"), {"n": 3}, store=Store(lab/"store"))
    path = aigc(lab, "runs", "debug", "last").stdout.strip()
    done = subprocess.run([sys.executable, "-m", "papermill", "--no-progress-bar", path, str(lab/"out.ipynb")], env={**os.environ, "AIGC_STORE": str(lab/"store")}, capture_output=True, text=True)
    assert record.status == "failed" and done.returncode == 1 and "ZeroDivisionError" in done.stderr  # it fails again, at the same place
