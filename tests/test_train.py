"""Training: every field changes something, a killed run goes on to the same end, and what degenerates is stopped with a sentence."""
import inspect
import json
import os
import signal
import subprocess
import sys
import time

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from aigc.core.errors import AigcError  # noqa: E402
from aigc.core.store import Store  # noqa: E402
from aigc.data.records import Record  # noqa: E402
from aigc.models.sources import model_path  # noqa: E402
from aigc.train import trainers  # noqa: E402
from aigc.train.config import NAMES, READ_BY, TrainConfig, lora_arguments, train_config, trl_arguments  # noqa: E402
from aigc.train.trainers import train  # noqa: E402
from aigc.train.watch import last_checkpoint  # noqa: E402


def question(i: int, words: int = 3) -> dict: return {"role": "user", "content": " ".join(["def"] + [f"f{i % 7}(x{j})" for j in range(words)])}


def answer(text: str) -> dict: return {"role": "assistant", "content": text}


def chats(n: int = 14) -> list[Record]:
    return [Record(id=f"r{i}", messages=[question(i, 2 + i % 9), answer(f"Return the value of f{i % 7} for {i}.")]) for i in range(n)]


def pairs(n: int = 14) -> list[Record]:
    return [Record(id=f"p{i}", prompt=[question(i, 2 + i % 9)], chosen=[answer(f"Return the value of f{i % 7}.")], rejected=[answer("import sys " * (1 + i % 3))]) for i in range(n)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str: return str(model_path("tiny", Store(tmp_path_factory.mktemp("store"))))


def weights(path) -> dict:
    from safetensors.torch import load_file
    return load_file(next(path.glob("*.safetensors")))


# --- the configuration -------------------------------------------------------------------------------------------------

def test_schema_is_small_strict_and_goes_round():
    assert len(TrainConfig.model_fields) <= 100
    config = TrainConfig(method="dpo", lora_targets=["q_proj"], loss="ipo", schedule="linear")
    text = config.model_dump_json(by_alias=True)
    assert json.loads(text)["schema"] == 1 and TrainConfig.model_validate_json(text) == config
    with pytest.raises(AigcError, match="learning_rate"): train_config({"learningrate": 1e-4})
    with pytest.raises(AigcError): train_config({"schema": 2})


def test_every_name_is_known_to_the_installed_libraries():
    import peft
    import trl
    from transformers import EarlyStoppingCallback
    from aigc.train.rows import fitting
    from aigc.train.watch import Samples
    configs = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig, "kto": trl.KTOConfig, "grpo": trl.GRPOConfig, "distill": trl.DistillationConfig, "reward": trl.RewardConfig, "pretrain": trl.SFTConfig}
    from trl.experimental.gkd import GKDConfig
    from transformers import BitsAndBytesConfig
    known = {"quantizer": [BitsAndBytesConfig], "adapter": [peft.LoraConfig], "tokens": [peft.PromptTuningConfig, peft.PrefixTuningConfig], "early_stopping": [EarlyStoppingCallback], "rows": [fitting]}
    trainers_of = {"rewards": trl.GRPOTrainer, "teacher": trl.DistillationTrainer}
    for field, (target, name) in NAMES.items():
        if target == "samples": continue  # our own callback: test_samples_and_scores
        if field == "own_answers": kinds = [GKDConfig]  # the off-policy trainer's
        elif target == "trainer": kinds = [trainers_of[field]]
        else: kinds = known[target] if target in known else [configs[m] for m in READ_BY.get(field, tuple(configs)) if not (field == "max_length" and m in ("grpo", "distill"))]
        for kind in kinds: assert name in inspect.signature(kind).parameters, f"{field}: {kind.__name__} does not know '{name}'"
    assert hasattr(Samples, "on_evaluate")
    for method, kind in configs.items():
        config = TrainConfig(method=method)
        kind(**trl_arguments(config, "out", validated=True))
        peft.LoraConfig(**lora_arguments(config))


# one changed value for every field; what it must change is seen in what training leaves: log, steps, weights, rows
CHANGES = dict(
    seed=7, lora_rank=4, lora_alpha=8, lora_dropout=0.5, lora_targets=["q_proj"], batch_size=2, gradient_accumulation=2, batching="random", epochs=2.0, max_steps=2,
    learning_rate=1e-2, schedule="linear", optimizer="adafactor", adam_beta1=0.5, adam_beta2=0.9, embedding_noise=5.0, learned="all", adapter="dora", warmup=0.5, weight_decay=5.0, max_grad_norm=1e-3, precision="bf16", activation_checkpointing=True, log_steps=2, check_steps=2)
