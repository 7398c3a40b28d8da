"""Ten thousand runs, listed: held to seconds of this process's CPU, so that a neighbour does not count; the clock's seconds are printed beside them."""
import json
import os
import time
from datetime import datetime, timedelta, timezone

import pytest
from test_run import aigc

from aigc.core.store import Store
from aigc.run.listing import find_run, list_runs
from aigc.run.record import RunRecord, runs_folder, this_host

MANY = 10_000


@pytest.fixture
def many(tmp_path, monkeypatch):
    monkeypatch.setenv("AIGC_CACHE", str(tmp_path/"cache"))
    store, now = Store(tmp_path/"store"), datetime(2026, 1, 1, tzinfo=timezone.utc)
    record = RunRecord(id="ID", job="20_sft", status="succeeded", parameters={"model": "tiny", "lr": 1e-3, "seed": 1}, key="0"*64, key_parts={"code": "0"*64, "environment": {"python": "3.11.7"}}, host=this_host(), created=now, heartbeat=now,
                       ended=now, versions={n: "1.0" for n in ("python", "torch", "trl")}, metrics={f"metric_{i}": i/7 for i in range(12)}, outputs={"model": "model/m@3f9c1a2b4d5e"})
    text, created = record.model_dump_json(by_alias=True, indent=1), record.model_dump(mode="json")["created"]
    for i in range(MANY):
        folder = runs_folder(store)/f"20260101-sft-{i:05x}"
        folder.mkdir(parents=True)
        (folder/"run.json").write_text(text.replace('"ID"', f'"{folder.name}"').replace(created, (now + timedelta(seconds=i)).isoformat(), 1))
    return store


def seconds(call) -> tuple[float, float]:
    "Of the processor, of the clock."
    work, begin = time.process_time(), time.perf_counter(); call()
    return time.process_time() - work, time.perf_counter() - begin


def test_ten_thousand_runs_are_listed(many):
    first, again, newest = seconds(lambda: list_runs(many)), seconds(lambda: list_runs(many)), min(seconds(lambda: list_runs(many, limit=20)) for _ in range(3))
    print(f"{MANY:,} records, seconds of CPU (of the clock): first {first[0]:.3f} ({first[1]:.3f}), again {again[0]:.3f} ({again[1]:.3f}), the newest twenty {newest[0]:.3f} ({newest[1]:.3f}); load {os.getloadavg()[0]:.1f}")
    assert newest[0] < 0.3 and again[0] < 1.0 and first[0] < 2.0  # on an idle machine a third of that
    listed = list_runs(many, limit=20)
    assert [r.id for r in listed] == [f"20260101-sft-{MANY - 1 - i:05x}" for i in range(20)] and find_run("last", many)[0].id == listed[0].id
    shown = aigc(many.local.parent, "runs", "list", "--json")
    assert [r["id"] for r in json.loads(shown.stdout)] == [r.id for r in listed] and "10,000 runs in all" in aigc(many.local.parent, "runs", "list").stdout
