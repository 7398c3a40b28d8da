"""Reward models, off-policy distillation, reading on; thoughts, cached tokens, what training hands over to serving; real runs that degenerate and are stopped."""
import json
import os
import shutil

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from aigc.core.errors import AigcError, UsageError  # noqa: E402
from aigc.core.store import Store  # noqa: E402
from aigc.data.records import Record  # noqa: E402
from aigc.models.sources import load_model, load_tokenizer, model_path  # noqa: E402
from aigc.train.config import train_config  # noqa: E402
from aigc.train.trainers import train  # noqa: E402

BASE = dict(lora_rank=8, lora_alpha=16, learning_rate=5e-3, batch_size=4, precision="fp32", log_steps=1, check_steps=50)


def turn(role: str, text: str) -> dict: return {"role": role, "content": text}


def chats(n: int = 8) -> list[Record]:
    return [Record(id=f"r{i}", messages=[turn("user", f"def f{i}(y)"), turn("assistant", f"Return the value of f{i % 7}.")]) for i in range(n)]


def pairs(n: int = 8, better: str = "Return the value of f{}.", worse: str = "import sys {}") -> list[Record]:
    return [Record(id=f"p{i}", prompt=[turn("user", f"def f{i}(y)")], chosen=[turn("assistant", better.format(i % 7))], rejected=[turn("assistant", worse.format(i % 7))]) for i in range(n)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str: return str(model_path("tiny", Store(tmp_path_factory.mktemp("store"))))


def losses(done, name="loss") -> list[float]: return [r[name] for r in done.history if name in r]


# --- methods ------------------------------------------------------------------------------------------------------------

def test_a_reward_model_scores_what_it_was_taught(tiny, tmp_path):
    from aigc.train.scored import Scorer, pairs_scored
    values = dict(BASE, method="reward", learning_rate=2e-3, epochs=3.0, batching="random")
    done = train(train_config(values), tiny, pairs(12)[4:], pairs(12)[:4], folder=tmp_path)
    assert losses(done)[-1] < losses(done)[0] and losses(done, "reward_accuracy") and losses(done, "validation_loss")
    settings = json.loads((done.path/"adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_CLS"
    (done.path/"adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": tiny}))
    assert all(a > b for a, b in pairs_scored(done.path, pairs(4)))
    centred = train(train_config(values | dict(centre=0.5)), tiny, pairs(12)[4:], pairs(12)[:4], folder=tmp_path)
    assert losses(centred) != losses(done)
    speaks = train(train_config(dict(BASE, max_steps=1)), tiny, chats(), folder=tmp_path)
    with pytest.raises(AigcError, match="does not score"): Scorer(speaks.path)
    with pytest.raises(AigcError, match="no chosen and rejected"): train(train_config(values), tiny, chats(), folder=tmp_path)


def test_reading_on_keeps_every_token(tiny, tmp_path):
    from aigc.train.rows import fitting
    tokenizer = load_tokenizer(tiny)
    documents = [Record(id=f"d{i}", text="The river rises in the mountains. " * (2 + 3*i)) for i in range(6)]
    whole = [len(tokenizer(r.text, add_special_tokens=False)["input_ids"]) + 1 for r in documents]
    found = fitting(tokenizer, documents, "pretrain", max_length=64)
    assert abs(sum(whole) - sum(found.tokens)) <= len(documents) and max(found.tokens) <= 64 and not found.dropped  # at most a lone last token of a document is left out
    assert all(r["labels"] == r["input_ids"] for r in found.rows)
    values = dict(method="pretrain", max_length=64, learning_rate=5e-3, batch_size=2, precision="fp32", epochs=2.0, log_steps=1, check_steps=50)
    done = train(train_config(values), tiny, documents, folder=tmp_path)
    assert losses(done)[-1] < losses(done)[0]
    with pytest.raises(AigcError, match="has no text"): train(train_config(values), tiny, chats(), folder=tmp_path)


def test_off_policy_distillation_reads_the_given_answers(tiny, tmp_path):
    teacher = train(train_config(dict(BASE, lora_rank=0, learning_rate=2e-3, epochs=4.0)), tiny, chats(), folder=tmp_path/"teacher")
    values = dict(method="distill", teacher=str(teacher.path), lora_rank=16, lora_alpha=32, learning_rate=5e-3, batch_size=4, answer_tokens=4, max_steps=4, precision="fp32", log_steps=1, check_steps=50, beta=0.0)
    off, mixed = (train(train_config(values | dict(own_answers=o)), tiny, chats(), folder=tmp_path) for o in (0.0, 0.5))
    assert losses(off)[-1] < losses(off)[0] and losses(off) != losses(mixed)
    assert off.mask(load_tokenizer(tiny)).trained.count(True) > 3  # the given answer, not the question
    from aigc.train.heldout import teacher_imitated
    from aigc.train.artifacts import save_trained
    store = Store(tmp_path/"store")
    saved = save_trained(store, "student", train(train_config(values | dict(own_answers=0.0)), tiny, chats(), folder=tmp_path, store=store), data="rows")
    assert teacher_imitated(tiny, saved.model.ref, str(teacher.path), chats(4), store=store).better.mean > 0


# --- thoughts -----------------------------------------------------------------------------------------------------------

def test_thoughts_are_learned_masked_or_taken_out(tiny):
    from aigc.train.preflight import preflight
    from aigc.train.rows import encode_learned, to_row
    tokenizer = load_tokenizer(tiny)
    thinking = [Record(id=f"t{i}", messages=[turn("user", f"q{i}"), turn("assistant", f"<think>hm {i}</think>\nIt is {i}.")]) for i in range(8)]
    row = to_row(thinking[3], "sft")
    def read(how):
        ids, labels = encode_learned(tokenizer, row, thinking=how)
        return tokenizer.decode(ids), tokenizer.decode([x for x in labels if x != -100])
    (all_text, learned), (seen, masked), (without, dropped) = map(read, ("learn", "mask", "drop"))
    assert learned.startswith("<think>hm 3</think>\nIt is 3.") and seen == all_text and "<think>" in seen
    assert masked.startswith("It is 3.") and dropped == masked and "<think>" not in without
    for how, word in (("learn", "learned"), ("mask", "not learned"), ("drop", "taken out")):
        found = preflight(dict(thinking=how), tiny, thinking)
        assert any(f.check == "thinking is a choice" and word in f.cause for f in found.findings) and not found.stops()
    unclosed = [r.model_copy(update={"messages": [r.messages[0], r.messages[1].model_copy(update={"content": "<think>hm"})]}) for r in thinking]
    assert any("without its end" in f.cause for f in preflight({}, tiny, unclosed).findings)


# --- cached tokens ------------------------------------------------------------------------------------------------------

def test_tokens_are_cached_under_the_template(tiny, tmp_path, monkeypatch):
    from aigc.train import rows
    tokenizer, calls, encode = load_tokenizer(tiny), [], rows.encode_learned
    monkeypatch.setattr(rows, "encode_learned", lambda *a, **k: (calls.append(1), encode(*a, **k))[1])
    def fit(tok=tokenizer, records=None, **more):
        calls.clear()
        return rows.cached_fitting(tmp_path, tok, records or chats(), "sft", max_length=128, **more), len(calls)
    first, n = fit(); again, none = fit()
    assert n == 8 and none == 0 and again == first
    other = load_tokenizer(tiny); other.chat_template = other.chat_template.replace("<|im_start|>", "<|im_start|> ")
    changed, n = fit(other)
    assert n == 8 and changed.rows[0]["input_ids"] != first.rows[0]["input_ids"]
    assert fit(learned="all")[1] == 8 and fit(records=chats(9))[1] == 9 and fit()[1] == 0
    file = next(tmp_path.glob("*.json")); [f.write_text("{half") for f in tmp_path.glob("*.json")]
    assert fit()[1] == 8 and file.exists()  # a file that is not whole is made again


# --- handed over to serving ---------------------------------------------------------------------------------------------

def test_a_model_whose_template_was_exchanged_is_refused(tiny, tmp_path):
    from aigc.train.merge import merge_adapter
    done = train(train_config(dict(BASE, max_steps=1)), tiny, chats(), folder=tmp_path)
    settings = json.loads((done.path/"training.json").read_text())
    assert settings["learning_rate"] == 5e-3 and set(settings["handover"]) == {"template", "end_of_turn"}
    merge_adapter(done.path, tmp_path/"merged", base=tiny, device="cpu")
    load_model(tmp_path/"merged", device="cpu")  # as evaluation and the endpoint do
    template = tmp_path/"merged"/"chat_template.jinja"
    before = template.read_text(); template.write_text(before + " ")
    with pytest.raises(AigcError, match="not the one it was trained with"): load_tokenizer(tmp_path/"merged")
    template.write_text(before)
    generation = tmp_path/"merged"/"generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"eos_token_id": 0}))
    with pytest.raises(AigcError, match="does not stop at '<|im_end|>'".replace("|", r"\|")): load_model(tmp_path/"merged", device="cpu")
    (done.path/"chat_template.jinja").write_text(before + " ")
    with pytest.raises(AigcError, match="not the one"): merge_adapter(done.path, tmp_path/"again", base=tiny, device="cpu")


def test_an_adapter_on_a_quantized_base_is_loaded_again(tiny, tmp_path):
    import aigc.quant.plugin  # noqa: F401
    from aigc.quant.format import FORMATS
    from aigc.quant.methods import quantize_model
    model, tok = load_model(tiny, device="cpu")
    quantize_model(model, FORMATS["w4a16"].model_copy(update={"method": "rtn"}))
    model.save_pretrained(tmp_path/"w4"); tok.save_pretrained(tmp_path/"w4")
    done = train(train_config(dict(BASE, learning_rate=2e-2)), str(tmp_path/"w4"), chats(), folder=tmp_path)
    loaded, _ = load_model(done.path, device="cpu")
    ids = torch.tensor([tok("def f1(y)")["input_ids"]])
    with torch.no_grad():
        adapted = loaded(input_ids=ids).logits
        with loaded.disable_adapter(): plain = loaded(input_ids=ids).logits
    assert (adapted - plain).abs().max() > 1e-3


def test_half_a_cluster_is_refused(tiny, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UsageError, match="LOCAL_RANK is set, but not RANK.*unset LOCAL_RANK"): train(train_config(BASE), tiny, chats(), folder=tmp_path)


# --- real runs that degenerate ------------------------------------------------------------------------------------------

WILD = dict(method="dpo", learning_rate=0.03, epochs=12.0, batch_size=4, log_steps=1, check_steps=100, warmup=0.0, max_grad_norm=100.0, precision="fp32", lora_rank=8)


def test_a_gradient_of_nought_stops_the_run(tiny, tmp_path):
    with pytest.raises(AigcError, match="the gradient has been exactly zero since step"):
        train(train_config(WILD | dict(loss="hinge", beta=1.0, learning_rate=5e-3)), tiny, pairs(8), folder=tmp_path)


@pytest.fixture(scope="module")
def by_heart(tiny, tmp_path_factory) -> str:
    "A test model that knows one short answer by heart."
    values = dict(BASE, lora_rank=0, learning_rate=1e-2, warmup=0.0, schedule="constant_with_warmup", batch_size=2, epochs=30.0)
    one = [Record(id="r", messages=[turn("user", "def f(y)"), turn("assistant", "Yes.")])]*2
    done = train(train_config(values), tiny, one, folder=tmp_path_factory.mktemp("by_heart"))
    assert losses(done)[-1] < 0.01
    return str(done.path)


def test_a_loss_of_nought_stops_the_run(by_heart, tmp_path):
    "What very many epochs on the same row do to a model, here at once: its logits grow until every other token has a probability that is no number of fp32 any more."
    from safetensors.torch import load_file, save_file
    weights = load_file(f"{by_heart}/model.safetensors")
    weights["model.norm.weight"] *= 20
    certain = tmp_path/"certain"; shutil.copytree(by_heart, certain)
    save_file(weights, certain/"model.safetensors", metadata={"format": "pt"})
    again = [Record(id=f"r{i}", messages=[turn("user", "def f(y)"), turn("assistant", "Yes.")]) for i in range(8)]
    with pytest.raises(AigcError, match="sft training: the loss has been exactly zero since step 1: .* or the model is certain of every answer already"):
        train(train_config(dict(BASE, epochs=4.0)), str(certain), again, folder=tmp_path)


def test_chosen_answers_that_fall_stop_the_run(by_heart, tmp_path):
    "Both answers fall, the chosen one too: the two differ in one sign, the steps are far too large, and a tiny beta lets the model go anywhere."
    near = [Record(id=f"p{i}", prompt=[turn("user", "def f(y)")], chosen=[turn("assistant", "Yes.")], rejected=[turn("assistant", "Yes!")]) for i in range(8)]
    with pytest.raises(AigcError, match=r"dpo training: the chosen answers have become .* times less likely at each token than before the training .* lower learning_rate \(now 0.02\), or raise beta \(now 0.01\) or sft_weight"):
        train(train_config(WILD | dict(learning_rate=0.02, beta=0.01)), by_heart, near, folder=tmp_path)


def test_rewards_that_are_all_alike_stop_the_run(tiny, tmp_path):
    values = dict(method="grpo", rewards=["number"], batch_size=4, generations=4, answer_tokens=3, max_steps=8, precision="fp32", log_steps=1, check_steps=50)
    sums = [Record(id=f"s{i}", messages=[turn("user", f"{i}+1?"), turn("assistant", f"{10**6 + i}")]) for i in range(8)]
    with pytest.raises(AigcError, match="all answers to a question have had the same reward since step 1"): train(train_config(values), tiny, sums, folder=tmp_path)


def test_answers_that_grow_stop_the_run(tiny, tmp_path):
    "A model that says 'Yes.', sometimes more, and a reward for words that a long answer has more of."
    short = [Record(id=f"r{i}", messages=[turn("user", f"def f{i}(y)"), turn("assistant", "Yes." if i % 4 else "Yes. " + "Return "*12)]) for i in range(16)]
    taught = train(train_config(dict(BASE, lora_rank=0, learning_rate=2e-3, epochs=12.0)), tiny, short, folder=tmp_path/"taught")
    values = dict(method="grpo", lora_rank=16, learning_rate=2e-2, batch_size=8, generations=8, rewards=["overlap"], answer_tokens=48, max_steps=24, precision="fp32", log_steps=1, check_steps=50, warmup=0.0)
    wordy = [Record(id=f"g{i}", messages=[turn("user", f"def f{i}(y)"), turn("assistant", "Return "*40)]) for i in range(8)]
    with pytest.raises(AigcError, match="the answers have grown from .* length is being rewarded; add 'length' to rewards"):
        train(train_config(values), str(taught.path), wordy, folder=tmp_path)


# --- bitsandbytes -------------------------------------------------------------------------------------------------------

def test_qlora_over_bitsandbytes(tiny, tmp_path):
    pytest.importorskip("bitsandbytes")
    done = train(train_config(dict(BASE, four_bit="nf4", epochs=2.0)), tiny, chats(), folder=tmp_path)
    assert losses(done)[-1] < losses(done)[0] and os.path.exists(done.path/"adapter_model.safetensors")
    with pytest.raises(UsageError, match="lora_rank"): train_config(dict(four_bit="nf4", lora_rank=0))