BASE = dict(lora_rank=8, lora_alpha=16, learning_rate=5e-3, batch_size=4, precision="fp32", log_steps=1, check_steps=50)


def trace(tiny, folder, monkeypatch, records, **values) -> tuple:
    "Everything that a run leaves and does: its log, its weights, its checkpoints, and how often an MLP ran."
    from transformers.models.llama.modeling_llama import LlamaMLP
    calls, forward = [], LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, *a, **k: (calls.append(1), forward(self, *a, **k))[1])
    kept = []
    monkeypatch.setattr(trainers, "last_checkpoint", lambda p: None)
    monkeypatch.setattr(trainers.shutil, "rmtree", lambda p, ignore_errors=False: kept.extend(sorted(x.name for x in p.glob("checkpoint-*"))))
    done = train(train_config(BASE | values), tiny, records, folder=folder)
    monkeypatch.undo()
    return json.dumps(done.history), {k: v.double().sum().item() for k, v in weights(done.path).items()}, kept, len(calls), done.dropped


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    with pytest.MonkeyPatch.context() as m: return trace(tiny, tmp_path_factory.mktemp("plain"), m, chats())


@pytest.mark.parametrize("field", sorted(CHANGES))
def test_every_field_changes_something(field, tiny, tmp_path, monkeypatch, plain):
    assert trace(tiny, tmp_path, monkeypatch, chats(), **{field: CHANGES[field]}) != plain


def test_the_remaining_fields_change_something(tiny, tmp_path, monkeypatch):
    elsewhere = {"virtual_tokens", "keep_checkpoints", "select_by", "select_rows", "sample_prompts", "sample_tokens", "report_to", "four_bit"}  # test_train_methods.py
    assert set(TrainConfig.model_fields) - set(CHANGES) - (set(READ_BY) - {"learned"}) - elsewhere == {"schema_version", "method", "max_length", "dropped_share", "patience"}
    records = chats(8)
    sizes = [len(r["input_ids"]) for r in trainer_rows(tiny, records)]
    with pytest.raises(AigcError, match=r"rows cannot be trained on, more than the 20% allowed.*raise max_length"):
        train(train_config(BASE | dict(max_length=max(sizes) - 40)), tiny, records, folder=tmp_path)
    short = train(train_config(BASE | dict(max_length=max(sizes) - 40, dropped_share=0.9)), tiny, records, folder=tmp_path)
    assert short.rows == sum(s <= max(sizes) - 40 for s in sizes) < 8 and all("longer than" in reason for _, reason, _ in short.dropped)
    # patience: a learning rate that only makes it worse after the first check
    wild = dict(learning_rate=0.5, max_grad_norm=100.0, check_steps=1, epochs=4.0, warmup=0.0)
    stopped, full = (train(train_config(BASE | wild | dict(patience=p)), tiny, records[2:], records[:2], folder=tmp_path) for p in (1, 0))
    assert stopped.steps < full.steps


def trainer_rows(tiny, records):
    from aigc.models.sources import load_tokenizer
    from aigc.models.template import encode
    tokenizer = load_tokenizer(tiny)
    return [dict(zip(("input_ids", "start"), encode(tokenizer, *r.prompt_completion()))) for r in records]


DPO = dict(method="dpo", learning_rate=1e-3)


@pytest.fixture(scope="module")
def plain_pairs(tiny, tmp_path_factory):
    with pytest.MonkeyPatch.context() as m: return trace(tiny, tmp_path_factory.mktemp("dpo"), m, pairs(8), **DPO)


@pytest.mark.parametrize("change", [dict(beta=0.5), dict(loss="ipo"), dict(loss="apo_zero"), dict(loss="sigmoid_norm"), dict(sft_weight=1.0), dict(lora_dropout=0.5), dict(loss="robust", label_smoothing=0.2)], ids=lambda c: "-".join(f"{k}_{v}" for k, v in c.items()))
def test_every_preference_field_changes_something(change, tiny, tmp_path, monkeypatch, plain_pairs):
    assert trace(tiny, tmp_path, monkeypatch, pairs(8), **DPO, **change) != plain_pairs


# --- the same arithmetic, said differently ------------------------------------------------------------------------------

def losses(done, name="loss"): return [r[name] for r in done.history if name in r]


def test_projecting_only_the_answers_gives_the_same_training(tiny, tmp_path, monkeypatch):
    import contextlib
    config = train_config(BASE)
    fast = train(config, tiny, chats(), folder=tmp_path/"fast")
    monkeypatch.setattr(trainers, "answer_positions_only", contextlib.nullcontext)
    slow = train(config, tiny, chats(), folder=tmp_path/"slow")
    assert losses(fast) == pytest.approx(losses(slow), abs=1e-4)
    a, b = weights(fast.path), weights(slow.path)
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


