"""KTO, kinds of adapters, what is looked at on the way, and the same arithmetic said differently: padding, packing, references, processes."""
import json
import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from aigc.core.errors import AigcError, UsageError  # noqa: E402
from aigc.core.store import Store  # noqa: E402
from aigc.data.records import Record  # noqa: E402
from aigc.models.sources import model_path  # noqa: E402
from aigc.train.config import train_config  # noqa: E402
from aigc.train.trainers import train  # noqa: E402

BASE = dict(lora_rank=8, lora_alpha=16, learning_rate=5e-3, batch_size=4, precision="fp32", log_steps=1, check_steps=50)
PREFERENCES = dict(BASE, learning_rate=1e-3)


def turn(role: str, text: str) -> dict: return {"role": role, "content": text}


def chats(n: int = 12) -> list[Record]:
    return [Record(id=f"r{i}", messages=[turn("user", f"def f{i}({'x, '*(i % 4)}y)"), turn("assistant", f"Return the value of f{i % 7} for {i}.")]) for i in range(n)]


def pairs(n: int = 12) -> list[Record]:
    return [Record(id=f"p{i}", prompt=[turn("user", f"def f{i}(y{i % 3})")], chosen=[turn("assistant", f"Return the value of f{i % 7}.")], rejected=[turn("assistant", "import sys " * (1 + i % 3))]) for i in range(n)]


def thumbs(n: int = 12) -> list[Record]:
    return [Record(id=f"k{i}", messages=[turn("user", f"def f{i}(y{i % 3})"), turn("assistant", f"Return f{i}." if i % 2 else "import sys")], meta={"label": bool(i % 2)}) for i in range(n)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str: return str(model_path("tiny", Store(tmp_path_factory.mktemp("store"))))


def weights(path) -> dict:
    from safetensors.torch import load_file
    return load_file(next(path.glob("*.safetensors")))


def losses(done, name="loss") -> list[float]: return [r[name] for r in done.history if name in r]


def same_weights(a, b) -> bool:
    a, b = weights(a.path), weights(b.path)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- KTO ----------------------------------------------------------------------------------------------------------------

def test_kto_learns_from_thumbs_and_from_pairs(tiny, tmp_path):
    config = train_config(dict(PREFERENCES, method="kto", batching="random", epochs=3.0))
    done = train(config, tiny, thumbs(), folder=tmp_path/"a")
    assert done.steps == 9 and done.rows == 12 and sum(done.mask(tokenizer(tiny)).trained) > 0
    first, last = [r for r in done.history if "loss" in r][0], [r for r in done.history if "loss" in r][-1]
    assert first["loss"] == pytest.approx(0.5, abs=0.02)  # the model is its own reference
    assert last["loss"] < first["loss"]
    assert train(config, tiny, pairs(6), folder=tmp_path/"b").rows == 12  # a pair is a good row and a bad one


def tokenizer(tiny):
    from aigc.models.sources import load_tokenizer
    return load_tokenizer(tiny)


KTO = dict(PREFERENCES, method="kto", batching="random", learning_rate=5e-3, epochs=3.0)


@pytest.fixture(scope="module")
def plain_kto(tiny, tmp_path_factory): return train(train_config(KTO), tiny, thumbs(8), folder=tmp_path_factory.mktemp("kto"))


@pytest.mark.parametrize("change", [dict(desirable_weight=3.0), dict(undesirable_weight=3.0), dict(beta=0.5), dict(loss="apo_zero_unpaired"), dict(reference="precomputed")], ids=lambda c: next(iter(c)))
def test_every_field_of_kto_changes_something(change, tiny, tmp_path, plain_kto):
    a, b = plain_kto, train(train_config(KTO | change), tiny, thumbs(8), folder=tmp_path)
    if "reference" in change: assert losses(a) == pytest.approx(losses(b), abs=1e-4)  # the same, computed beforehand
    else: assert losses(a) != losses(b)


def test_kto_needs_both_kinds_and_labels(tiny, tmp_path):
    config = train_config(dict(PREFERENCES, method="kto", batching="random"))
    with pytest.raises(AigcError, match="field 'label'"): train(config, tiny, chats(), folder=tmp_path)
    with pytest.raises(AigcError, match="have the label True") as refused: train(config, tiny, [r for r in thumbs() if r.meta["label"]], folder=tmp_path)
    assert refused.value.exit_code == 3
    with pytest.raises(UsageError, match="batch_size of at least 2"): train_config(dict(method="kto", batch_size=1))


def test_kto_goes_on_to_the_same_end(tiny, tmp_path):
    config = train_config(dict(PREFERENCES, method="kto", batching="random", check_steps=2, epochs=2.0))
    whole = train(config, tiny, thumbs(), folder=tmp_path/"whole")
    def cut(**row):
        if row["step"] == 5: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): train(config, tiny, thumbs(), folder=tmp_path/"cut", log=cut)
    resumed = train(config, tiny, thumbs(), folder=tmp_path/"cut")
    assert resumed.resumed_from == 4 and resumed.history == whole.history and same_weights(resumed, whole)


