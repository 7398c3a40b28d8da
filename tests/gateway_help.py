"""Gateways over real sockets for tests: stubs in processes of their own, keys, and a browser."""
import json
import shutil
import subprocess
import sys
import threading
import time

import httpx
import pytest

from aigc.serve.config import parse_config
from aigc.serve.gateway_server import GatewayServer
from aigc.serve.keys import KeyFile, Limits, new_key
from aigc.serve.server import bind

CHAT = "/v1/chat/completions"


def body(text="hello", **fields): return {"model": "docs", "messages": [{"role": "user", "content": text}]} | fields


class StubProcess:
    "`python -m aigc.serve.stub` in a process that can be killed."
    def __init__(self, port=0, **options):
        self.options, self.port = options, port
        code = f"import json; from aigc.serve.stub import Stub, serve_stub; serve_stub(Stub(**json.loads({json.dumps(json.dumps(options))})), {port})"
        self.process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().strip()
        self.port = int(self.url.split(":")[2].split("/")[0])

    def state(self): return httpx.get(self.url + "/models").json()

    def kill(self): self.process.kill(); self.process.wait()


class Running:
    "A gateway in a thread, with keys for asking, for a stranger tenant and for the administrator."
    def __init__(self, folder, upstreams, *, limits=None, redis="", models=None, follower=None, **config):
        self.secrets, keys = {}, KeyFile(folder/"keys.json")
        for name, more in (("alice", {"limits": limits or Limits()}), ("mallory", {"models": ["other"]}), ("boss", {"scopes": ["admin", "metrics"]})): self.secrets[name], key = new_key(name, **more); keys.add(key)
        self.said = []
        models = models or {"docs": {"upstreams": upstreams, "sticky": "none"}, "other": {"upstreams": upstreams}}
        self.server = GatewayServer(parse_config({"keys": str(keys.path), "models": models, "redis": redis} | config), bind("127.0.0.1", 0), tell=self.said.append, follower=follower)
        self.url, self.gateway = self.server.url, self.server.gateway
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        eventually(lambda: any(line.startswith("ready") for line in self.said), 20)

    def headers(self, who="alice"): return {"Authorization": f"Bearer {self.secrets[who]}"} if who else {}

    def ask(self, who="alice", path=CHAT, timeout=30, **fields): return httpx.post(self.url + path, json=body(**fields), headers=self.headers(who), timeout=timeout)

    def admin(self, method, path, **more): return httpx.request(method, self.url + path, headers=self.headers("boss"), **more)

    def metrics(self): return self.admin("GET", "/metrics").text

    def stop(self):
        self.server.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()


def eventually(true, seconds=5):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not become true"
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path):
    "Start stubs and gateways; everything is stopped at the end."
    made = []

    def make(stubs=({},), **config):
        upstreams = []
        for s in stubs:
            options = {k: v for k, v in s.items() if k not in ("weight", "role", "cache_salt")}
            made.append(stub := StubProcess(**options))
            upstreams.append({"url": stub.url} | {k: v for k, v in s.items() if k in ("weight", "role", "cache_salt")})
        folder = tmp_path/f"g{len(made)}"
        folder.mkdir()
        made.append(running := Running(folder, upstreams, **config))
        running.stubs = [m for m in made if isinstance(m, StubProcess)][-len(upstreams):] if upstreams else []
        return running
    yield make
    for m in reversed(made): m.stop() if isinstance(m, Running) else m.kill()


def events(text): return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def text_in(found): return "".join(e["choices"][0]["delta"].get("content") or "" for e in found if e.get("choices"))


@pytest.fixture
def browser():
    from conftest import missing
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium: missing("chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        opened = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        yield opened
        opened.close()
