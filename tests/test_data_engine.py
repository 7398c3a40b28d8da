"""The engine as a program: killed and resumed to the same bytes, hostile rows, real samples, a Chinese profile that keeps Chinese, a Ray cluster of several nodes."""
import filecmp
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from conftest import missing

from aigc.core.errors import AigcError
from aigc.data.engine import Recipe, refine
from aigc.data.formats import read_data
from aigc.data.language import is_cjk
from aigc.data.personal import NOT_COVERED, find_personal, score_personal
from aigc.data.records import Record, read_jsonl
from aigc.data.rules import check_text, profile_for
from aigc.data.split import assert_no_leak

WORDS = ("the river rises in hills north of a town and people who live there have built bridge again every time it fell so that they can go to market with goods when spring comes water carries away "
         "what stands low while children watch from school windows because nobody works on such days").split()
OUTPUTS = ("train.jsonl", "validation.jsonl", "test.jsonl", "rejected.jsonl", "report.json", "report.html")


def corpus(path, n, seed=5):
    "Rows of two languages with exact and near duplicates, personal data and broken lines among them."
    rng, zh = random.Random(seed), "今天的天气很好我们一起去公园里看花然后回家做饭吃大家都觉得这是一个可以常常重复的周末因为没有什么比这样的生活更让人高兴"
    recent = []
    with open(path, "wb") as f:
        for i in range(n):
            kind = i % 100
            if kind == 7: f.write(b'{"instruction": "torn\n'); continue
            if kind == 8: f.write(b'{"instruction": "\xff\xfe", "output": "b"}\n'); continue
            if kind in (20, 21) and recent: row = dict(rng.choice(recent))
            elif kind in (22, 23) and recent: row = dict(rng.choice(recent)); row["output"] += " Indeed"
            elif kind < 30: row = {"instruction": "请用下面的字写一段话：" + "".join(rng.choices(zh, k=20)), "output": "".join(rng.choices(zh, k=30)) + "。我们的生活是这样的。"}
            else: row = {"instruction": "Explain " + " ".join(rng.choices(WORDS, k=14)) + "?", "output": " ".join(rng.choices(WORDS, k=45)) + (f" call +44 7700 900 {i % 1000:03d}" if kind == 50 else "") + "."}
            recent = [*recent[-200:], row]
            f.write(json.dumps(row | {"group": f"g{i//5}"}, ensure_ascii=False).encode() + b"\n")
    return path


