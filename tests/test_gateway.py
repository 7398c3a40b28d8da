"""The gateway over real sockets: load, faults, strangers. Back ends are stubs in processes of their own, except where the engine itself is asked."""
import asyncio
import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import aiohttp
import httpx
import pytest
from gateway_help import CHAT, Running, StubProcess, body, events, eventually, start, text_in  # noqa: F401

from aigc.serve.config import parse_config
from aigc.serve.gateway import ASKED, ROUTES
from aigc.serve.gateway_server import GatewayServer
from aigc.serve.keys import KeyFile, Limits, new_key
from aigc.serve.server import bind


def test_two_hundred_streaming_clients_lose_and_double_nothing(start):
    g = start(({"words": 12, "name": "a"}, {"words": 12, "name": "b"}), queue={"max_running": 50, "max_waiting": 300, "max_seconds": 60})

    async def client(session, n):
        async with session.post(g.url + CHAT, json=body(f"question {n}", stream=True, stream_options={"include_usage": True}), headers=g.headers()) as r:
            found = events((await r.read()).decode())
        return r.status, text_in(found), [e["usage"]["completion_tokens"] for e in found if e.get("usage")], [e["choices"][0]["finish_reason"] for e in found if e.get("choices") and e["choices"][0]["finish_reason"]]

    async def all_of_them():
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session: return await asyncio.gather(*(client(session, n) for n in range(200)))
    answers = asyncio.run(all_of_them())
    for n, (status, text, usage, finish) in enumerate(answers):
        assert (status, usage, finish) == (200, [12], ["stop"]), (n, status, text)
        assert text.split(":", 1)[1] == f"question {n} " + " ".join(f"w{k}" for k in range(1, 12)), text
    assert sum(s.state()["served"] for s in g.stubs) == 200 and {t[1][0] for t in answers} == {"a", "b"}
    assert all(s.state()["running"] == 0 for s in g.stubs) and g.gateway.in_flight == 0


def test_a_back_end_killed_in_mid_stream_is_an_error_event_and_frees_everything(start):
    g = start(({"words": 200, "seconds": 0.02},), queue={"max_running": 1, "max_waiting": 1}, breaker={"failures": 1, "seconds": 0.2})
    with httpx.stream("POST", g.url + CHAT, json=body(stream=True), headers=g.headers(), timeout=20) as r:
        lines = r.iter_lines()
        next(lines)
        g.stubs[0].kill()
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and json.loads(rest[-2][6:])["error"]["code"] == "upstream_failed" and "Traceback" not in "".join(rest)
    eventually(lambda: g.gateway.queues["docs"].running == 0 and g.gateway.in_flight == 0)
    assert (r := g.ask()).status_code in (502, 503) and r.json()["error"]["code"] in ("no_backend", "upstream_failed") and r.headers["retry-after"]
    again = StubProcess(port=g.stubs[0].port, words=3)   # it comes back at the same address, and the breaker lets one try
    try: time.sleep(0.3); assert g.ask().status_code == 200
    finally: again.kill()


def test_a_retry_happens_before_the_first_token_and_never_after(start):
    g = start(({"name": "broken", "status": 500, "weight": 99}, {"name": "sound", "words": 3, "weight": 1}))
    answers = [g.ask(text=f"q{n}", stream=n % 2 == 0) for n in range(6)]
    assert all(r.status_code == 200 and "sound:q" in r.text for r in answers) and "aigc:retries_total" in g.metrics()
    g = start(({"name": "dies", "words": 100, "seconds": 0.03, "weight": 1}, {"name": "spare", "role": "fallback"}))
    with httpx.stream("POST", g.url + CHAT, json=body("once", stream=True), headers=g.headers(), timeout=20) as r:
        seen = []
        for line in r.iter_lines():
            seen.append(line)
            if "dies:once" in line: g.stubs[0].kill()
    assert '"upstream_failed"' in "".join(seen) and g.stubs[1].state()["served"] == 0   # nobody got half of two answers
    eventually(lambda: "spare:q" in g.ask(text="q").text)                                # the next request goes to the fallback