def test_projecting_only_the_answers_is_what_happens(tiny, tmp_path, monkeypatch):
    from trl.trainer import utils
    seen, apply = [], utils._ChunkedLogProbFunction.apply
    monkeypatch.setattr(utils._ChunkedLogProbFunction, "apply", lambda hidden, *a: (seen.append(hidden.shape[0]), apply(hidden, *a))[1])
    done = train(train_config(BASE), tiny, chats(), folder=tmp_path)
    learned = sum(len(r["input_ids"]) - r["start"] for r in trainer_rows(tiny, chats()))
    assert sum(seen) == learned < 0.6 * done.history[-1]["tokens"]


@pytest.mark.parametrize("change", [dict(batch_size=2, gradient_accumulation=2), dict(batching="padding_free"), dict(activation_checkpointing=True)], ids=["accumulation", "padding_free", "checkpointing"])
def test_the_portions_do_not_change_the_training(change, tiny, tmp_path):
    equal = [Record(id=f"e{i}", messages=[question(i, 4), answer(f"Return {i}.")]) for i in range(8)]
    values = BASE | dict(batching="random", epochs=2.0)
    if change.get("batching"): equal = equal[:4]  # one batch: the order inside it does not matter
    a, b = (train(train_config(v), tiny, equal, folder=tmp_path) for v in (values, values | change))
    assert losses(a) == pytest.approx(losses(b), abs=2e-3)


# --- killed, and gone on ------------------------------------------------------------------------------------------------

CONFIG = BASE | dict(epochs=3.0, batch_size=2, lora_dropout=0.1, check_steps=4, patience=20)
SCRIPT = """
import json, sys, time
sys.path[:0] = {path!r}
from tests.test_train import CONFIG, chats
from aigc.train.config import train_config
from aigc.train.trainers import train
def log(**row):
    print(row["step"], flush=True)
    if "loss" in row: time.sleep(0.05)
train(train_config(CONFIG), {model!r}, chats()[2:], chats()[:2], folder={folder!r}, log=log)
print("ended", flush=True)
"""


def test_a_killed_run_goes_on_to_the_same_end(tiny, tmp_path, repo):
    uninterrupted = train(train_config(CONFIG), tiny, chats()[2:], chats()[:2], folder=tmp_path/"whole")
    assert uninterrupted.steps == 18
    script = SCRIPT.format(path=[str(repo)], model=tiny, folder=str(tmp_path/"killed"))
    for at in (6, 11):  # in the first epoch, then in the second: two kills of one run
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        for line in process.stdout:
            assert line.strip() != "ended", "it was too fast to be killed"
            if int(line) >= at: break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    checkpoints = next((tmp_path/"killed").glob("sft-*"))/"checkpoints"
    assert last_checkpoint(checkpoints).name == "checkpoint-8"
    half = checkpoints/"checkpoint-10"  # killed while it was written: some files, no mark
    half.mkdir(); (half/"trainer_state.json").write_text("{}")
    later = checkpoints/"checkpoint-12"  # whole once, damaged since: what its mark says is not what is there
    import shutil
    shutil.copytree(checkpoints/"checkpoint-8", later); (later/"optimizer.pt").write_bytes(b"\0" * 100)
    resumed = train(train_config(CONFIG), tiny, chats()[2:], chats()[:2], folder=tmp_path/"killed")
    assert resumed.resumed_from == 8 and resumed.history == uninterrupted.history and resumed.best_step == uninterrupted.best_step
    a, b = weights(resumed.path), weights(uninterrupted.path)
    assert all(torch.equal(a[k], b[k]) for k in a)
    start = time.process_time()
    assert train(train_config(CONFIG), tiny, chats()[2:], chats()[:2], folder=tmp_path/"killed").history == resumed.history
    assert time.process_time() - start < 2, "a run that ended is not trained again"


def test_a_run_killed_between_its_last_checkpoint_and_its_end(tiny, tmp_path, monkeypatch):
    config = train_config(BASE | dict(max_steps=3, epochs=2.0))
    whole = train(config, tiny, chats(), folder=tmp_path/"whole")
    monkeypatch.setattr(trainers, "_save", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt): train(config, tiny, chats(), folder=tmp_path/"cut")
    monkeypatch.undo()
    resumed = train(config, tiny, chats(), folder=tmp_path/"cut")
    assert resumed.steps == 3 and resumed.history == whole.history
    a, b = weights(resumed.path), weights(whole.path)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_preference_training_goes_on_too(tiny, tmp_path):
    config = train_config(dict(method="dpo", learning_rate=1e-3, batch_size=2, check_steps=2, log_steps=1, precision="fp32"))
    whole = train(config, tiny, pairs(10)[2:], pairs(10)[:2], folder=tmp_path/"whole")
    def cut(**row):
        if row["step"] == 3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): train(config, tiny, pairs(10)[2:], pairs(10)[:2], folder=tmp_path/"cut", log=cut)
    resumed = train(config, tiny, pairs(10)[2:], pairs(10)[:2], folder=tmp_path/"cut")
    assert resumed.resumed_from == 2 and resumed.history == whole.history


