"""LoRA adapters across rooms: in a crowded batch, over HTTP by name, over the wrong base."""
import random

import httpx, pytest, torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from aigc.core.errors import UsageError
from aigc.models.generate import Request, TransformersGenerator
from aigc.models.tiny import make_tiny
from aigc.serve.llm import LLM
from aigc.serve.lora import TARGETS, load_adapters
from endpoint_help import served


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = make_tiny(tmp_path_factory.mktemp("models")/"tiny-model")
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
    made = {}
    for seed, (name, targets) in enumerate({"attention": ["q_proj", "k_proj", "v_proj", "o_proj"], "all": list(TARGETS), "up": ["up_proj"]}.items()):
        torch.manual_seed(seed)
        made[name] = tmp_path_factory.mktemp("adapters")/name
        get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(task_type="CAUSAL_LM", r=4 + 2*seed, lora_alpha=24, target_modules=targets, init_lora_weights=False)).save_pretrained(made[name])
    return made


def many(count=24):
    r = random.Random(1)
    return [Request(prompt=[r.randrange(3, 900) for _ in range(r.randint(1, 60))], max_tokens=r.randint(20, 60), ignore_eos=True, adapter=("", "attention", "all", "up")[i % 4]) for i in range(count)]


def test_a_crowded_mixed_batch_says_what_peft_says_alone(folder, adapters):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    llm = LLM(model, tokenizer, blocks=10, max_tokens=32)  # too few blocks: preempted sequences begin again with their adapter
    load_adapters(llm.core, {k: str(v) for k, v in adapters.items()}, base=str(folder))
    requests = many()
    answers = llm.generate(requests)
    assert llm.core.scheduler.preemptions > 0 == llm.core.pool.used
    for name in ("", *adapters):
        mine = [i for i, r in enumerate(requests) if r.adapter == name]
        alone = AutoModelForCausalLM.from_pretrained(folder)
        if name: alone = PeftModel.from_pretrained(alone, adapters[name]).eval()
        expected = TransformersGenerator(alone, tokenizer, batch_size=1).generate([requests[i].model_copy(update=dict(adapter="")) for i in mine])
        assert [answers[i].token_ids for i in mine] == [e.token_ids for e in expected], name


def test_an_adapter_of_another_model_is_refused(folder, adapters, tmp_path):
    other = make_tiny(tmp_path/"other")
    config = other/"config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    llm = LLM.load(str(other), device="cpu")
    with pytest.raises(UsageError, match="stands on tiny-model, not on other"): load_adapters(llm.core, {"a": str(adapters["up"])}, base=str(other))
    assert not llm.core.adapters


def test_served_under_its_own_name(folder, adapters):
    from aigc.serve.engine import model_engine
    engine = model_engine(str(folder), name="base", device="cpu", adapters={k: str(v) for k, v in adapters.items()})
    with served(engine) as endpoint:
        assert [m["id"] for m in httpx.get(f"{endpoint.url}/v1/models").json()["data"]] == ["base", *adapters]
        def ask(name): return httpx.post(f"{endpoint.url}/v1/completions", json=dict(model=name, prompt="def add(", max_tokens=12, temperature=0), timeout=60).json()
        texts = {n: ask(n)["choices"][0]["text"] for n in ("base", *adapters)}
        assert len(set(texts.values())) == 4 and ask("all")["model"] == "all"
        assert ask("absent")["error"]["code"] == "model_not_found"
    llm = LLM.load(str(folder), device="cpu")
    load_adapters(llm.core, {k: str(v) for k, v in adapters.items()})
    assert texts == {n: llm.generate([Request(prompt="def add(", max_tokens=12, adapter="" if n == "base" else n)])[0].text for n in texts}


def test_the_command_says_what_is_wrong_before_it_loads(folder, adapters, capsys):
    from aigc.cli.main import main
    for wrong in (["--adapter", "x"], ["--adapter", "=y"], ["--adapter", "x=a", "--adapter", "x=b"], ["--adapter", f"x={adapters['up']}", "--engine", "transformers"]):
        with pytest.raises(SystemExit) as stopped: main(["serve", str(folder), "--port", "0", *wrong])
        assert stopped.value.code == 2 and "--adapter" in capsys.readouterr().err