def test_swaps_and_weights_under_load_fail_no_request(start):
    g = start(({"name": "one", "words": 5, "seconds": 0.005, "weight": 1}, {"name": "two", "words": 5, "seconds": 0.005, "weight": 0}))
    done, stop = [], threading.Event()

    def work():
        with httpx.Client(headers=g.headers(), timeout=20) as client:
            while not stop.is_set():
                r = client.post(g.url + CHAT, json=body("q", stream=True))
                done.append((r.status_code, text_in(events(r.text)), r.text.endswith("data: [DONE]\n\n")))
    threads = [threading.Thread(target=work) for _ in range(6)]
    for t in threads: t.start()
    one, two = (s.url for s in g.stubs)
    for weights in ({one: 0, two: 1}, {one: 1, two: 1}, {one: 1, two: 0}) * 4:
        assert g.admin("POST", "/admin/weights", json={"model": "docs", "weights": weights}).status_code == 200
        time.sleep(0.1)
    stop.set()
    for t in threads: t.join()
    assert len(done) > 40 and {(s, e) for s, _, e in done} == {(200, True)} and {t.split(":")[0] for _, t, _ in done} == {"one", "two"}


def test_promotion_and_rollback_under_load_fail_no_request(start, tmp_path):
    "The ledger is written, the gateway follows it; a release that cannot be loaded changes nothing."
    from aigc.core.store import Store
    from aigc.serve.follow import Follower
    from aigc.serve.releases import Releases, full_ref
    from aigc.serve.routing import HttpBackend
    store = Store(tmp_path/"store")
    releases, stubs = Releases(store), []
    for n in range(1, 4):
        with (work := store.writing("model", f"docs{n}")) as folder: (folder/"config.json").write_text("{}")
        releases.create("docs", full_ref(work.artifact))

    def make(release, name, releases):
        if release.version == 3: raise RuntimeError("damaged")
        stubs.append(StubProcess(name=release.id, words=5, seconds=0.005))
        return HttpBackend(release.id, stubs[-1].url, model=name)
    releases.promote("docs", 1, override="a test")
    g = start((), models={"docs": {"release": "docs", "canary_percent": 20, "sticky": "none"}}, follow_seconds=0.1, follower=lambda gateway: Follower(gateway, releases, make=make))
    done, stop = [], threading.Event()

    def work():
        with httpx.Client(headers=g.headers(), timeout=20) as client:
            while not stop.is_set():
                r = client.post(g.url + CHAT, json=body("q", stream=True))
                done.append((r.status_code, r.headers.get("x-aigc-variant"), text_in(events(r.text)).split(":q")[0], r.text.endswith("data: [DONE]\n\n")))
    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads: t.start()
    def served(): return [(v.release, v.weight) for v in g.gateway.routes["docs"].variants]
    try:
        releases.promote("docs", 2, "canary", override="a test")
        eventually(lambda: served() == [("docs:1", 80), ("docs:2", 20)] and "docs:2" in {d[1] for d in done}, 30)
        releases.promote("docs", 2, override="a test")
        eventually(lambda: served() == [("docs:2", 100)], 30)
        releases.promote("docs", 3, override="a test")
        time.sleep(0.5)
        assert served() == [("docs:2", 100)]                                              # it cannot be loaded
        releases.rollback("docs")
        releases.rollback("docs")
        eventually(lambda: served() == [("docs:1", 100)], 30)
        many = len(done)
        eventually(lambda: len(done) > many + 20, 30)
    finally:
        stop.set()
        for t in threads: t.join()
        for s in stubs: s.kill()
    assert {(status, whole) for status, _, _, whole in done} == {(200, True)} and all(variant == text for _, variant, text, _ in done) and done[-1][1] == "docs:1", done[-3:]


def test_who_leaves_frees_his_place_in_the_queue_and_at_the_back_end(start):
    g = start(({"words": 400, "seconds": 0.05},), queue={"max_running": 1})
    for stream in (True, False):
        with pytest.raises(httpx.ReadTimeout):
            with httpx.Client(timeout=0.5) as c:
                if not stream: c.post(g.url + CHAT, json=body(), headers=g.headers())
                with c.stream("POST", g.url + CHAT, json=body(stream=True), headers=g.headers()) as r:
                    next(r.iter_bytes())
                    raise httpx.ReadTimeout("enough")
        eventually(lambda: g.gateway.queues["docs"].running == 0 and g.stubs[0].state()["running"] == 0)
    assert g.stubs[0].state()["given_up"] == 2


def test_a_deadline_ends_a_request_before_and_after_the_first_token(start):
    g = start(({"words": 100, "seconds": 0.05},))
    slow = httpx.post(g.url + CHAT, json=body(), headers=g.headers() | {"X-Request-Timeout": "0.3"})
    assert slow.status_code == 504 and slow.json()["error"]["code"] == "deadline_exceeded"
    streamed = httpx.post(g.url + CHAT, json=body(stream=True), headers=g.headers() | {"X-Request-Timeout": "0.4"})
    assert streamed.status_code == 200 and events(streamed.text)[-1]["error"]["code"] == "deadline_exceeded" and streamed.text.endswith("data: [DONE]\n\n")
    assert httpx.post(g.url + CHAT, json=body(), headers=g.headers() | {"X-Request-Timeout": "-1"}).status_code == 400
    eventually(lambda: g.stubs[0].state()["running"] == 0)