# --- what degenerates is stopped ----------------------------------------------------------------------------------------

def test_a_loss_that_is_no_number_stops_the_run(tiny, tmp_path, monkeypatch):
    from trl import SFTTrainer
    loss = SFTTrainer.compute_loss
    monkeypatch.setattr(SFTTrainer, "compute_loss", lambda self, *a, **k: loss(self, *a, **k) * (float("nan") if self.state.global_step >= 2 else 1.0))
    with pytest.raises(AigcError, match=r"sft training: at step 3 the loss is nan; lower learning_rate \(now 0.005\)"):
        train(train_config(BASE | dict(epochs=4.0)), tiny, chats(), folder=tmp_path)


def test_a_preference_run_that_saturates_stops(tiny, tmp_path):
    near = [Record(id=f"n{i}", prompt=[question(i)], chosen=[answer(f"Return the value of f{i % 7} now.")], rejected=[answer(f"Return the value of f{i % 7} here.")]) for i in range(8)]
    wrong = dict(method="dpo", learning_rate=0.03, beta=1.0, epochs=6.0, batch_size=4, log_steps=1, check_steps=100, warmup=0.0, max_grad_norm=100.0, precision="fp32")
    with pytest.raises(AigcError, match=r"dpo training: the margin .* no gradient left; train for fewer steps, or lower learning_rate \(now 0.03\)"):
        train(train_config(wrong), tiny, near, folder=tmp_path)


def test_preference_training_starts_from_the_model_itself(tiny, tmp_path):
    done = train(train_config(dict(method="dpo", batch_size=2, log_steps=1, precision="fp32")), tiny, pairs(8), folder=tmp_path)
    assert done.history[0]["reward_margin"] == pytest.approx(0, abs=1e-5) and done.history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)


# --- the jobs -----------------------------------------------------------------------------------------------------------

JOB = dict(epochs=8.0, check_steps=4, validation_limit=4, samples=1)
SUPERVISED = """
import sys
from aigc.core.store import Store
from aigc.run.runner import run_job
run_job("sft", {parameters!r}, store=Store({store!r}))
"""


@pytest.mark.slow
def test_a_killed_job_goes_on(tmp_path):
    from aigc.run.record import read_metrics, runs_folder
    from aigc.run.runner import run_job
    import psutil
    store = Store(tmp_path/"store")
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISED.format(parameters=JOB, store=str(tmp_path/"store"))], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("store/scratch/**/checkpoint-*/complete")):
        assert supervisor.poll() is None and time.monotonic() < deadline, "no checkpoint was seen"
        time.sleep(0.05)
    family = [psutil.Process(supervisor.pid), *psutil.Process(supervisor.pid).children(recursive=True)]
    for process in family: process.kill()
    psutil.wait_procs(family)
    assert not store.list("adapter") and not store.list("report")
    record = run_job("sft", JOB, store=store)
    assert record.status == "succeeded", record.error
    assert set(record.outputs) == {"adapter", "model"}
    steps = [r["step"] for r in read_metrics(runs_folder(store)/record.id) if "loss" in r and "step" in r]
    assert steps == sorted(set(steps)) and steps[0] == 1 and steps[-1] == 64  # the rerun's metrics are whole


@pytest.mark.slow
def test_preference_job_starts_from_the_merged_model_and_refuses_the_adapter(tmp_path):
    from aigc.run.runner import run_job
    store = Store(tmp_path/"store")
    tuned = run_job("sft", dict(limit=8, validation_limit=4, samples=1), store=store)
    aligned = run_job("dpo", dict(model=tuned.outputs["model"], limit=8, shown=1), store=store)
    assert aligned.status == "succeeded", aligned.error
    assert set(aligned.outputs) == {"pairs", "adapter", "model"} and tuned.outputs["model"] in store.get(aligned.outputs["adapter"]).inputs
    assert aligned.metrics["merge_max_logit_difference"] < 1e-3
    refused = run_job("dpo", dict(model=tuned.outputs["adapter"], limit=8), store=store)
    assert refused.status == "failed" and "give the merged model" in refused.error.message
