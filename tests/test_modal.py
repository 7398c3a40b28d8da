"""What can be known about Modal without Modal: names bound to installed signatures, and the container's view of the application."""
import inspect
import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

modal = pytest.importorskip("modal")
from aigc.core.store import Store  # noqa: E402
from aigc.models.tiny import make_tiny  # noqa: E402
from aigc.serve.keys import new_key  # noqa: E402
from aigc.serve.modal_config import FROZEN, ModalConfig, build_wheel, pins  # noqa: E402
from aigc.serve.releases import Releases, full_ref  # noqa: E402

INSIDE = """
import asyncio, json, os, sys, httpx
import aigc
assert aigc.__file__.startswith(sys.argv[1]), aigc.__file__
import aigc.serve.modal_app as m
assert m.config.release == "docs" and m.config.gpu == "H100" and m.config.snapshot
served = m.Served()
web = served.web.local()

async def ask():
    async with httpx.AsyncClient(transport=httpx.ASGITransport(web), base_url="http://modal", timeout=60) as client:
        body = {"model": "docs", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0, "stream": True}
        refused = await client.post("/v1/chat/completions", json=body)
        answered = await client.post("/v1/chat/completions", json=body, headers={"Authorization": "Bearer " + sys.argv[2]})
        ready = await client.get("/ready")
    print(json.dumps([refused.status_code, answered.status_code, ready.status_code, answered.text.strip().splitlines()[-1], answered.headers["x-aigc-variant"], m.verify.local()]))
asyncio.run(ask())
m.see_out(served.gateway)
"""
NIGHT = """
import json, aigc.serve.modal_app as m
from aigc.core.store import Store
from aigc.serve.releases import Releases
report = m.evaluate.local()
kept = Store().get(report)
print(json.dumps([kept.name, kept.inputs == [Releases().get("docs").model], len(list(open(Store().path(report)/"items.jsonl")))]))
"""


VLLM = """#!%s
import sys
from aigc.serve.stub import Stub, serve_stub
told = dict(zip(sys.argv[3::2], sys.argv[4::2]))
assert sys.argv[1] == "serve" and told["--host"] == "127.0.0.1" and told["--tensor-parallel-size"] == "2" and len(told["--api-key"]) > 20, sys.argv
assert open(sys.argv[2] + "/config.json").read()                     # the released folder, checked
serve_stub(Stub(told["--served-model-name"], words=3), int(told["--port"]))
"""
INSIDE_VLLM = """
import asyncio, json, os, sys, httpx
import aigc.serve.modal_vllm as m
served = m.Served()
web = served.web.local()

async def ask():
    async with httpx.AsyncClient(transport=httpx.ASGITransport(web), base_url="http://modal", timeout=60) as client:
        body = {"model": "docs", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
        refused, answered = await client.post("/v1/chat/completions", json=body), await client.post("/v1/chat/completions", json=body, headers={"Authorization": "Bearer " + sys.argv[1]})
        ready = await client.get("/ready")
        bodies = (await client.get("http://modal/health")).status_code
    asked = httpx.get(f"http://127.0.0.1:{m.PORT}/v1/models").json()["bodies"][-1]
    print(json.dumps([refused.status_code, answered.status_code, ready.status_code, "docs:Hi w1 w2" in answered.text.replace('"', "").replace("}", "") or answered.text.count("data:"), asked["model"], len(asked["cache_salt"])]))
asyncio.run(ask())
served.process.terminate()
assert served.process.wait(10) is not None
not_there = {"trl", "peft", "datasets", "papermill", "matplotlib", "scipy", "gguf", "rensa", "transformers", "torch"} & set(sys.modules)
assert not not_there, not_there                                      # vLLM's image has packages of its own; the gateway asks for none of these
"""


