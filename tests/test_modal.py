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
for v in served.gateway.routes["docs"].variants: v.backend.stop()
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
    return root, python, site


def test_the_container_imports_becomes_ready_and_answers(container):
    root, python, site = container
    secret, key = new_key("me")
    (root/"empty").mkdir()
    frozen = ModalConfig(release="docs", gpu="H100", snapshot=True, pins=pins()).model_dump_json()
    env = {"PATH": "/usr/bin:/bin", "HOME": str(root/"empty"), FROZEN: frozen, "AIGC_STORE": str(root/"store"), "AIGC_KEYS": json.dumps([key.model_dump(mode="json")]), "AIGC_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([python, "-c", INSIDE, str(site), secret], cwd=root/"empty", env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.strip().splitlines()[-1]) == [401, 200, 200, "data: [DONE]", "docs:1", {"production": "docs:1"}]
    without = subprocess.run([python, "-c", INSIDE, str(site), secret], cwd=root/"empty", env=env | {"AIGC_KEYS": ""}, capture_output=True, text=True, timeout=180)
    assert without.returncode and "no API key is set" in without.stderr                   # the paired negative: a public address without keys


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