def test_limits_of_a_key_and_bounds_of_the_queue(start):
    g = start(({"words": 4, "seconds": 0.1},), limits=Limits(requests_per_minute=4), queue={"max_running": 1, "max_waiting": 1})
    answers = [g.ask(max_tokens=1, stream=n == 1) for n in range(5)]
    assert [r.status_code for r in answers] == [200]*4 + [429] and int((r := g.ask()).headers["retry-after"]) >= 1 and r.json()["error"]["type"] == "rate_limit_error"
    assert [r.headers["x-ratelimit-remaining-requests"] for r in answers] == ["3", "2", "1", "0", "0"] and {r.headers["x-ratelimit-limit-requests"] for r in answers} == {"4"} and r.headers["x-ratelimit-reset-requests"].endswith("s")
    g = start(({"words": 4, "seconds": 0.1},), queue={"max_running": 1, "max_waiting": 1})
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(g.ask())) for _ in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    full = [r for r in answers if r.status_code == 503]
    assert len(full) == 4 and all(int(r.headers["retry-after"]) >= 1 and r.json()["error"]["code"] == "queue_full" for r in full) and 'aigc:admission_rejections_total{reason="queue_full"} 4.0' in g.metrics()


def test_equal_requests_are_answered_once_and_never_across_tenants(start):
    g = start(({"words": 5, "seconds": 0.05},), cache={"entries": 10})
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(g.ask(temperature=0, stream=True).text)) for _ in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(set(answers)) == 1 and g.stubs[0].state()["served"] == 1
    g.ask(temperature=0, stream=True)
    assert g.stubs[0].state()["served"] == 1                                              # same key: from the cache …
    assert httpx.post(g.url + CHAT, json=body(temperature=0, stream=True) | {"model": "other"}, headers=g.headers("mallory")).status_code == 200
    assert httpx.post(g.url + CHAT, json=body(temperature=0, stream=True) | {"model": "other"}, headers=g.headers("alice")).status_code == 200
    assert g.stubs[0].state()["served"] == 3                                              # … another tenant, another model: computed anew
    g.ask(temperature=0.7), g.ask(temperature=0.7)
    assert g.stubs[0].state()["served"] == 5                                              # and what is not determined is always


ODD = ["/v1//chat/completions", "//v1/chat/completions", "/V1/chat/completions", "/v1/chat/completions/", "/v1/chat/completions%2f", "/v1/../v1/chat/completions", "/v1/chat/%63ompletions%00", "/./metrics", "/metrics/", "/metrics;x",
       "/admin", "/admin/", "/admin//status", "/health/../metrics", "/health/", "/ready/../admin/status", "/invocations", "/docs", "/openapi.json", "/redoc", "/v1/load_lora_adapter", "/load_model", "/update_weights", "/static/../../etc/passwd", "/", "/v1", "/.env", "*"]