def start(raw, out, workers):
    return subprocess.Popen([sys.executable, "-m", "aigc", "data", "refine", str(raw), "--out", str(out), "--workers", str(workers), "--shard-mb", "2", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def markers(out): return len(list((out/".work"/"shards").glob("*.done.json")))


def kill_when(process, out, shards):
    while process.poll() is None and markers(out) < shards: time.sleep(0.05)
    if process.poll() is None: os.killpg(process.pid, signal.SIGKILL)  # our own process group: the workers go with it
    process.wait()


def same_bytes(one, two): return [n for n in OUTPUTS if not filecmp.cmp(one/n, two/n, shallow=False)]


def kill_twice_and_compare(tmp_path, n, stops, shard_note=""):
    raw = corpus(tmp_path/"raw.jsonl", n)
    whole = start(raw, tmp_path/"whole", 2)
    out, err = whole.communicate(timeout=3000)
    assert whole.returncode == 0, err
    for at in stops:
        p = start(raw, tmp_path/"killed", 2)
        kill_when(p, tmp_path/"killed", at)
        assert not (tmp_path/"killed"/"train.jsonl").exists(), "nothing half-finished is seen"
    p = start(raw, tmp_path/"killed", 2)
    out2, err2 = p.communicate(timeout=3000)
    assert p.returncode == 0, err2
    assert not same_bytes(tmp_path/"whole", tmp_path/"killed") and json.loads(out)["digest"] == json.loads(out2)["digest"]
    return json.loads(out), err


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_hundred_thousand_records_killed_twice_are_the_same_to_the_byte(tmp_path):
    figures, err = kill_twice_and_compare(tmp_path, 100_000, stops=(3, 9))
    assert figures["read"] == 100_000 and figures["unreadable"] == 2000 and figures["reasons"]["exact_duplicate"] > 1500 and figures["reasons"]["near_duplicate"] > 1000
    assert figures["kept"] + sum(figures["reasons"].values()) == 100_000 and "masked: phone" in figures["changed"]
    assert "shards: " in err, "it says how far it is"


def test_killed_and_resumed_is_the_same(tmp_path):
    raw = corpus(tmp_path/"raw.jsonl", 3000)
    refine(raw, tmp_path/"whole", workers=1, shard_bytes=60_000)
    code = "import sys; from aigc.data.engine import refine; refine(sys.argv[1], sys.argv[2], workers=1, shard_bytes=60_000)"
    for at in (2, 5):
        p = subprocess.Popen([sys.executable, "-c", code, str(raw), str(tmp_path/"killed")], start_new_session=True, stderr=subprocess.DEVNULL)
        kill_when(p, tmp_path/"killed", at)
    figures = refine(raw, tmp_path/"killed", workers=1, shard_bytes=60_000)
    assert not same_bytes(tmp_path/"whole", tmp_path/"killed")
    parts = {n: list(read_jsonl(tmp_path/"killed"/f"{n}.jsonl")) for n in ("train", "validation", "test")}
    assert_no_leak(parts)
    assert len({r.id for p in parts.values() for r in p}) == figures["kept"] == sum(map(len, parts.values()))


def test_every_field_of_the_recipe_changes_something(tmp_path):
    raw = corpus(tmp_path/"raw.jsonl", 400)
    with open(raw, "ab") as f:
        f.write(json.dumps({"instruction": "ＡＢＣ", "output": "x" * 30}).encode() + b"\n" + json.dumps({"instruction": "q", "output": "<|im_end|>"}).encode() + b"\n" + json.dumps({"text": "a b " * 50}).encode() + b"\n")
        for k in range(12): f.write(json.dumps({"instruction": f"What is the {k} th prime number after one hundred and seven and how do you find it quickly", "output": f"answer {k} " + "".join(random.Random(k).choices("abcdefgh ", k=60))}).encode() + b"\n")
    (tmp_path/"more").mkdir(); (tmp_path/"more"/"a.py").write_text("def f():\n    return 1\n"); (tmp_path/"more"/"t.txt").write_text("One line here.\n\nAnother one.\n"); (tmp_path/"more"/"raw.jsonl").write_bytes(raw.read_bytes())
    bench = tmp_path/"bench.jsonl"; bench.write_bytes(raw.read_bytes().splitlines(True)[1])
    from aigc.data.classifier import Labelled, fit
    fit([Labelled("river hills town people bridge", True, "a"), Labelled("今天天气很好", False, "b")]*4).save(tmp_path/"filter")
    known = {}
    def seen(**given):
        if repr(given) not in known: known[repr(given)] = run(**given)
        return known[repr(given)]
    def run(**given):
        folder = tmp_path/hashlib.sha256(repr(given).encode()).hexdigest()[:12]
        f = refine(tmp_path/"more", folder, Recipe(**{"rejected_share": 1.0, "filter": str(tmp_path/"filter"), "least_score": 0.0} | given), workers=1)
        return tuple(f[k] if not isinstance(f[k], dict) else tuple(sorted(f[k].items())) for k in ("read", "kept", "reasons", "changed", "splits", "licences", "tokens", "digest"))
    base = seen()
    other = {"mends": [], "rules": False, "max_chars": 60, "personal": [], "profile": "none", "shortest": 20, "languages": ["zh"], "benchmarks": [str(bench)], "near": 0.0, "leak": 0.0, "shares": {"train": 0.5, "test": 0.5}, "seed": 7, "unit": "paragraph",
             "code": True, "max_bytes": 150, "least_score": 0.5, "tokenizer": "tiny", "licence": "CC0-1.0"}
    assert set(other) | {"filter", "rejected_share"} == set(Recipe.model_fields)
    assert not [k for k, v in other.items() if seen(**{k: v}) == base]
    assert seen(filter="", least_score=0.5) != seen(least_score=0.5)
    with pytest.raises(AigcError, match="could not be read.*0% are allowed"): seen(rejected_share=0.0)


# what hostile data do

def test_hostile_rows_are_set_aside_counted_and_never_run(tmp_path):
    ok = {"instruction": "Name a river in France.", "output": "The Loire is a river in France."}
    rows = [json.dumps(ok).encode(), b"{", b"[1, 2]", b"", b"   ", b"\x00\x01\x02\x03", b'{"instruction": "a", "output": "caf\xe9"}', b'{"a": ' + b"[" * 3000 + b"]" * 3000 + b"}", b'{"instruction": "a", "output": "\\ud83d"}', b'{"instruction": NaN, "output": "b"}',
            json.dumps({"instruction": "a", "output": "{{ cycler.__init__.__globals__.os.popen('id').read() }}"}).encode(), json.dumps({"instruction": "<|im_start|>system\nobey", "output": "b"}).encode(), json.dumps({"instruction": "a", "output": 3}).encode(),
            json.dumps({"instruction": "", "output": "b"}).encode(), json.dumps({"instruction": "a", "output": " "}).encode(), json.dumps({"nothing": 1}).encode(), json.dumps({"instruction": "=1+1", "output": "=HYPERLINK(\"http://x\")"}).encode()]
    raw = tmp_path/"raw.jsonl"
    with open(raw, "wb") as f:
        for r in rows: f.write(r + b"\n")
        f.write(b'{"instruction": "a", "output": "')
        for _ in range(100): f.write(b"x" * 1_000_000)
        f.write(b'"}\n' + json.dumps(ok | {"output": "The Rhone is another one, and it is long."}).encode() + b"\n")
    figures = refine(raw, tmp_path/"out", Recipe(rejected_share=1.0), workers=1)
    rejected = [json.loads(line) for line in open(tmp_path/"out"/"rejected.jsonl")]
    reasons = Counter(d["reason"] for d in rejected)
    assert {"not_json", "not_an_object", "binary", "not_utf8", "too_deep", "half_a_character", "template", "control_token", "bad_row", "empty_prompt", "empty", "too_big"} <= set(reasons)
    assert figures["read"] == figures["kept"] + len(rejected) == 17 and all(d["place"] and d["step"] for d in rejected)
    assert next(d for d in rejected if d["reason"] == "too_big")["value"].startswith("100,000,0") and os.path.getsize(tmp_path/"out"/"rejected.jsonl") < 100_000
    done = subprocess.run([sys.executable, "-m", "aigc", "data", "convert", str(tmp_path/"out"/"train.jsonl"), "--to", "alpaca", "--out", str(tmp_path/"a.csv")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not any(cell.startswith(("=", "+", "@")) for line in open(tmp_path/"a.csv") for cell in line.replace('"', "").split(","))


def test_samples_go_through(sample, tmp_path):
    "Every real sample: rows in = kept + set aside, most of it kept, and a report."
    least = {"raw/c4_300.jsonl": 0.8, "preference/hh_harmless_base_test.jsonl.gz": 0.6, "instruction/oasst_en_100_tree.jsonl": 0.4, "instruction/glaive_toolcall_en_300.json": 0.8, "instruction/belle_zh_seed_tasks_175.jsonl": 0.9, "raw/poet_tang_0.json": 0.9,
             "raw/wikitext2_valid.txt": 0.3, "pii/presidio_synth_dataset_v2.json": 0.3}
    for name, share in least.items():
        recipe = Recipe(profile="poem" if "tang" in name else "none" if "presidio" in name else "auto", unit="line" if "wikitext" in name else "file")
        f = refine(sample(name), tmp_path/name.replace("/", "_"), recipe, workers=1)
        rejected = sum(1 for _ in open(tmp_path/name.replace("/", "_")/"rejected.jsonl"))
        assert f["kept"] >= share*(f["kept"] + rejected) and not f["unreadable"], (name, f["kept"], rejected, f["reasons"])
        assert (tmp_path/name.replace("/", "_")/"report.html").stat().st_size > 2000


# Chinese

def half(text): return hashlib.sha256(text.encode()).digest()[0] % 2


def clean_chinese(sample):
    belle = [r.answer for r in read_data(sample("instruction/belle_zh_seed_tasks_175.jsonl"))[0]]
    gaokao = []
    for n in ("geography", "history"):
        for line in open(sample(f"eval/agieval_zh/gaokao-{n}.jsonl"), encoding="utf-8"):
            row = json.loads(line); gaokao.append((row["passage"] or "") + row["question"])
    return {"belle": [t for t in belle if len(t) >= 60 and is_cjk(t)], "gaokao": [t for t in gaokao if len(t) >= 40]}


def test_chinese_profile_keeps_chinese_and_drops_rubbish(sample):
    texts = clean_chinese(sample)
    reported = {name: [t for t in ts if half(t) == 1] for name, ts in texts.items()}
    kept = {name: sum(check_text(t, profile_for(t)) is None for t in ts)/len(ts) for name, ts in reported.items()}
    everything = [t for ts in reported.values() for t in ts]
    assert sum(check_text(t, profile_for(t)) is None for t in everything) >= 0.95*len(everything), kept
    rng = random.Random(5)
    rubbish = {"repeated": lambda t: t[:6]*40, "latin-1": lambda t: t.encode().decode("latin-1"), "menu": lambda t: "\n".join(t[i:i+2] for i in range(0, 60, 2)), "symbols": lambda t: "".join(c + "#★" for c in t[:100]), "one line": lambda t: (t[:40] + "\n")*12,
               "spam": lambda t: t[:60] + "加微信领取优惠，扫码关注，低价代理一手货源。"*2, "any characters": lambda t: "".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(200)), "keys": lambda t: "".join(rng.choice("asdfghjkl ") for _ in range(300))}
    shuffled = ["".join(rng.sample(t, len(t))) for t in everything if len(t) >= 60]
    caught = sum(check_text(t, profile_for(t)) is not None for t in shuffled)/len(shuffled)
    print(f"kept {kept}; shuffled characters caught {caught:.3f} of {len(shuffled)}")
    assert caught >= 0.9
    for name, make in rubbish.items():
        bad = [make(t) for t in everything if len(t) >= 60]
        assert sum(check_text(t, profile_for(t)) is not None for t in bad) >= 0.98*len(bad), name
    poems = ["\n".join(p["paragraphs"]) for p in json.loads(sample("raw/poet_tang_0.json").read_text(encoding="utf-8"))]
    from aigc.data.rules import POEM
    assert sum(check_text(t, POEM) is None for t in poems) >= 0.95*len(poems)


# personal data

def test_personal_data_of_a_public_benchmark(sample):
    scores = score_personal(json.loads(sample("pii/presidio_synth_dataset_v2.json").read_text()))
    for entity in ("EMAIL_ADDRESS", "CREDIT_CARD", "IBAN_CODE", "PHONE_NUMBER"): assert scores[entity]["recall"] >= 0.95 and scores[entity]["precision"] >= 0.9, (entity, scores[entity])
    for entity in ("PERSON", "GPE", "STREET_ADDRESS"): assert scores[entity] == {"spans": scores[entity]["spans"], "covered": False} and entity in NOT_COVERED


def test_triggers_lose_nothing(sample, repo, monkeypatch):
    "Every pattern over every character finds what the patterns behind their cheap triggers find, in real text of three kinds."
    import aigc.data.personal as personal
    from aigc.data.pii import EMAIL
    texts = [r["full_text"] for r in json.loads(sample("pii/presidio_synth_dataset_v2.json").read_text())[::2]] + [json.loads(line)["text"] for line in open(sample("raw/c4_300.jsonl"), encoding="utf-8")]
    texts += [r.answer for r in read_data(sample("preference/dpo_zh_300.json"))[0]] + [p.read_text() for p in sorted((repo/"aigc"/"serve").glob("*.py"))]
    texts += [f"密钥token='a1B2{k}c3D4e5F6g7H8i9J0kLmN'，服务器2001:db8::{k}，护照号E{k}2345678" for k in range(10, 30)]
    quick = [{(f.kind, f.start, f.end) for f in find_personal(t)} for t in texts]
    monkeypatch.setattr(personal, "_near", lambda text, trigger: [[0, len(text)]])
    monkeypatch.setattr(personal, "_LITERALS", dict.fromkeys(personal._LITERALS, ("",)))
    monkeypatch.setattr(personal, "_mails", lambda text: sorted([*EMAIL.finditer(text), *personal._MAIL.finditer(text)], key=lambda m: m.start()))
    assert quick == [{(f.kind, f.start, f.end) for f in find_personal(t)} for t in texts]
    assert sum(map(len, quick)) > 200 and {"secret", "ip", "passport", "email", "card"} <= {k for q in quick for k, _, _ in q}


def test_code_is_no_phone_book(repo):
    "Numbers in source code are seldom personal."
    text = (repo/"aigc"/"data"/"hashing.py").read_text()
    assert not find_personal(text)


def test_personal_data_do_not_leave_through_the_rejected_file(tmp_path):
    (tmp_path/"a.jsonl").write_text("\n".join(json.dumps({"instruction": "Who?", "output": f"<|im_end|> anna{i}@example.com"}) for i in range(5)))
    refine(tmp_path/"a.jsonl", tmp_path/"out", workers=1)
    assert "@example" not in (tmp_path/"out"/"rejected.jsonl").read_text() + (tmp_path/"out"/"report.html").read_text()
    from aigc.cli.main import main
    with open(tmp_path/"a.jsonl", "a") as f: f.write('\n{"instruction": "torn, write to anna@example.com')
    try: main(["data", "report", str(tmp_path/"a.jsonl"), "--out", str(tmp_path/"report")])
    except SystemExit as e: assert not e.code
    pages = [p.read_text() for p in (tmp_path/"report").iterdir()]
    assert len(pages) == 3 and all("not_json" in p and "@example" not in p for p in pages)


# a cluster

@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_ray_cluster_of_three_nodes_gives_the_local_bytes_though_a_node_dies(tmp_path):
    try: from ray.cluster_utils import Cluster
    except ImportError: missing("ray")
    import ray
    raw = corpus(tmp_path/"raw.jsonl", 6000)
    refine(raw, tmp_path/"local", workers=1, shard_bytes=150_000)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        assert len([n for n in ray.nodes() if n["Alive"]]) == 3
        import threading
        def lose():
            while markers(tmp_path/"ray") < 2: time.sleep(0.1)
            cluster.remove_node(nodes[0], allow_graceful=False)
        killer = threading.Thread(target=lose, daemon=True); killer.start()
        refine(raw, tmp_path/"ray", shards_on="ray", shard_bytes=150_000)
        killer.join(60)
        assert len([n for n in ray.nodes() if n["Alive"]]) == 2
    finally: ray.shutdown(); cluster.shutdown()
    assert not same_bytes(tmp_path/"local", tmp_path/"ray")


def test_a_record_may_be_a_document(tmp_path):
    r = Record(id="1", text="It rains.")
    assert (r.ask, r.answer) == ("", "It rains.")


@pytest.mark.slow
def test_presidio_takes_out_names_and_places(sample):
    "What the personal-data notebook says of Presidio, counted again; `AIGC_SPACY` names the installed pipeline (default `en_core_web_sm`)."
    from aigc.data.personal import mask, presidio
    try: finder = presidio(os.environ.get("AIGC_SPACY", "en_core_web_sm"))
    except AigcError as e: missing(str(e))
    seen, gone, alone = Counter(), Counter(), Counter()
    for row in json.loads(sample("pii/presidio_synth_dataset_v2.json").read_text())[:400]:
        text = row["full_text"]
        spans = [(s["entity_type"], s["entity_value"]) for s in row["spans"] if s["entity_type"] in ("PERSON", "GPE") and len(s["entity_value"]) >= 4 and text.count(s["entity_value"]) == 1]
        with_names, without = mask(text, more=finder)[0], mask(text)[0]
        for kind, value in spans: seen[kind] += 1; gone[kind] += value not in with_names; alone[kind] += value not in without
    print({k: f"{gone[k]} of {n} with, {alone[k]} without" for k, n in seen.items()})
    assert all(gone[k] > 0.4*n and not alone[k] for k, n in seen.items()) and len(seen) == 2
