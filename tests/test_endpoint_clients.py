"""Other people's programs against our endpoint, and our endpoint in front of theirs. They are not part of the development environment: a missing one is a visible skip."""
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from conftest import missing
from endpoint_help import eventually, events, served

from aigc.models.tiny import make_tiny

PEERS = Path(os.environ.get("AIGC_PEERS", Path.home()/".cache"/"aigc"/"peers"))
pytestmark = [pytest.mark.slow, pytest.mark.services]


@pytest.fixture(scope="module")
def smol():
    "The default model in fp32 behind our endpoint, and its folder."
    from aigc.models.sources import model_path
    from aigc.serve.engine import model_engine
    folder = model_path("smollm2-135m")
    with served(model_engine("smollm2-135m", name="smollm2-135m", dtype="float32")) as e: yield e, folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from aigc.serve.engine import model_engine
    with served(model_engine(str(make_tiny(tmp_path_factory.mktemp("models")/"tiny-model")), name="tiny")) as e: yield e


def test_langchains_openai_class(tiny):
    try: from langchain_openai import ChatOpenAI
    except ImportError: missing("langchain-openai")
    chat = ChatOpenAI(base_url=f"{tiny.url}/v1", api_key="none", model="tiny", temperature=0, max_tokens=12, seed=1, max_retries=0)
    whole = chat.invoke([("system", "Be brief."), ("human", "Say something, 你好.")])
    assert whole.content and whole.usage_metadata["output_tokens"] == 12 and whole.response_metadata["finish_reason"] == "length"
    assert "".join(piece.content for piece in chat.stream([("system", "Be brief."), ("human", "Say something, 你好.")])) == whole.content
    def weather(city: str) -> str:
        "The weather of a city."
        return city
    called = chat.bind_tools([weather], tool_choice="weather").bind(max_tokens=200).invoke("Weather in Bern?")
    assert called.tool_calls == [] or called.tool_calls[0]["name"] == "weather"


def test_lm_eval_scores_as_the_local_model_does(smol, tmp_path):
    endpoint, folder = smol
    lm_eval = shutil.which("lm_eval") or (PEERS/"lm-eval"/"bin"/"lm_eval" if (PEERS/"lm-eval"/"bin"/"lm_eval").exists() else None)
    if not lm_eval and not (Path(sys.executable).parent/"lm_eval").exists(): missing("lm-evaluation-harness (pip install 'lm-eval[api]')")
    rows = [{"q": f"What is {a} plus {b}?", "choices": [str(a + b), str(a + b + 1), str(a*b + 3)], "gold": 0} for a in range(2, 6) for b in range(3, 6)]
    (tmp_path/"rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path/"sums.yaml").write_text(f"""task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}} The answer is"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""")
    def run(model, arguments, out):
        program = [str(lm_eval or Path(sys.executable).parent/"lm_eval")]
        done = subprocess.run([*program, "--model", model, "--model_args", arguments, "--tasks", "sums", "--include_path", str(tmp_path), "--output_path", str(tmp_path/out), "--log_samples", "--batch_size", "4"],
                              capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none"}, timeout=900)
        assert done.returncode == 0, done.stderr[-2000:]
        samples = next((tmp_path/out).rglob("samples_*.jsonl"))
        return {s["doc_id"]: [float(r[0][0]) if isinstance(r[0], list) else float(r[0]) for r in s["resps"]] for s in map(json.loads, samples.read_text().splitlines())}
    far = run("local-completions", f"model=smollm2-135m,base_url={endpoint.url}/v1/completions,tokenizer={folder},num_concurrent=4,tokenized_requests=True", "far")
    near = run("hf", f"pretrained={folder},dtype=float32", "near")
    assert far.keys() == near.keys() and len(far) == 12
    gaps = [abs(a - b) for k in far for a, b in zip(far[k], near[k], strict=True)]
    print(f"largest difference of {len(gaps)} log-likelihoods: {max(gaps):.1e}")
    assert max(gaps) < 1e-4


def test_llama_cpp_behind_our_endpoint(smol):
    from aigc.serve.upstream import UpstreamEngine
    _, folder = smol
    server = PEERS/"llama.cpp"/"bin"/"llama-server"
    gguf = next((p for p in [*Path(os.environ.get("AIGC_CACHE", Path.home()/".cache"/"aigc")).rglob("*SmolLM2*.gguf"), *PEERS.rglob("*SmolLM2*.gguf")]), None)
    if not server.exists() or gguf is None: missing("llama.cpp's server and a GGUF (make peers)")
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    process = subprocess.Popen([str(server), "-m", str(gguf), "--port", str(port), "--host", "127.0.0.1", "-t", "2", "-c", "2048", "--jinja"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: process.poll() is None and _alive(port), 60)
        with served(UpstreamEngine(f"http://127.0.0.1:{port}/v1", name="llama").start()) as e:
            def ask(**f): return httpx.post(f"{e.url}/v1/chat/completions", json={"model": "llama", "messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0, "max_tokens": 16} | f, timeout=120)
            body = ask(logprobs=True, top_logprobs=2).json()
            direct = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json={"model": "m", "messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0, "max_tokens": 16}, timeout=120).json()["choices"][0]["message"]["content"]
            assert direct and body["choices"][0]["message"]["content"] == direct and body["usage"]["completion_tokens"] > 3 and len(body["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 2
            assert "".join(c["delta"].get("content") or "" for e in events(ask(stream=True)) for c in e["choices"]) == direct
            schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
            assert "city" in json.loads(ask(response_format={"type": "json_schema", "json_schema": {"name": "c", "schema": schema}}, max_tokens=60).json()["choices"][0]["message"]["content"])
    finally:
        process.terminate()
        process.wait(20)


def _alive(port) -> bool:
    try: return httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200
    except httpx.HTTPError: return False
