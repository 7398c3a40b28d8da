"""Runs from outside: the command line, kills and limits, a full disk, secrets, plain papermill. Jobs here are small notebooks made on the spot."""
import ast, contextlib, inspect, io, json, os, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from aigc.cli.main import main
from aigc.core.store import Store
from aigc.run import jobs, record as record_module
from aigc.run.jobs import declared_outputs, list_jobs, list_pipelines
from aigc.run.parameters import code_cells, read_parameters
from aigc.run.pipeline import load_pipeline, run_order
from aigc.run.processes import run_processes
from aigc.run.listing import list_runs
from aigc.run.record import RunRecord, read_record, runs_folder
from aigc.run.runner import _new_folder, run_job
from aigc.run.warm import warm_running

HEAD = "from aigc.run.parameters import check; check(globals())\nimport os, sys, time, pathlib, subprocess\nfrom aigc.core.store import Store\nfrom aigc.run.record import current_run\nrun = current_run()"


@pytest.fixture(scope="module", autouse=True)
def warm():
    "Jobs of this module are forked from one warm parent; spawned ones use kernels."
    with warm_running(): yield


@pytest.fixture
def lab(tmp_path):
    (tmp_path/"store").mkdir()
    return tmp_path


def make_job(lab: Path, name: str, parameters: str, *cells: str) -> Path:
    "A job notebook: its parameters, the check, then the cells."
    notebook = new_notebook(cells=[new_markdown_cell(f"# {name}"), new_code_cell(parameters, metadata={"tags": ["parameters"]}), new_code_cell(HEAD), *map(new_code_cell, cells)],
                            metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    nbformat.write(notebook, lab/f"{name}.ipynb")
    return lab/f"{name}.ipynb"


def in_pipeline(job: Path) -> Path:
    "A pipeline of this job and another one that waits for it: with more than one job to do, `aigc run` forks from a warm parent."
    make_job(job.parent, "90_after", "data: str = ''", "run.log(x=1)")
    job.with_suffix(".yaml").write_text(f"name: counting\njobs:\n  first: {{job: {job.name}}}\n  after: {{job: 90_after.ipynb, set: {{data: $first.count}}}}\n")
    return job.with_suffix(".yaml")


def environment(lab: Path, **more) -> dict:
    return {**{k: v for k, v in os.environ.items() if not k.startswith("AIGC_RUN")}, "AIGC_STORE": str(lab/"store"), "MARK": str(lab/"mark"), **more}


def aigc(lab: Path, *words, **more) -> SimpleNamespace:
    "`aigc …` in this process: its exit code and what it printed."
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.dict(os.environ, environment(lab, **more), clear=True), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: main([str(w) for w in words]); code = 0
        except SystemExit as e: code = e.code or 0
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def start(lab: Path, *words) -> subprocess.Popen:
    "`aigc …` in the background, returned when the job has written its mark."
    process = subprocess.Popen([sys.executable, "-m", "aigc", *map(str, words)], env=environment(lab), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's background jobs are started with Ctrl-C ignored
    try: until(lambda: (lab/"mark").exists(), 300, "the job's mark")
    except BaseException: process.kill(); raise
    return process


def until(condition, seconds: float, what: str) -> float:
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, f"not within {seconds} s: {what}"
        time.sleep(0.05)
    return time.monotonic() - begin


def only_run(lab: Path) -> RunRecord: return list_runs(Store(lab/"store"))[0]


# A job that counts, keeps its count in a checkpoint, and has a family: a child of the kernel, and one in a session of its own.
COUNTING = ("checkpoint = run.folder/'count'\nbegin = int(checkpoint.read_text()) if checkpoint.exists() else 0\nrun.log(begin=begin)",
            "family = [subprocess.Popen(['sleep', '300']), subprocess.Popen(['sleep', '300'], start_new_session=True)]",
            "for n in range(begin, begin + steps):\n    (part := run.folder/'count.new').write_text(str(n + 1)); part.replace(checkpoint); time.sleep(0.05)\n    if n == begin + 3: pathlib.Path(os.environ.get('MARK', os.devnull)).write_text(str(os.getpid()))",
            "[p.kill() for p in family]\nrun.log(end=n + 1)")


@pytest.fixture
def steady(monkeypatch):
    "The library stands still, also while somebody edits it beside this test."
    from aigc.run.closure import closure as real
    monkeypatch.setattr("aigc.run.runner.closure", lambda notebook: real(notebook)._replace(files={}))


# ---- the record

FROZEN = {"schema", "id", "job", "pipeline", "status", "parameters", "key", "key_parts", "cached_from", "inputs", "outputs", "seeds", "versions", "git", "host", "device", "created", "heartbeat", "ended",
          "wall_seconds", "peak_memory_bytes", "metrics", "error"}


def test_run_json_is_frozen(lab):
    job = make_job(lab, "10_words", "seed: int = 3\nlr: float = 0.5", "run.log(step=1, loss=0.25)\nrun.log(step=2, loss=float('nan'), note='enough')")
    record = run_job(job, {"lr": 2}, store=Store(lab/"store"))
    text = (runs_folder(Store(lab/"store"))/record.id/"run.json").read_text()
    data = json.loads(text)
    assert set(data) == FROZEN and data["schema"] == 1
    assert RunRecord.model_validate_json(text).model_dump_json(by_alias=True, indent=1) == text
    assert (data["status"], data["parameters"], data["seeds"], data["metrics"]) == ("succeeded", {"seed": 3, "lr": 2.0}, {"seed": 3}, {"loss": "nan", "note": "enough"})
    assert data["key_parts"].keys() == {"code", "parameters", "inputs", "sources", "environment", "settings"}
    assert data["versions"]["python"] and data["host"]["pid"] == os.getpid() and data["wall_seconds"] > 0 and data["peak_memory_bytes"] > 50e6
    assert len(inspect.getsource(RunRecord).splitlines()) <= 40


def test_two_runs_never_share_a_folder(lab, monkeypatch):
    draws = iter(["aaaa", "aaaa", "bbbb"])
    monkeypatch.setattr("aigc.run.runner.secrets.token_hex", lambda n: next(draws))
    first = _new_folder(lab/"runs", "20260101-120000-sft")
    (first/"run.json").write_text("mine")
    assert (first.name[-4:], _new_folder(lab/"runs", "20260101-120000-sft").name[-4:], (first/"run.json").read_text()) == ("aaaa", "bbbb", "mine")


# ---- wrong use

def test_wrong_parameters_are_refused_before_the_start(lab):
    job = make_job(lab, "20_train", "from typing import Literal\nlr: float = 0.1\nmethod: Literal['lora', 'full'] = 'lora'")
    for setting, sentence in {"lrr=1": "unknown parameter 'lrr'; did you mean 'lr'?", "lr=fast": "parameter 'lr' wants float, got 'fast' (str)",
                              "method=fll": "wants one of 'lora', 'full', got 'fll'; did you mean 'full'?", "lr": "write --set name=value"}.items():
        done = aigc(lab, "run", job, "--set", setting)
        assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert aigc(lab, "run", "no-such-job").returncode == 2
    assert not (lab/"store"/"runs").exists()


def test_plain_papermill_is_as_strict(lab):
    job = make_job(lab, "20_train", "lr: float = 0.1\nsteps: int = 2", "run.log(lr=lr)\nprint('lr is', repr(lr), len(run.metrics()), run.id == '')")
    told = {"good": ("lr", "1"), "name": ("lrr", "1"), "type": ("steps", "many")}
    started = {n: subprocess.Popen([sys.executable, "-m", "papermill", "--no-progress-bar", str(job), str(lab/f"{n}.ipynb"), "-p", *p], env=environment(lab), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
               for n, p in told.items()}
    said = {n: p.communicate()[1] for n, p in started.items()}
    assert [p.returncode for p in started.values()] == [0, 1, 1]
    assert "lr is 1.0 1 True" in (lab/"good.ipynb").read_text()
    assert "unknown parameter 'lrr'; did you mean 'lr'?" in said["name"] and "parameter 'steps' wants int" in said["type"]
    for name in ("name", "type"):
        failed = [c for c in nbformat.read(lab/f"{name}.ipynb", 4).cells if c.cell_type == "code" and any(o.output_type == "error" for o in c.outputs)]
        assert len(failed) == 1 and "check(globals())" in failed[0].source


# ---- kills

@pytest.mark.parametrize("victims, way", [("kernel", "forked"), ("child", "spawned"), ("supervisor", "forked"), ("supervisor and child", "spawned"), *(pytest.param(*other, marks=pytest.mark.slow) for other in (
    ("kernel", "spawned"), ("child", "forked"), ("supervisor", "spawned"), ("supervisor and child", "forked")))])
def test_sigkill_leaves_nothing_running(lab, monkeypatch, victims, way):
    "The child is the process between the supervisor and the cells: papermill with a kernel below it, or the warm parent whose fork runs the cells."
    if way == "spawned": monkeypatch.setenv("AIGC_SPAWN", "1")
    supervisor = start(lab, "run", in_pipeline(make_job(lab, "30_count", "steps: int = 400", *COUNTING)))
    run = only_run(lab)
    assert run.status == "running" and len(run_processes(run.id)) >= (3 if way == "forked" else 4)
    kernel = psutil.Process(int((lab/"mark").read_text()))
    assert (kernel.parent().pid != supervisor.pid) and ("warm" in " ".join(kernel.cmdline())) == (way == "forked")
    whom = {"kernel": [kernel], "child": [kernel.parent()], "supervisor": [psutil.Process(supervisor.pid)], "supervisor and child": [kernel.parent(), psutil.Process(supervisor.pid)]}[victims]
    for process in whom: process.kill()
    until(lambda: only_run(lab).status != "running", 3.0, "a truthful status")
    if victims != "supervisor and child": until(lambda: not run_processes(run.id), 4.0, "the end of all processes")
    else: until(lambda: kernel.pid not in [p.pid for p in run_processes(run.id)], 3.0, "the end of the kernel")  # its zombie may wait for whoever reaps orphans here
    supervisor.communicate(timeout=30)
    killed = only_run(lab)
    assert (killed.id, killed.status) == (run.id, "killed") and killed.error
    assert supervisor.returncode == (-9 if "supervisor" in victims else 1)
    assert not Store(lab/"store").list() and not list((lab/"store").rglob("*.part"))
    for left in run_processes(run.id): left.kill()


def test_a_rerun_after_sigkill_resumes(lab):
    job = make_job(lab, "30_count", "steps: int = 25", *COUNTING)
    aigc_run = start(lab, "run", job)
    aigc_run.kill(); aigc_run.communicate()
    first = only_run(lab)
    until(lambda: not run_processes(first.id), 4.0, "the end of all processes")
    second = run_job(job, store=Store(lab/"store"))
    assert (second.status, read_record(runs_folder(Store(lab/"store"))/first.id).status) == ("succeeded", "killed"), second.error
    assert second.metrics["begin"] >= 4 and second.metrics["end"] == second.metrics["begin"] + 25
    assert not list((lab/"store"/"scratch").iterdir())  # the checkpoints of a finished run are gone
    other = run_job(job, {"steps": 5}, store=Store(lab/"store"))
    assert other.metrics["begin"] == 0  # other parameters, other checkpoints


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_everything_in_order(lab, number, code):
    aigc_run = start(lab, "run", make_job(lab, "30_count", "steps: int = 400", *COUNTING))
    aigc_run.send_signal(number)
    _, err = aigc_run.communicate(timeout=20)
    run = only_run(lab)
    assert (run.status, run.error.kind, aigc_run.returncode) == ("killed", number.name, code)
    assert f"killed: stopped by {number.name}" in err and "Traceback" not in err
    assert not run_processes(run.id)
    assert "KeyboardInterrupt" in (lab/"store"/"runs"/run.id/"notebook.ipynb").read_text()  # the notebook shows where it was
    assert (lab/"store"/"runs"/run.id/"page.html").exists()


def test_a_job_that_ignores_the_signal_is_killed_all_the_same(lab, monkeypatch):
    monkeypatch.setattr("aigc.run.runner.GRACE_SECONDS", 1.0)
    stubborn = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True:\n    try: time.sleep(60)\n    except KeyboardInterrupt: pass"
    begin = time.monotonic()
    record = run_job(make_job(lab, "30_stubborn", "x: int = 1", stubborn), store=Store(lab/"store"), timeout=2.5)
    assert record.status == "timeout" and "longer than its limit of 2.5 s" in record.error.message and time.monotonic() - begin < 60
    assert not run_processes(record.id)


def test_a_crash_is_a_failure_and_names_the_signal(lab):
    record = run_job(make_job(lab, "30_crash", "x: int = 1", "import ctypes\nctypes.string_at(0)"), store=Store(lab/"store"))
    assert record.status == "failed" and "SIGSEGV" in record.error.message


def test_timeout_is_not_success(lab):
    assert aigc(lab, "run", make_job(lab, "10_first", "x: int = 1", "run.log(x=x)")).returncode == 0  # the warm parent is there
    done = aigc(lab, "run", make_job(lab, "30_slow", "x: int = 1", "time.sleep(600)", "print('never')"), "--timeout", "6")
    run = only_run(lab)
    assert (done.returncode, run.status, run.error.kind) == (1, "timeout", "Timeout") and "longer than its limit" in done.stderr
    states = [c.metadata.papermill["status"] for c in nbformat.read(lab/"store"/"runs"/run.id/"notebook.ipynb", 4).cells if c.cell_type == "code"]
    assert states[-1] == "pending" and states[-2] != "completed"  # papermill itself would say `completed` twice


# ---- cache

def test_cache_answers_only_while_the_outputs_are_whole(lab, steady):
    job = make_job(lab, "10_make", "n: int = 1", "with (w := Store().writing('dataset', 'made')) as f: (f/'train.jsonl').write_text('x'*n)\nrun.output('dataset', w.artifact)\nrun.input(w.artifact)")
    store = Store(lab/"store")
    first = run_job(job, store=store)
    ref = first.outputs["dataset"]
    assert first.inputs == [ref] and [a.ref for a in store.gc(older_than=0)] == []  # the run keeps it
    assert run_job(job, store=store, force=True).status == "succeeded"
    cached = run_job(job, store=store)
    assert (cached.status, cached.outputs, cached.key) == ("cached", first.outputs, first.key)
    assert f"../{cached.cached_from}/page.html" in (runs_folder(store)/cached.id/"page.html").read_text()
    (store.path(ref)/"train.jsonl").write_text("damaged")
    assert run_job(job, store=store).status != "cached"


def test_two_people_start_the_same_run(lab):
    "Two processes, one piece of work: one does it, the other waits and finds it done."
    job = make_job(lab, "10_slow", "n: int = 1", "with open(run.store.local/'starts', 'a') as f: f.write('x')", "time.sleep(3)", "with (w := Store().writing('dataset', 'made')) as f: (f/'train.jsonl').write_text('x')\nrun.output('dataset', w.artifact)")
    people = [subprocess.Popen([sys.executable, "-m", "aigc", "run", str(job), "--json"], env=environment(lab), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate(timeout=300) for p in people]
    records = sorted((json.loads(out) for out, _ in said), key=lambda r: r["status"])
    assert [(p.returncode, r["status"]) for p, r in zip(people, records)] == [(0, "cached"), (0, "succeeded")], said
    assert records[0]["cached_from"] == records[1]["id"] and records[0]["outputs"] == records[1]["outputs"] and (lab/"store"/"starts").read_text() == "x"
    assert len(Store(lab/"store").list()) == 1


# ---- disks

def test_a_full_disk_is_one_sentence(lab):
    record = run_job(make_job(lab, "30_disk", "x: int = 1", "with open('/dev/full', 'w') as f: f.write('x'*10000)"), store=Store(lab/"store"))
    assert record.status == "failed" and record.error.message.startswith("the disk is full ([Errno 28] No space left on device") and "aigc store gc" in record.error.message


def test_a_store_on_a_full_disk_stays_whole(lab):
    job = make_job(lab, "30_big", "size: int = 8_000_000", "with (w := Store().writing('model', 'big')) as f: (f/'weights.bin').write_bytes(os.urandom(size))\nrun.output('model', w.artifact)")
    (lab/"small").mkdir()
    mount = f"mount -t tmpfs -o size=3m tmpfs {lab}/small && {sys.executable} -m aigc run {job} --json; code=$?; {sys.executable} -m aigc runs show last --json > {lab}/shown; find {lab}/small -name 'artifact.json' -o -name 'weights.bin' > {lab}/found; exit $code"
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", mount], env={**environment(lab), "AIGC_STORE": str(lab/"small"/"store")}, capture_output=True, text=True)
    if "unshare" in done.stderr or "mount:" in done.stderr:  # no such rights here: a limit on the size of files hits the same code
        limited = mount.split("&& ", 1)[1]
        done = subprocess.run(["sh", "-c", f"ulimit -f 6000; {limited}"], env={**environment(lab), "AIGC_STORE": str(lab/"small"/"store")}, capture_output=True, text=True)
    shown = json.loads((lab/"shown").read_text())
    assert done.returncode == 1 and shown["status"] == "failed" and "the disk is full" in shown["error"]["message"], done.stderr
    assert "the disk is full" in done.stderr and "Traceback" not in done.stderr and (lab/"found").read_text() == ""


def test_a_store_that_goes_away_under_a_run(lab):
    "The folder is gone when the job wants to commit: a failure in one sentence; when it is back, no success and no artifact is in it."
    job = make_job(lab, "30_commit", "x: int = 1", "pathlib.Path(os.environ['MARK']).write_text(str(os.getpid()))\nwhile not (pathlib.Path(os.environ['MARK']).parent/'gone').exists(): time.sleep(0.05)",
                   "with (w := Store().writing('model', 'm')) as f: (f/'weights').write_text('x')\nrun.output('model', w.artifact)")
    aigc_run = start(lab, "run", job)
    run = only_run(lab)
    (lab/"store").rename(lab/"away"); (lab/"store").write_text("a mount that is not there"); (lab/"gone").write_text("")
    _, err = aigc_run.communicate(timeout=120)
    assert aigc_run.returncode == 1 and "cannot be written" in err and "Traceback" not in err, err
    (lab/"store").unlink(); (lab/"away").rename(lab/"store")
    assert (only_run(lab).id, only_run(lab).status) == (run.id, "killed") and Store(lab/"store").list() == [] and not run_processes(run.id)
    (lab/"gone").write_text("")
    assert run_job(job, store=Store(lab/"store"), environment={"MARK": str(lab/"mark")}).status == "succeeded"


# ---- secrets

def test_no_secret_is_recorded(lab, monkeypatch):
    secret = "s3cr3t-of-the-house-0123"
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    job = make_job(lab, "30_talk", "x: int = 1", "key = os.environ['OPENAI_API_KEY']\nprint('using', key)\nprint(key, file=sys.stderr)\nrun.log(note=key)\nkey", "os.system('echo $OPENAI_API_KEY')", "raise ValueError(f'refused {key}')")
    record = run_job(job, store=Store(lab/"store"))
    assert record.error.message == "ValueError: refused [secret]" and "using [secret]" in (lab/"store"/"runs"/record.id/"log.txt").read_text()
    for path in (lab/"store").rglob("*"):
        if path.is_file(): assert secret not in path.read_text(errors="replace"), path
    refused = aigc(lab, "run", make_job(lab, "30_key", "api_key: str = ''"), "--set", f"api_key={secret}")
    assert refused.returncode == 2 and "'api_key' is a secret" in refused.stderr and secret not in refused.stderr


# ---- pipelines

TWO = """
name: two
parameters: {rows: 3, fail: false}
jobs:
  make:  {job: 10_make.ipynb, budget: 5, set: {rows: $rows}}
  check: {job: 20_check.ipynb, budget: 7, set: {data: $make.dataset, fail: $fail}}
  tell:  {job: 30_tell.ipynb, set: {report: $check.report}}
  other: {job: 40_other.ipynb}
"""


@pytest.fixture
def two(lab):
    make_job(lab, "10_make", "rows: int = 1", "with (w := Store().writing('dataset', 'd')) as f: (f/'train.jsonl').write_text('x\\n'*rows)\nrun.output('dataset', w.artifact)")
    make_job(lab, "20_check", "data: str = ''\nfail: bool = False", "if fail: raise ValueError('not good enough')",
             "with (w := Store().writing('report', 'r', inputs=[data])) as f: (f/'report.html').write_text('<p>fine')\nrun.output('report', w.artifact)")
    make_job(lab, "30_tell", "report: str = ''", "run.log(found=1)")
    make_job(lab, "40_other", "x: int = 1", "run.log(x=x)")
    (lab/"two.yaml").write_text(TWO)
    return lab/"two.yaml"


def test_pipeline_runs_then_says_cached(lab, two, steady):
    dry = aigc(lab, "run", two, "--dry-run", "--json")
    assert [r["will"] for r in json.loads(dry.stdout)] == ["runs"]*4 and not (lab/"store"/"runs").exists()
    first = aigc(lab, "run", two, "--set", "rows=5")
    assert first.returncode == 0, first.stderr
    table, *_ = first.stdout.split("job    status")
    assert "total" in table and "12 s" in table and "succeeded" in first.stdout and "report.html" in first.stdout.splitlines()[-1]
    second = json.loads(aigc(lab, "run", two, "--set", "rows=5", "--json").stdout)
    assert [(r["job"], r["status"]) for r in second] == [(n, "cached") for n in ("make", "check", "tell", "other")]
    third = json.loads(aigc(lab, "run", two, "--set", "rows=5", "--set", "other.x=2", "--json").stdout)
    assert [r["status"] for r in third] == ["cached", "cached", "cached", "succeeded"]
    assert third[0]["run"]["pipeline"] == "two/make"


def test_a_failed_job_stops_those_that_need_it(lab, two):
    done = aigc(lab, "run", two, "--set", "fail=true")
    assert done.returncode == 1 and "tell: not started, as it needs check" in done.stderr and "error: check failed: ValueError: not good enough; see" in done.stderr
    assert {r.job: r.status for r in list_runs(Store(lab/"store"))} == {"10_make": "succeeded", "20_check": "failed", "40_other": "succeeded"}


def test_a_signal_stops_the_whole_pipeline(lab, two):
    make_job(lab, "20_check", "data: str = ''\nfail: bool = False", "pathlib.Path(os.environ['MARK']).write_text('')\ntime.sleep(60)", "run.output('report', data)")
    aigc_run = start(lab, "run", two)
    aigc_run.send_signal(signal.SIGINT)
    out, err = aigc_run.communicate(timeout=20)
    assert aigc_run.returncode == 130 and "the pipeline was stopped" in out
    assert {r.job: r.status for r in list_runs(Store(lab/"store"))} == {"10_make": "succeeded", "20_check": "killed"}


# ---- reading back

def test_runs_list_and_show(lab):
    job = make_job(lab, "10_words", "seed: int = 3", "run.log(loss=0.25)\nprint('hello from the job')")
    for seed in (1, 2): run_job(job, {"seed": seed}, store=Store(lab/"store"))
    listed = json.loads(aigc(lab, "runs", "list", "--json").stdout)
    assert [(r["status"], r["parameters"]["seed"]) for r in listed] == [("succeeded", 2), ("succeeded", 1)]
    assert listed[0]["id"] in aigc(lab, "runs", "show", "last").stdout and "loss" in aigc(lab, "runs", "list").stdout
    page = Path(aigc(lab, "runs", "html", listed[1]["id"]).stdout.strip()).read_text()
    assert "hello from the job" in page and "prefers-color-scheme:dark" in page and "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert aigc(lab, "runs", "show", "nothing").returncode == 2
    empty = lab/"empty"; empty.mkdir()
    assert json.loads(aigc(lab, "runs", "list", "--json", AIGC_STORE=str(empty)).stdout) == []


# ---- the jobs of this repository

def test_installed_package_finds_its_own_copy(tmp_path, monkeypatch):
    (tmp_path/"aigc").mkdir()
    monkeypatch.setattr(jobs.aigc, "__file__", str(tmp_path/"aigc"/"__init__.py"))
    assert jobs.jobs_folder() == tmp_path/"aigc"/"_jobs" and jobs.pipelines_folder() == tmp_path/"aigc"/"_pipelines"


@pytest.mark.parametrize("job", list_jobs(), ids=lambda j: j.name)
def test_jobs_are_in_order(job):
    names = [p.name for p in read_parameters(job.path)]
    assert {"model", "data", "seed", "out", "limit"} <= set(names)
    cells = code_cells(job.path)
    assert "parameters" in cells[0]["tags"] and "check(globals())" in cells[1]["source"]
    notebook = json.loads(job.path.read_text())
    assert notebook["metadata"]["kernelspec"]["name"] == "python3" and notebook["cells"][0]["cell_type"] == "markdown"
    assert "aigc run" in "".join(notebook["cells"][0]["source"]) and job.title
    for cell in cells: ast.parse("\n".join(line for line in cell["source"].splitlines() if not line.startswith("%")))
    assert declared_outputs(job.path) is None or job.short == "serve" or declared_outputs(job.path)


@pytest.mark.parametrize("path", list_pipelines(), ids=lambda p: p.stem)
def test_pipelines_are_valid(path):
    pipeline = load_pipeline(path)
    assert pipeline.name == path.stem and run_order(pipeline) == list(pipeline.jobs) and all(s.budget for s in pipeline.jobs.values())


def test_a_record_from_another_time_is_told_apart(lab):
    store = Store(lab/"store")
    record = run_job(make_job(lab, "10_words", "seed: int = 3"), store=store)
    folder = runs_folder(store)/record.id
    running = record.model_copy(update={"status": "running", "host": record_module.this_host().model_copy(update={"boot": "before the reboot"})})
    record_module.write_record(folder, running)
    until(lambda: read_record(folder).status == "killed", 4.0, "a stale heartbeat")
    (folder/"run.json").write_text("{")
    assert [r.id for r in list_runs(store)] == []