# --- kinds of adapters --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("adapter", ["rslora", "dora", "pissa", "ia3"])
def test_each_kind_of_adapter_is_trained_and_merged(adapter, tiny, tmp_path):
    from aigc.train.merge import merge_adapter
    done = train(train_config(dict(BASE, adapter=adapter)), tiny, chats(), folder=tmp_path)
    assert losses(done)[-1] < losses(done)[0]
    settings = json.loads((done.path/"adapter_config.json").read_text())
    assert settings["peft_type"] == ("IA3" if adapter == "ia3" else "LORA")
    assert merge_adapter(done.path, tmp_path/"merged", base=tiny, device="cpu", kl_bound=0.1).max_logit_difference < 1e-2
    if adapter == "pissa": assert settings["r"] == 16  # written as a plain LoRA on the unchanged base


@pytest.mark.parametrize("adapter", ["prefix", "prompt"])
def test_tokens_before_the_row(adapter, tiny, tmp_path):
    from aigc.train.merge import merge_adapter
    few, many = (train(train_config(dict(BASE, adapter=adapter, virtual_tokens=n, learning_rate=0.05)), tiny, chats(), folder=tmp_path/str(n)) for n in (2, 8))
    assert losses(few) != losses(many) and losses(many)[-1] < losses(many)[0]
    with pytest.raises(AigcError, match="cannot be merged"): merge_adapter(many.path, tmp_path/"merged", base=tiny)
    with pytest.raises(UsageError, match="set activation_checkpointing to false"): train_config(dict(adapter=adapter, activation_checkpointing=True))


@pytest.fixture(scope="module")
def packed(tiny, tmp_path_factory) -> str:
    "The test model in four bits."
    import aigc.quant.plugin  # noqa: F401
    from aigc.models.sources import load_model
    from aigc.quant.format import FORMATS
    from aigc.quant.methods import quantize_model
    model, tok = load_model(tiny, device="cpu")
    quantize_model(model, FORMATS["w4a16"].model_copy(update={"method": "rtn"}))
    folder = tmp_path_factory.mktemp("packed")
    model.save_pretrained(folder); tok.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("batch", [1, 4], ids=["few_tokens", "many_tokens"])