@pytest.fixture(scope="module")
def container(tmp_path_factory):
    "An environment with our wheel as the image installs it, and the dependencies seen through a path file; nothing of the checkout."
    root = tmp_path_factory.mktemp("container")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root/"venv"], check=True)
    python = root/"venv"/"bin"/"python"
    site = Path(subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True).stdout.strip())
    wheel = build_wheel(root/"wheels")
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel], check=True, capture_output=True)
    (site/"dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # path files are not read recursively: the editable install stays out of sight
    store = Store(root/"store")
    with (work := store.writing("model", "docs")) as folder: make_tiny(folder)
    releases = Releases(store)
    releases.create("docs", full_ref(work.artifact))
    releases.promote("docs", 1, override="a test")
    with store.writing("dataset", "asks") as folder:
        (folder/"test.jsonl").write_text("".join(json.dumps({"id": f"r{n}", "source": "test", "group": f"g{n}", "messages": [{"role": "user", "content": f"Describe f{n}(x)"}, {"role": "assistant", "content": f"Return {n}."}]}) + "\n" for n in range(3)))
    return root, python, site


def inside(container, name, code, *arguments, keys):
    "Run code in the container, with nothing around it."
    root, python, site = container
    (folder := root/name).mkdir()
    frozen = ModalConfig(release="docs", gpu="H100", snapshot=True, pins=pins(), evaluate_data="dataset/asks:latest", evaluate_limit=3).model_dump_json()
    env = {"PATH": "/usr/bin:/bin", "HOME": str(folder), FROZEN: frozen, "AIGC_STORE": str(root/"store"), "AIGC_KEYS": json.dumps([k.model_dump(mode="json") for k in keys]), "AIGC_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run([python, "-c", code, str(site), *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_container_imports_becomes_ready_and_answers(container):
    secret, key = new_key("me")
    done = inside(container, "serves", INSIDE, secret, keys=[key])
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.strip().splitlines()[-1]) == [401, 200, 200, "data: [DONE]", "docs:1", {"production": "docs:1"}]
    without = inside(container, "keyless", INSIDE, secret, keys=[])
    assert without.returncode and "no API key is set" in without.stderr                   # the paired negative: a public address without keys


@pytest.mark.slow
def test_the_container_measures_what_is_in_production_at_night(container):
    done = inside(container, "night", NIGHT, keys=[])
    assert done.returncode == 0 and json.loads(done.stdout.strip().splitlines()[-1]) == ["docs-nightly", True, 3], done.stderr[-2000:]


def test_the_container_of_vllm_starts_it_and_answers(container):
    root, python, _ = container
    secret, key = new_key("me")
    (vllm := python.parent/"vllm").write_text(VLLM % python)
    vllm.chmod(0o755)
    (root/"vllm").mkdir()
    env = {"PATH": f"{python.parent}:/usr/bin:/bin", "HOME": str(root/"vllm"), FROZEN: ModalConfig(release="docs", gpu="H100:2", pins=pins()).model_dump_json(), "AIGC_STORE": str(root/"store"), "AIGC_KEYS": json.dumps([key.model_dump(mode="json")])}
    done = subprocess.run([python, "-c", INSIDE_VLLM, secret], cwd=root/"vllm", env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, answered, ready, _, model, salt = json.loads(done.stdout.strip().splitlines()[-1])
    assert (refused, answered, ready, model, salt) == (401, 200, 200, "docs", 32)
    vllm.write_text(f"#!{python}\nraise SystemExit(3)\n")
    done = subprocess.run([python, "-c", INSIDE_VLLM, secret], cwd=root/"vllm", env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode and "it ended with exit code 3" in done.stderr                  # the paired negative: a vLLM that does not come up


JOB = """
import sys
from aigc.run.modal_jobs import run_one
import aigc
assert aigc.__file__.startswith(sys.argv[1]), aigc.__file__
print(run_one(open("spec.json").read(), sys.argv[2], commit=lambda: open("committed", "w").close()))
"""


def test_the_container_of_a_job_runs_it_and_commits(container, tmp_path):
    from test_run import make_job
    from aigc.run.executors import make_spec
    from aigc.run.record import RunRecord
    root, python, site = container
    spec = make_spec(make_job(tmp_path, "10_x", "n: int = 1", "run.log(n=n)"), {"n": 3}, store=Store(tmp_path/"store"), at="/store")
    (tmp_path/"spec.json").write_text(spec.model_dump_json(by_alias=True))
    done = subprocess.run([python, "-c", JOB, str(site), str(tmp_path/"volume")], cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    record = RunRecord.model_validate_json(done.stdout.strip().splitlines()[-1])
    assert (record.status, record.metrics["n"]) == ("succeeded", 3) and (tmp_path/"committed").exists() and (tmp_path/"volume"/"runs"/record.id/"run.json").exists()


def test_the_image_of_jobs_installs_the_wheel():
    import ast
    from aigc.run import modal_jobs
    called = {n.func.attr for n in ast.walk(ast.parse(Path(modal_jobs.__file__).read_text())) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)}
    assert "add_local_file" in called and "add_local_python_source" not in called         # .py mounts carry no job
    assert modal_jobs.image(modal_jobs.ModalOptions(), modal) is not None and modal_jobs.ModalOptions().python == f"{sys.version_info.major}.{sys.version_info.minor}"


def test_the_image_carries_the_page_the_launch_configurations_and_the_jobs(container):
    names = zipfile.ZipFile(next((container[0]/"wheels").rglob("*.whl"))).namelist()
    repo = Path(__file__).resolve().parents[1]
    wanted = [f"aigc/_jobs/{f.name}" for f in repo.glob("nbs/jobs/*.ipynb")] + [f"aigc_kernels/{f.relative_to(repo/'kernels'/'aigc_kernels').as_posix()}" for f in (repo/"kernels"/"aigc_kernels").rglob("*.json")] \
        + [f"aigc/{f.relative_to(repo/'aigc').as_posix()}" for f in (repo/"aigc").rglob("*") if f.suffix in (".html", ".css", ".js", ".json")]
    assert wanted and not set(wanted) - set(names)


def test_every_name_we_hand_to_modal_is_one_it_knows():
    import ast
    import aigc.serve.modal_app as m
    app, Image = modal.App("x"), modal.Image
    known = {"cls": app.cls, "function": app.function, "concurrent": modal.concurrent, "enter": modal.enter, "asgi_app": modal.asgi_app, "debian_slim": Image.debian_slim, "add_local_file": Image.add_local_file, "env": Image.env, "from_registry": Image.from_registry,
             "uv_pip_install": Image.uv_pip_install, "run_commands": Image.run_commands, "App": modal.App, "from_name": modal.Volume.from_name, "Retries": modal.Retries, "Cron": modal.Cron, "deploy": modal.App.deploy, "batch_upload": modal.Volume.batch_upload}
    bound = 0
    for source in (m.__file__, Path(m.__file__).with_name("modal_vllm.py"), Path(m.__file__).parents[1]/"cli"/"deploy.py"):
        for node in ast.walk(ast.parse(Path(source).read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in known:
                parameters = inspect.signature(known[node.func.attr]).parameters
                if node.func.attr == "from_name" and ast.unparse(node.func.value) == "modal.Secret": parameters = inspect.signature(modal.Secret.from_name).parameters
                for k in node.keywords:
                    if k.arg is None: continue
                    assert k.arg in parameters, (node.func.attr, k.arg)
                    bound += 1
    assert bound > 50


def test_the_module_imports_without_a_deprecation(tmp_path):
    done = subprocess.run([sys.executable, "-W", "error::DeprecationWarning:aigc", "-c", "import warnings, modal.exception\nfound = [w for w in vars(modal.exception).values() if isinstance(w, type) and issubclass(w, Warning)]\nassert found\nfor w in found: warnings.simplefilter('error', w)\nimport aigc.serve.modal_app"],
                          cwd=tmp_path, env=os.environ | {"HOME": str(tmp_path), "AIGC_STORE": str(tmp_path)}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-1500:]