def test_every_route_without_a_key_a_wrong_key_and_with_another_tenants_key(start):
    g = start(page=True, dashboard=True, feedback=os.devnull)
    known = sorted({p for _, p in [*ROUTES, *g.gateway.handlers]} | {"/v1/models/docs"})
    paths = [*known, *ODD]
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", int(g.url.rsplit(":", 1)[1]), timeout=20)) as connection:
        def call(method, path, headers):
            connection.request(method, path, json.dumps(body()) if method == "POST" else None, headers | ({"Content-Type": "application/json"} if method == "POST" else {}))
            answer = connection.getresponse()
            return httpx.Response(answer.status, content=answer.read(), headers=dict(answer.getheaders()))
        strangers = ({}, {"Authorization": "Bearer wrong"}, {"Authorization": g.secrets["alice"]}, {"X-Api-Key": "", "Cookie": f"key={g.secrets['alice']}"}, {"Authorization": f"Bearer {g.secrets['alice']}x"})
        for path in paths:
            for method in ("GET", "POST", "HEAD", "OPTIONS", "DELETE"):
                for headers in strangers if path in known else strangers[:2]:
                    if ROUTES.get((method, path), "x") is None or g.gateway.handlers.get((method, path), "x")[0] is None: continue   # health, readiness and the empty pages are open
                    r = call(method, path, headers)
                    assert r.status_code in (400, 401), (method, path, headers, r.status_code)
                    assert r.status_code == 400 or method == "HEAD" or set(r.json()) == {"error"}, (method, path)
        assert call("GET", "/health", {}).status_code == 200 and call("GET", "/v1/models", g.headers()).status_code == 200   # the paired positives
        for path in set(ODD) - {"/"}:
            for who in ("alice", "boss"): assert call("POST", path, g.headers(who)).status_code in (400, 404), path
        for path in ("/metrics", "/admin/status"): assert call("GET", path, g.headers()).status_code == 403 and call("GET", path, g.headers("boss")).status_code == 200
        for path in ("/admin/weights", "/admin/drain"): assert call("POST", path, g.headers()).status_code == 403
        for path in (*ASKED, "/v1/feedback"): assert call("POST", path, g.headers("boss")).status_code == 403
        for path in ("/", "/dashboard"): assert b"docs" not in call("GET", path, {}).content and "content-security-policy" in call("GET", path, {}).headers   # they tell nothing
        assert call("POST", CHAT, g.headers()).status_code == 200
        strange = call("POST", CHAT, g.headers("mallory"))                                # a key for another model only
        assert strange.status_code == 404 and strange.json()["error"]["code"] == "model_not_found"
        assert [m["id"] for m in call("GET", "/v1/models", g.headers("mallory")).json()["data"]] == ["other"] and call("GET", "/v1/models/docs", g.headers("mallory")).status_code == 404
    assert g.gateway.draining is False


def test_a_revoked_key_stops_working_within_a_second(start):
    g = start()
    assert g.ask().status_code == 200
    g.server.keys.remove("alice")
    eventually(lambda: g.ask().status_code == 401, 3)
    g.server.keys.path.write_text("{broken")
    time.sleep(1.2)
    assert g.admin("GET", "/admin/status").status_code == 200                             # a broken file changes nothing