def test_an_adapter_learns_over_a_packed_weight_as_over_its_numbers(batch, packed, tmp_path, monkeypatch, recwarn):
    "Few rows go through the kernel, many through the dequantized weight; the gradient is that of plain linear layers with the same numbers, with activations kept or computed again."
    import aigc.quant.plugin  # noqa: F401
    from aigc.models.sources import load_model
    from aigc.quant.layers import DENSE_ROWS, QuantLinear
    model, tok = load_model(packed, device="cpu", dtype=torch.float32)
    plain = model.dequantize() or model
    plain.to(torch.float32).save_pretrained(tmp_path/"plain"); tok.save_pretrained(tmp_path/"plain")
    seen, product = [], QuantLinear._product
    monkeypatch.setattr(QuantLinear, "_product", lambda self, rows: (seen.append(rows.shape[0]), product(self, rows))[1])
    values = dict(BASE, batching="random", batch_size=batch, max_steps=4, epochs=4.0)
    over, again, numbers = (train(train_config(values | more), base, chats(), folder=tmp_path/name) for name, base, more in
                            (("over", packed, {}), ("again", packed, dict(activation_checkpointing=True)), ("numbers", str(tmp_path/"plain"), {})))
    assert (max(seen) < DENSE_ROWS) if batch == 1 else (min(seen) >= DENSE_ROWS)
    assert losses(over)[-1] < losses(over)[0] - 0.1 and set(weights(over.path)) and all("lora" in k for k in weights(over.path))
    assert losses(over) == losses(again) and losses(over, "grad_norm") == losses(again, "grad_norm") and same_weights(over, again)
    assert losses(over) == pytest.approx(losses(numbers), abs=0.02) and losses(over, "grad_norm") == pytest.approx(losses(numbers, "grad_norm"), rel=0.05)
    assert not [w for w in recwarn if "Unsupported layer type" in str(w.message)]
    with pytest.raises(AigcError, match="packed weights cannot be trained"): train(train_config(dict(BASE, lora_rank=0)), packed, chats(), folder=tmp_path)


# --- what is looked at on the way ---------------------------------------------------------------------------------------

def test_samples_scores_and_checkpoints_kept(tiny, tmp_path):
    values = dict(BASE, check_steps=2, epochs=3.0, sample_prompts=["def g(x)"], sample_tokens=6)
    done = train(train_config(values), tiny, chats()[4:], chats()[:4], folder=tmp_path/"a")
    assert [s["step"] for s in done.samples] == [2, 4, 6] and all(s["prompt"] == "def g(x)" for s in done.samples)
    longer = train(train_config(values | dict(sample_tokens=30)), tiny, chats()[4:], chats()[:4], folder=tmp_path/"e")
    assert all(b["answer"].startswith(a["answer"].rstrip("\ufffd")) and len(b["answer"]) >= len(a["answer"]) for a, b in zip(done.samples, longer.samples)) and longer.samples != done.samples
    plain = train(train_config({k: v for k, v in values.items() if not k.startswith("sample")}), tiny, chats()[4:], chats()[:4], folder=tmp_path/"b")
    assert plain.history == done.history and same_weights(plain, done)  # looking changes nothing
    scored = train(train_config(values | dict(select_by="rouge_l", select_rows=2)), tiny, chats()[4:], chats()[:4], folder=tmp_path/"c")
    assert len(losses(scored, "task_score")) == 3 and losses(scored) == losses(done)
    best = max((r for r in scored.history if "task_score" in r), key=lambda r: r["task_score"])
    assert scored.best_step == best["step"]
    exact = train(train_config(values | dict(select_by="exact", select_rows=1, patience=1)), tiny, chats()[4:], chats()[:4], folder=tmp_path/"d")
    assert exact.steps < done.steps and set(losses(exact, "task_score")) == {0.0}  # never right: stopped early
    from types import SimpleNamespace
    from aigc.train.watch import Samples
    assert [len(Samples(train_config(values | dict(select_by="exact", select_rows=n)), tmp_path/"s", SimpleNamespace(rows=[{}]*4)).rows) for n in (1, 3, 9)] == [1, 3, 4]


def test_so_many_checkpoints_stay(tiny, tmp_path, monkeypatch):
    from aigc.train import trainers
    kept = {}
    for n in (1, 3):
        monkeypatch.setattr(trainers, "_save", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt): train(train_config(dict(BASE, check_steps=1, keep_checkpoints=n, epochs=2.0)), tiny, chats(), folder=tmp_path/str(n))
        kept[n] = len(list((tmp_path/str(n)).glob("*/checkpoints/checkpoint-*")))
    assert kept == {1: 1, 3: 3}


def test_tensorboard_gets_the_curves(tiny, tmp_path):
    pytest.importorskip("tensorboardX")
    train(train_config(dict(BASE, report_to=["tensorboard"])), tiny, chats(), folder=tmp_path)
    from pathlib import Path
    events = list(Path(tmp_path).rglob("events.out.tfevents.*"))
    assert events and b"train/loss" in events[0].read_bytes()


