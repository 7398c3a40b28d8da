"""`aigc batch`: killed and resumed, torn output, bad lines, an endpoint that answers."""
import json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest, torch
from transformers import AutoModelForCausalLM

from endpoint_help import served
from test_run import aigc
from aigc.models.generate import Request
from aigc.models.tiny import make_tiny
from aigc.serve.llm import LLM

COUNT = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "In fp32: in bf16 a likeliest token may depend on how many are computed together."
    path = make_tiny(tmp_path_factory.mktemp("models")/"tiny-model")
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llm(folder): return LLM.load(str(folder), device="cpu")


def question(i): return [{"role": "user", "content": f"问题 {i}: what does `f{i}` return?"}]


@pytest.fixture
def source(tmp_path):
    def line(i):
        body = dict(messages=question(i), max_tokens=20 + 90*(i % 3), temperature=0)
        return json.dumps(dict(custom_id=f"q{i}", method="POST", url="/v1/chat/completions", body=body | dict(model="gpt-x")) if i % 2 else body | dict(custom_id=f"q{i}"), ensure_ascii=False)
    (tmp_path/"in.jsonl").write_text("\n".join(line(i) for i in range(COUNT)) + "\n", encoding="utf-8")
    return tmp_path/"in.jsonl"


def start(*arguments, **more):
    env = os.environ | dict(AIGC_DEVICE="cpu", OMP_NUM_THREADS="1")
    return subprocess.Popen([sys.executable, "-m", "aigc", "batch", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **more)


def finished(*arguments):
    "`aigc batch …` in this process, which has imported what it needs: exit code, what it printed."
    done = aigc(Path(arguments[0]).parent, "batch", *arguments, AIGC_DEVICE="cpu")
    return done.returncode, done.stdout, done.stderr


def whole_lines(path): return [json.loads(r) for r in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


def stopped_in_the_middle(source, out, folder, how):
    process = start(source, out, "--model", folder, "--batch", 2)
    end = time.monotonic() + 120
    while len(whole_lines(out)) < 3 and process.poll() is None and time.monotonic() < end: time.sleep(0.01)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert process.returncode and 3 <= len(whole_lines(out)) < COUNT, err
    return process.returncode, err


def test_killed_and_resumed(source, folder, llm, tmp_path):
    out = tmp_path/"out.jsonl"
    stopped_in_the_middle(source, out, folder, signal.SIGKILL)
    before = out.read_bytes()
    kept = len(whole_lines(out))
    with open(out, "ab") as f: f.write('{"custom_id":"q39","request":"问'.encode()[:-1])        # a torn line, in the middle of a character
    code, summary, err = finished(source, out, "--model", folder, "--batch", 8, "--json")
    assert code == 0, err
    summary = json.loads(summary)
    assert (summary["answered"], summary["skipped"], summary["rejected"], summary["mended"]) == (COUNT - kept, kept, 0, True)
    assert out.read_bytes().startswith(before) and not (tmp_path/"out.jsonl.rejected").exists()  # nothing that was there is written again
    answers = whole_lines(out)
    assert sorted(a["custom_id"] for a in answers) == sorted(f"q{i}" for i in range(COUNT))
    expected = llm.generate([Request(messages=question(i), max_tokens=20 + 90*(i % 3)) for i in range(COUNT)])
    assert {a["custom_id"]: a["response"]["body"]["choices"][0]["message"]["content"] for a in answers} == {f"q{i}": e.text for i, e in enumerate(expected)}


def test_ctrl_c_keeps_what_is_finished(source, folder, tmp_path):
    code, err = stopped_in_the_middle(source, tmp_path/"out.jsonl", folder, signal.SIGINT)
    assert code == 130 and "the same command goes on" in err and "Traceback" not in err


def test_bad_lines_are_set_aside(folder, tmp_path):
    lines = [b'{"custom_id": "good", "prompt": "def f(", "max_tokens": 3}', b"\xff\xfe", b'{"prompt": "x"', b"", b'{"prompt": "x", "temprature": 1}', b'{"custom_id": "good", "prompt": "y"}',
             json.dumps(dict(prompt="word "*5000, max_tokens=3)).encode(), b"[" * 100_000, b'{"prompt": "x", "tools": [1]}', b'{"prompt": "z", "structured_outputs": {"regex": "[0-9]{3}"}}']
    (tmp_path/"in.jsonl").write_bytes(b"\n".join(lines))
    code, summary, err = finished(tmp_path/"in.jsonl", tmp_path/"out.jsonl", "--model", folder, "--json")
    assert code == 1 and json.loads(summary)["answered"] == 2, err
    rejected = {r["line"]: r for r in whole_lines(tmp_path/"out.jsonl.rejected")}
    assert sorted(rejected) == [2, 3, 5, 6, 7, 8, 9] and all(r["file"].endswith("in.jsonl") and r["error"] for r in rejected.values())
    assert "UTF-8" in rejected[2]["error"] and "temprature" in rejected[5]["error"] and "line 1" in rejected[6]["error"] and "tokens" in rejected[7]["error"]
    answers = {a["custom_id"]: a["response"]["body"]["choices"][0]["text"] for a in whole_lines(tmp_path/"out.jsonl")}
    assert answers["line-10"].isdigit() and len(answers["line-10"]) == 3


def test_wrong_use_is_exit_code_2_and_touches_nothing(source, folder, tmp_path):
    out = tmp_path/"mine.txt"
    out.write_text("my notes\n")
    for arguments in ((tmp_path/"absent.jsonl", out), (source, source), (source, out)):
        code, _, err = finished(*arguments, "--model", folder)
        assert code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1, err
    assert out.read_text() == "my notes\n"


def test_an_endpoint_answers(source, folder, llm, tmp_path):
    from aigc.serve.engine import model_engine
    with served(model_engine(str(folder), name="gpt-x", device="cpu")) as endpoint:
        lines = [l for l in source.read_text(encoding="utf-8").splitlines() if "gpt-x" in l][:6]
        source.write_text("\n".join([*lines, json.dumps(dict(custom_id="no-such-model", prompt="x", model="absent"))]), encoding="utf-8")
        code, summary, err = finished(source, tmp_path/"out.jsonl", "--url", endpoint.url, "--json")
        assert code == 1 and (json.loads(summary)["answered"], json.loads(summary)["rejected"]) == (6, 1), err
    answers = {a["custom_id"]: a["response"]["body"]["choices"][0]["message"]["content"] for a in whole_lines(tmp_path/"out.jsonl")}
    assert answers["q1"] == llm.generate([Request(messages=question(1), max_tokens=110)])[0].text
    assert finished(source, tmp_path/"late.jsonl", "--url", "http://127.0.0.1:9")[0] == 1  # nobody there: the run ends, not the lines