def test_slow_strangers_and_huge_headers(start):
    g = start(timeouts={"headers": 0.5, "body": 0.5})
    port = int(g.url.rsplit(":", 1)[1])
    lazy = socket.create_connection(("127.0.0.1", port))
    lazy.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-A: ")
    lazy.settimeout(20)
    try:
        while lazy.recv(100): pass                                                        # shown the door, or `recv` gives up
    except ConnectionResetError: pass
    slow = socket.create_connection(("127.0.0.1", port))
    slow.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {g.secrets['alice']}\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{{".encode())
    slow.settimeout(20)
    assert b" 408 " in slow.recv(1000)
    huge = socket.create_connection(("127.0.0.1", port))
    huge.settimeout(20)
    try:
        huge.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Big: " + b"a"*10_000_000 + b"\r\n\r\n")
        answer = huge.recv(1000)
    except (ConnectionResetError, BrokenPipeError): answer = b" 400 "
    assert b" 400 " in answer or answer == b""
    assert g.ask().status_code == 200                                                     # the paired positive
    with httpx.Client(base_url=g.url) as c:                                               # a connection kept alive is not shown the door
        for _ in range(3): assert c.get("/health").status_code == 200; time.sleep(0.7)


# one test per class of research: what happened to others, refused here, and beside it the request that must still work
ATTACKS = {
    "pickle instead of JSON": (dict(content=b"\x80\x04\x95", headers={"Content-Type": "application/octet-stream"}), 415),
    "a client's chat template": (dict(json=body(chat_template="{{ cycler.__init__.__globals__ }}")), 400),
    "chat_template_kwargs": (dict(json=body(chat_template_kwargs={"tokenize": True})), 400),
    "code at load": (dict(json=body(trust_remote_code=True)), 400),
    "a LoRA path": (dict(json=body(lora_path="/etc")), 400),
    "ten thousand answers": (dict(json=body(n=10_000)), 400),
    "a list of prompts": (dict(json={"model": "docs", "prompt": ["x"]*2000}), 400),
    "a pattern that takes a year": (dict(json=body(response_format={"type": "json_schema", "json_schema": {"schema": {"type": "string", "pattern": "(a+)+$"*200}}})), 400),
    "a stack of brackets": (dict(content=b'{"model":"docs","messages":' + b"["*100_000, headers={"Content-Type": "application/json"}), 400),
    "logprobs of everything": (dict(json=body(logprobs=True, top_logprobs=100_000)), 400),
    "server-side request forgery": (dict(json=body([{"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}}])), 400),
    "somebody else's cache salt": (dict(json=body(cache_salt="theirs")), 400),
    "NaN": (dict(content=b'{"model":"docs","messages":[],"temperature":NaN}', headers={"Content-Type": "application/json"}), 400),
    "two megabytes": (dict(json=body("x"*2_000_000)), 413),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    stub = StubProcess(words=3)
    g = Running(tmp_path_factory.mktemp("shared"), [{"url": stub.url, "cache_salt": "body"}])
    g.stub = stub
    yield g
    g.stop()
    stub.kill()


@pytest.mark.parametrize("name", ATTACKS)
def test_known_attacks_are_refused_and_their_neighbours_work(shared, name):
    fields, status = ATTACKS[name]
    r = httpx.post(shared.url + CHAT, **(fields | {"headers": shared.headers() | fields.get("headers", {})}), timeout=20)
    assert r.status_code == status and "Traceback" not in r.text, r.text[:300]
    assert shared.ask(n=2, stop=["x"], logprobs=True, top_logprobs=2, response_format={"type": "json_schema", "json_schema": {"schema": {"type": "string", "pattern": "a+"}}}).status_code == 200


def test_code_in_a_call_a_checkpoint_and_its_template_is_not_run(tmp_path):
    "What others evaluated, imported or rendered (vLLM's tool parser, auto_map, templates of GGUF files), beside what must still work."
    from aigc.core.errors import AigcError
    from aigc.models.sources import load_model
    from aigc.models.template import render
    from aigc.models.tiny import make_tiny
    from aigc.serve.tools import parse_tools
    trap = tmp_path/"run"
    evil = f"__import__('pathlib').Path({str(trap)!r}).touch()"
    said = f'<tool_call>{{"name": "add", "arguments": {evil}}}</tool_call><tool_call>{json.dumps({"name": "add", "arguments": evil})}</tool_call>'
    assert parse_tools(said, ["add"])[1] == [] and [c["arguments"] for c in parse_tools('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', ["add"])[1]] == ['{"a": 1}']
    make_tiny(tmp_path/"model")
    model, tokenizer = load_model(tmp_path/"model", device="cpu")
    asked = [{"role": "user", "content": "Hi"}]
    assert "Hi" in render(tokenizer, asked)
    tokenizer.chat_template = "{{ cycler.__init__.__globals__.os.system('touch " + str(trap) + "') }}"
    with pytest.raises(Exception, match="unsafe|not safe|sandbox|cannot"): render(tokenizer, asked)
    config = json.loads((tmp_path/"model"/"config.json").read_text())
    (tmp_path/"model"/"config.json").write_text(json.dumps(config | {"model_type": "surprise", "auto_map": {"AutoConfig": "surprise.C", "AutoModelForCausalLM": "surprise.M"}}))
    (tmp_path/"model"/"surprise.py").write_text(evil)
    with pytest.raises(AigcError): load_model(tmp_path/"model", device="cpu")
    (tmp_path/"model"/"config.json").write_text(json.dumps(config))
    (tmp_path/"model"/"model.safetensors").rename(tmp_path/"model"/"pytorch_model.bin")
    with pytest.raises(AigcError): load_model(tmp_path/"model", device="cpu")             # a pickle is not opened
    assert not trap.exists()


def test_what_a_back_end_says_in_its_errors_stays_inside(start):
    g = start(({"status": 500},), breaker={"failures": 100})
    for path in ASKED:                                                                     # on every route: others forgot one
        r = g.ask(path=path)
        assert r.status_code == 502 and "0x7f3a" not in r.text and "/secret/path" not in r.text and "stub" not in r.text, (path, r.text)
    g = start(({"status": 422},))
    assert g.ask().status_code == 422 and "refuses" in g.ask().json()["error"]["message"]  # a client's mistake is told to him


def test_the_salt_comes_from_the_key_and_not_from_the_client(start):
    from aigc.serve.routing import AppBackend, Variant
    from aigc.serve.stub import Stub
    g, stub, seen = start(), Stub(), []

    async def app(scope, receive, send): seen.append(scope["state"]["cache_salt"]); await stub(scope, receive, send)
    backend = AppBackend("inner", app, model="inner")
    g.gateway.salted.add(backend)
    for route in g.gateway.routes.values(): route.variants = [Variant(backend)]
    assert g.ask().status_code == 200 and g.ask().status_code == 200
    assert httpx.post(g.url + CHAT, json=body() | {"model": "other"}, headers=g.headers("mallory")).status_code == 200
    assert seen[0] == seen[1] != seen[2] and len(seen[0]) == 32 and all(b["model"] == "inner" and "cache_salt" not in b for b in stub.bodies)
    assert g.ask(cache_salt=seen[2]).status_code == 400                                   # a client cannot bring one
    assert httpx.post(g.url + CHAT, json=body(), headers=g.headers() | {"X-Cache-Salt": seen[2]}).status_code == 200 and seen[-1] == seen[0]


def test_the_salt_reaches_a_plain_endpoint_and_vllm(start, shared):
    from endpoint_help import Scripted, served
    engine = Scripted("Yes.", name="docs")
    with served(engine, keys=["inner"]) as endpoint:
        os.environ["AIGC_TEST_KEY"] = "inner"
        upstream = {"url": f"{endpoint.url}/v1", "key_env": "AIGC_TEST_KEY", "cache_salt": "header", "model": "docs"}
        g = start((), models={"docs": {"upstreams": [upstream]}, "other": {"upstreams": [upstream]}})
        assert g.ask().status_code == g.ask(stream=True).status_code == 200 and httpx.post(g.url + CHAT, json=body() | {"model": "other"}, headers=g.headers("mallory")).status_code == 200
        alice, again, mallory = (r.cache_salt for r in engine.requests)
        assert alice == again != mallory and len(alice) == 32
        eventually(lambda: 'aigc:engine_healthy{model_name="docs",variant="%s/v1"} 1.0' % endpoint.url in g.metrics())   # and its figures come back
    shared.ask(text="a salted question")
    assert next(b for b in shared.stub.state()["bodies"] if b["messages"][0]["content"] == "a salted question")["cache_salt"]   # vLLM reads it in the body


def test_engines_tell_their_own_figures(start):
    g = start(({"name": "one", "words": 60, "seconds": 0.05}, {"name": "two", "weight": 0}))
    with httpx.stream("POST", g.url + CHAT, json=body(stream=True), headers=g.headers(), timeout=20) as r:
        lines = r.iter_lines()                                                            # held: when it goes, the client is gone
        next(lines)
        eventually(lambda: sum(float(line.split()[-1]) for line in g.metrics().splitlines() if line.startswith("aigc:engine_requests_running{") and 'model_name="docs"' in line) == 1)
    told = [v["engine"] for v in g.admin("GET", "/admin/status").json()["models"]["docs"]["variants"]]
    assert len(told) == 2 and all(0 <= t["kv_cache_usage_perc"] <= 1 and "prefix_cache_hits_total" in t for t in told)
    g.stubs[1].kill()
    time.sleep(1.1)
    assert g.metrics().count("aigc:kv_cache_usage_perc{") == 2                             # two models ask the one that is left; nobody waits for the dead


def test_a_full_disk_stops_the_log_and_nothing_else(start):
    g = start(log={"file": "/dev/full", "privacy": "full"})
    assert [g.ask().status_code for _ in range(3)] == [200]*3
    eventually(lambda: "aigc:log_lines_dropped_total 3.0" in g.metrics())
    g = start(feedback="/dev/full")
    asked = g.ask()
    def say(): return httpx.post(g.url + "/v1/feedback", json={"request_id": asked.headers["x-request-id"], "rating": "up"}, headers=g.headers())
    eventually(lambda: say().status_code == 503)
    assert say().json()["error"]["code"] == "feedback_unavailable" and "retry-after" in say().headers and g.ask().status_code == 200


def test_the_log_tells_what_privacy_allows(start, tmp_path):
    for privacy, seen in (("off", None), ("redacted", "Mail <EMAIL>")):
        file = tmp_path/f"{privacy}.jsonl"
        g = start(log={"file": str(file), "privacy": privacy})
        asked = g.ask(text="Mail max@example.com", stream=True)
        eventually(lambda: file.exists() and file.read_text())
        line = json.loads(file.read_text())
        assert line.get("prompt") == seen and line["request_id"] == asked.headers["x-request-id"] and line["status"] == 200 and line["completion_tokens"] == 16 and line["latency"] > 0
        assert g.secrets["alice"] not in file.read_text() and (privacy != "off" or "max@example.com" not in file.read_text())


def test_a_shadow_sees_copies_and_nobody_sees_it(start):
    g = start(({"name": "live", "words": 3}, {"name": "dark", "words": 3, "role": "shadow"}))
    assert all("dark" not in g.ask(stream=n % 2 == 0).text for n in range(6))
    eventually(lambda: g.stubs[1].state()["served"] == 6 and 'aigc:shadow_requests_total{model_name="docs",result="ok"} 6.0' in g.metrics())


def test_odd_bodies_never_break_it(shared):
    rng = random.Random(0)
    values = [None, True, 0, -1, 1e99, "", "\0", [], {}, [None], {"a": {"b": []}}, 2**70, "\u2028\r\n\r\ndata: x", ["x"]*20]
    names = ["model", "messages", "max_tokens", "temperature", "stop", "stream", "stream_options", "n", "logprobs", "user", "tools", "prompt", "input"]
    with httpx.Client(base_url=shared.url, headers=shared.headers(), timeout=30) as client:
        for _ in range(200):
            r = client.post(rng.choice(ASKED), json=body() | {rng.choice(names): rng.choice(values) for _ in range(rng.randint(1, 3))})
            assert r.status_code in (200, 400, 404, 413, 422, 502, 503) and (r.status_code == 200 or set(r.json()["error"]) == {"message", "type", "param", "code"}), r.text
        assert client.get("/health").status_code == 200


@pytest.mark.slow
def test_gateway_and_engine_under_two_hundred_streaming_clients(tmp_path):
    "The whole way: HTTP, gateway, application, engine with the test model; every answer is the one that the model gives alone."
    from aigc.core.store import Store
    from aigc.models.generate import Request, load_generator
    from aigc.models.tiny import make_tiny
    from aigc.serve.follow import Follower
    from aigc.serve.releases import Releases, Serving, full_ref
    store = Store(tmp_path/"store")
    with (work := store.writing("model", "docs")) as folder: make_tiny(folder)
    releases = Releases(store)
    releases.create("docs", full_ref(work.artifact), serving=Serving(max_batch=32, max_waiting=300))
    releases.promote("docs", 1, override="a test")
    secrets, keys = {}, KeyFile(tmp_path/"keys.json")
    for who, scopes in (("alice", ["inference"]), ("mallory", ["inference"]), ("boss", ["metrics"])): secrets[who], key = new_key(who, scopes=scopes); keys.add(key)
    config = parse_config({"keys": str(tmp_path/"keys.json"), "models": {"docs": {"release": "docs"}}, "queue": {"max_running": 64, "max_waiting": 300, "max_seconds": 300}})
    said = []
    server = GatewayServer(config, bind("127.0.0.1", 0), follower=lambda g: Follower(g, releases), tell=said.append)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        eventually(lambda: any(line.startswith("ready") for line in said), 180)

        async def client(session, n):
            async with session.post(server.url + CHAT, json=body(f"Question {n % 20}", stream=True, temperature=0, max_tokens=8), headers={"Authorization": f"Bearer {secrets['alice']}"}) as r:
                return r.status, (await r.read()).decode()

        async def all_of_them():
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=300)) as session: return await asyncio.gather(*(client(session, n) for n in range(200)))
        began = time.monotonic()
        answers = asyncio.run(all_of_them())
        print(f"\n200 streaming clients at once: {len(answers)} answers in {time.monotonic() - began:.1f} s, load {os.getloadavg()[0]:.1f}")
        assert {s for s, _ in answers} == {200} and all(t.endswith("data: [DONE]\n\n") for _, t in answers)
        texts = [text_in(events(t)) for _, t in answers]
        assert all(len({texts[n] for n in range(k, 200, 20)}) == 1 for k in range(20)), "the same question has one answer"
        alone = load_generator(store.path(releases.get("docs").model), device="cpu").generate([Request(messages=[{"role": "user", "content": "Question 3"}], max_tokens=8)])[0].text
        assert texts[3] == alone and server.gateway.in_flight == 0 and server.gateway.queues["docs"].running == 0
        def known(who): return httpx.post(server.url + CHAT, json=body("One long question for everybody. "*8, temperature=0, max_tokens=2), headers={"Authorization": f"Bearer {secrets[who]}"}, timeout=60).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        first, again, other, later = (known(who) for who in ("alice", "alice", "mallory", "mallory"))
        assert first < again == later and other == 0                                      # what one tenant asked, another cannot find out by asking
        told = httpx.get(server.url + "/metrics", headers={"Authorization": f"Bearer {secrets['boss']}"}).text
        figures = {line.split("{")[0]: float(line.split()[-1]) for line in told.splitlines() if 'variant="docs:1"' in line and line.startswith(("aigc:kv_", "aigc:prefix_", "aigc:engine_"))}
        assert figures["aigc:prefix_cache_hits_total"] > 0 and figures["aigc:engine_steps_total"] > 0 and figures["aigc:engine_requests_running"] == 0 and 0 <= figures["aigc:kv_cache_usage_perc"] < 1, figures
    finally:
        server.stop()
        thread.join(30)
    assert not thread.is_alive()


def test_sigterm_drains_the_command(tmp_path):
    stub = StubProcess(words=30, seconds=0.05)
    secret, key = new_key("alice")
    KeyFile(tmp_path/"keys.json").add(key)
    (tmp_path/"gateway.yaml").write_text(f"keys: keys.json\nmodels:\n  docs:\n    upstreams:\n      - url: {stub.url}\n")
    process = subprocess.Popen([sys.executable, "-m", "aigc", "gateway", "run", str(tmp_path/"gateway.yaml"), "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        url = next(line for line in process.stdout if " at http://" in line).split(" at ")[1].split("/v1")[0]
        next(line for line in process.stdout if line.startswith("ready"))
        with httpx.stream("POST", url + CHAT, json=body(stream=True), headers={"Authorization": f"Bearer {secret}"}, timeout=20) as r:
            lines = r.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and any('"finish_reason":"stop"' in line for line in rest)
        assert process.wait(10) == 0 and secret not in process.stdout.read()
    finally:
        process.kill()
        stub.kill()


# ---- Redis: the real one
@pytest.fixture
def redis_server(tmp_path):
    import shutil
    from conftest import missing
    if not shutil.which("redis-server"): missing("redis-server")
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]

    class Server:
        url = f"redis://127.0.0.1:{port}/0"
        def start(self):
            self.process = subprocess.Popen(["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)], stdout=subprocess.DEVNULL)
            def up():
                try: socket.create_connection(("127.0.0.1", port), 0.2).close(); return True
                except OSError: return False
            eventually(up)
            return self
        def kill(self): self.process.kill(); self.process.wait()
    server = Server().start()
    yield server
    server.kill()


@pytest.mark.services
def test_replicas_share_limits_in_redis_which_may_come_and_go(start, redis_server, tmp_path):
    g = start(limits=Limits(requests_per_minute=6), redis=redis_server.url)
    h = start(limits=Limits(requests_per_minute=6), redis=redis_server.url)
    codes = [(g if n % 2 else h).ask().status_code for n in range(8)]
    assert codes == [200]*6 + [429]*2 and "aigc:redis_up 1.0" in g.metrics()
    redis_server.kill()
    assert g.ask().status_code == 200 and "aigc:redis_up 0.0" in g.metrics()               # gone: each counts for itself, nobody is locked out
    redis_server.start()
    time.sleep(1.2)
    assert g.ask().status_code == 200 and "aigc:redis_up 1.0" in g.metrics()               # and back


@pytest.mark.services
def test_redis_counts_as_this_process_does(redis_server):
    from aigc.serve.limits import LocalCounters, RedisCounters

    async def both():
        remote, local, rng = RedisCounters(redis_server.url), LocalCounters(), random.Random(0)
        for _ in range(200):
            name, amount = rng.choice("ab"), rng.choice([1, 3, 30, 90])
            (a, left), (b, here) = await remote.take(name, amount, 60, 6000), await local.take(name, amount, 60, 6000)
            assert (a > 0) == (b > 0) and abs(a - b) < 5 and abs(left - here) < 0.1, (a, b, left, here)
            if rng.random() < 0.2: await remote.add(name, 20, 60, 6000); await local.add(name, 20, 60, 6000)
            (a, left), (b, here) = await remote.count("q" + name, amount, 1000), await local.count("q" + name, amount, 1000)
            assert (a > 0) == (b > 0) and left == here
        assert remote.up
        await remote.close()
    asyncio.run(both())


def test_every_field_of_the_configuration_is_read():
    "A field earns its place by changing something: each name of the configuration occurs in the code outside its definition."
    import re
    from pydantic import BaseModel
    from aigc.serve.config import GatewayConfig, ModelConfig, Upstream
    code = "\n".join(re.sub(r"^\s+\w+: .* = Field\(.*$", "", p.read_text(), flags=re.M) for p in Path(__file__).resolve().parents[1].glob("aigc/serve/*.py"))

    def walk(model):
        for name, f in model.model_fields.items():
            yield name
            if isinstance(f.annotation, type) and issubclass(f.annotation, BaseModel): yield from walk(f.annotation)
    unread = [n for m in (GatewayConfig, ModelConfig, Upstream) for n in walk(m) if not re.search(rf"\.{n}\b", code)]
    assert not unread, unread


@pytest.mark.slow
def test_the_tutorial_of_releases_runs(repo):
    import nbformat
    from nbclient import NotebookClient
    NotebookClient(nbformat.read(repo/"nbs"/"tutorials"/"30_release_and_roll_back.ipynb", 4), timeout=600, kernel_name="python3").execute()