def test_a_line_for_each_log(tiny, tmp_path, capfd):
    train(train_config(dict(BASE, epochs=2.0)), tiny, chats(), folder=tmp_path)
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("[Epoch")]
    assert said[0].startswith("[Epoch 1/2] step 1/6 | Loss ") and " | PPL " in said[0] and " | LR " in said[0] and said[-1].startswith("[Epoch 2/2] step 6/6")


# --- the same arithmetic, said differently ------------------------------------------------------------------------------

def test_batch_of_eight_is_eight_of_one(tiny, tmp_path):
    equal = [Record(id=f"e{i}", messages=[turn("user", f"def f{i}(x)"), turn("assistant", f"Return {i}.")]) for i in range(16)]
    a, b = (train(train_config(BASE | dict(batching="random", epochs=2.0, batch_size=n, gradient_accumulation=8//n)), tiny, equal, folder=tmp_path/str(n)) for n in (8, 1))
    assert losses(a) == pytest.approx(losses(b), abs=1e-5) and losses(a, "grad_norm") == pytest.approx(losses(b, "grad_norm"), rel=1e-3)


def test_packed_is_padded(tiny, tmp_path):
    rows = chats(4)  # one batch, one pack: the same tokens in one step
    runs = [train(train_config(BASE | dict(batching=b, max_steps=1, epochs=1.0, batch_size=n, max_length=512)), tiny, rows, folder=tmp_path/b) for b, n in (("random", 4), ("padding_free", 4), ("packed", 1))]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=1e-5) and losses(runs[0]) == pytest.approx(losses(runs[2]), abs=1e-5)
    assert losses(runs[0], "grad_norm") == pytest.approx(losses(runs[2], "grad_norm"), rel=1e-3)


def test_a_precomputed_reference_is_a_live_one(tiny, tmp_path, monkeypatch):
    from trl import DPOTrainer
    ahead, compute = [], DPOTrainer._precompute_ref_logps
    monkeypatch.setattr(DPOTrainer, "_precompute_ref_logps", lambda *a, **k: (ahead.append(1), compute(*a, **k))[1])
    a, b = (train(train_config(PREFERENCES | dict(method="dpo", reference=r, epochs=2.0)), tiny, pairs(), folder=tmp_path/r) for r in ("live", "precomputed"))
    assert len(ahead) == 1  # only the second of the two
    assert losses(a) == pytest.approx(losses(b), abs=1e-5) and losses(a, "reward_margin") == pytest.approx(losses(b, "reward_margin"), abs=1e-4)


def test_a_seed_is_a_result(tiny, tmp_path):
    a, b, c = (train(train_config(BASE | dict(seed=s, lora_dropout=0.1)), tiny, chats(), folder=tmp_path/n) for n, s in (("a", 1), ("b", 1), ("c", 2)))
    assert a.history == b.history and same_weights(a, b) and a.history != c.history


RANK = """
import json, sys
from pathlib import Path
sys.path[:0] = [{repo!r}]
from tests.test_train_methods import BASE, chats
from aigc.train.config import train_config
from aigc.train.trainers import train
done = train(train_config(BASE | dict(batching="random", batch_size={batch}, epochs=2.0)), {model!r}, chats(16), folder={folder!r})
import os
if os.environ.get("RANK", "0") == "0": Path({out!r}).write_text(json.dumps([[r["loss"], r["grad_norm"]] for r in done.history if "loss" in r]))
"""


def run_ranks(tmp_path, tiny, repo, processes: int) -> list:
    import socket
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    code = RANK.format(repo=str(repo), batch=8//processes, model=tiny, folder=str(tmp_path/f"run{processes}"), out=str(tmp_path/f"{processes}.json"))
    env = os.environ | dict(OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(processes), AIGC_DEVICE="cpu", ACCELERATE_USE_CPU="true")
    ranks = [subprocess.Popen([sys.executable, "-c", code], env=env | (dict(RANK=str(r), LOCAL_RANK=str(r)) if processes > 1 else {}), stderr=subprocess.PIPE, text=True) for r in range(processes)]
    said = [p.communicate(timeout=300)[1] for p in ranks]
    assert all(p.returncode == 0 for p in ranks), said[0][-3000:]
    return json.loads((tmp_path/f"{processes}.json").read_text())


def test_two_processes_are_one_of_twice_the_batch(tiny, tmp_path, repo):
    one, two = (run_ranks(tmp_path, tiny, repo, n) for n in (1, 2))
    assert len(one) == len(two) == 4
    assert [x for x, _ in one] == pytest.approx([x for x, _ in two], abs=2e-3)
    assert [g for _, g in one] == pytest.approx([g for _, g in two], rel=0.02)


# --- a full disk --------------------------------------------------------------------------------------------------------

def test_a_full_disk_is_said_and_survived(tiny, tmp_path):
    folder = tmp_path/"small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True).returncode:
        from conftest import missing
        missing("the right to mount a small file system")
    try:
        config = train_config(dict(BASE, lora_rank=16, check_steps=1, epochs=3.0, keep_checkpoints=5))
        with pytest.raises(AigcError, match="a checkpoint cannot be written.*free some space"): train(config, tiny, chats(), folder=folder)
        subprocess.run(["mount", "-o", "remount,size=200m", str(folder)], check=True)
        went_on = train(config, tiny, chats(), folder=folder)
        assert went_on.steps == 9 and went_on.resumed_from > 0
    finally: subprocess.run(["umount", "-l", str(folder)], check=True)
    assert went_on.history == train(config, tiny, chats(), folder=tmp_path/"whole").history


# --- the model answers while it trains ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def taught(tiny, tmp_path_factory):
    "A test model that has learned to say something, and to end: rewards of random noise would all be nought."
    done = train(train_config(dict(BASE, lora_rank=0, learning_rate=2e-3, epochs=6.0)), tiny, chats(), folder=tmp_path_factory.mktemp("taught"))
    return str(done.path)


GRPO = dict(method="grpo", lora_rank=8, learning_rate=1e-3, batch_size=4, generations=4, rewards=["overlap"], answer_tokens=16, max_steps=2, precision="fp32", log_steps=1, check_steps=50)


@pytest.fixture(scope="module")
def plain_grpo(taught, tmp_path_factory): return train(train_config(GRPO), taught, chats(4), folder=tmp_path_factory.mktemp("grpo"))


@pytest.mark.parametrize("change", [{}, dict(rewards=["overlap", "length", "ended"]), dict(generations=2), dict(temperature=0.5), dict(answer_tokens=6)], ids=lambda c: next(iter(c), "plain"))
def test_grpo_learns_from_rewards_and_reads_its_fields(change, taught, tmp_path, plain_grpo):
    from aigc.train.trainers import train_grpo
    a, b = plain_grpo, train_grpo(train_config(GRPO | change), taught, chats(4), folder=tmp_path)
    assert len(losses(a, "reward")) >= 2 and all(0 <= r <= 3 for r in losses(b, "reward"))
    assert (a.history == b.history) == (not change)


def test_distillation_brings_the_student_to_its_teacher(tiny, tmp_path):
    from aigc.models.sources import load_model
    from aigc.train.trainers import train_distill
    teacher = train(train_config(dict(BASE, lora_rank=0, learning_rate=2e-3, epochs=4.0)), tiny, chats(), folder=tmp_path/"teacher")
    base = dict(method="distill", teacher=str(teacher.path), lora_rank=16, learning_rate=5e-3, batch_size=4, answer_tokens=8, max_steps=6, precision="fp32", log_steps=1, check_steps=50)
    done = train_distill(train_config(base), tiny, chats(), folder=tmp_path/"a")
    assert losses(done)[-1] < losses(done)[0]
    assert losses(train_distill(train_config(base | dict(beta=0.0)), tiny, chats(), folder=tmp_path/"b")) != losses(done)
    with pytest.raises(UsageError, match="a teacher is needed"): train_distill(train_config(dict(method="distill")), tiny, chats(), folder=tmp_path)
    assert load_model(str(teacher.path), device="cpu")
