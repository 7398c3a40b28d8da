"""Annotation against a real Label Studio server: tasks and pre-labels out, judgements of three people back, their agreement, and the next batch worth asking about."""
import json
import os
import subprocess
import sys
import urllib.request

import numpy as np
import pytest

from aigc.core.errors import AigcError
from aigc.data.annotate import TEMPLATES, LabelStudio, agreement, choose, decided
from aigc.data.classifier import fit, labelled
from aigc.data.records import Record, write_jsonl
from aigc.data.semantic import embed

pytestmark = [pytest.mark.slow, pytest.mark.services, pytest.mark.timeout(1800)]  # the first test waits for the server, too


def answers(n):
    good, bad = ["Thank you for writing, the parcel leaves today.", "We have refunded the order."], ["Read the manual.", "That is your own fault."]
    return [Record(id=f"r{i}", meta={"label": i % 2 == 0}, messages=[{"role": "user", "content": f"Question {i}: where is parcel {i*7}?"}, {"role": "assistant", "content": f"{(good if i % 2 == 0 else bad)[i//2 % 2]} Number {i}."}]) for i in range(n)]


def call(url, token, method, path, body=None):
    request = urllib.request.Request(url + path, None if body is None else json.dumps(body).encode(), {"Authorization": f"Token {token}", "Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=60) as reply: return json.loads(reply.read() or b"null")


def judge(url, token, task, choices):
    call(url, token, "POST", f"/api/tasks/{task}/annotations/", {"result": [{"from_name": f, "to_name": "answer", "type": "choices", "value": {"choices": [v]}} for f, v in choices.items()]})


def test_records_go_out_and_judgements_come_back(label_studio, tmp_path):
    url, token = label_studio
    server, records = LabelStudio(url, token), answers(12)
    model = fit(labelled(records[:6]))
    scores = model([r.answer for r in records])
    numbers = {}
    for level in TEMPLATES:  # the server takes the form of every level
        numbers[level] = server.create(f"Answers, {level}", level)
        fields = {"basic": "usable", "domain": "domain", "quality": "quality"}
        guess = {r.id: {fields[level]: ({"basic": "yes" if p > .5 else "no", "domain": "everyday", "quality": "5" if p > .5 else "1"}[level], float(p))} for r, p in zip(records, scores)}
        assert server.push(numbers[level], records, guess) == len(records)
    project = numbers["quality"]
    tasks = {t["data"]["id"]: t for t in call(url, token, "GET", f"/api/projects/{project}/export?exportType=JSON&download_all_tasks=true")}
    assert set(tasks) == {r.id for r in records} and tasks["r0"]["data"]["answer"] == records[0].answer
    seen = call(url, token, "GET", f"/api/tasks/{tasks['r0']['id']}/")
    assert seen["predictions"][0]["result"][0]["value"]["choices"] == ["5"] and seen["predictions"][0]["model_version"] == "aigc"
    # three judgements for each of eight records: agreed on six, disputed on one, split two to one on another
    said = {"r0": "555", "r1": "111", "r2": "544", "r3": "112", "r4": "555", "r5": "111", "r6": "531", "r7": "221"}
    for record, values in said.items():
        for v in values: judge(url, token, tasks[record]["id"], {"quality": v, "style": "yes" if v > "2" else "no"})
    judgements = server.pull(project)
    assert len(judgements) == 2*3*len(said) and {j.field for j in judgements} == {"quality", "style"} and all(j.person for j in judgements)
    found = agreement(judgements)
    assert found["quality"]["judged_twice"] == 8 and found["quality"]["disputes"] == ["r6"] and 0.7 < found["quality"]["alpha"] < 0.95
    majority = decided(judgements, "quality")
    assert majority == {"r0": "5", "r1": "1", "r2": "4", "r3": "1", "r4": "5", "r5": "1", "r7": "2"}
    # what to ask next: what the model is least sure of, unlike what was judged
    p = np.stack([1 - scores, scores], 1)
    judged = [int(r[1:]) for r in said]
    more = choose(p, embed([r.answer for r in records]), 2, judged=judged)
    assert len(more) == 2 and not set(more) & set(judged)
    assert server.push(project, [records[i].model_copy(update={"id": f"again-{i}"}) for i in more]) == 2


def test_the_command_pushes_and_pulls(label_studio, tmp_path):
    url, token = label_studio
    write_jsonl(tmp_path/"doubtful.jsonl", answers(3))
    def run(*words): return subprocess.run([sys.executable, "-m", "aigc", "data", "annotate", str(tmp_path/"doubtful.jsonl"), "--url", url, "--json", *words], env={**os.environ, "LABEL_STUDIO_TOKEN": token}, capture_output=True, text=True, timeout=120)
    done = run("--level", "basic")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["tasks"] == 3
    for task in call(url, token, "GET", f"/api/projects/{made['project']}/export?exportType=JSON&download_all_tasks=true"):
        for v in ("yes", "yes"): judge(url, token, task["id"], {"usable": v, "problem": "none"})
    done = run("--project", str(made["project"]), "--out", str(tmp_path/"said.jsonl"))
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["judgements"] == 12 and figures["usable"] == {"alpha": 1.0, "judged twice": 3, "disputes": 0} and len((tmp_path/"said.jsonl").read_text().splitlines()) == 12
    with pytest.raises(AigcError, match="refused .401.*legacy tokens"): LabelStudio(url, "0"*40).create("no")
