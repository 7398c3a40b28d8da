"""Quantized models from outside: the frozen format, every field felt, other architectures, the job under papermill, and the gate that says no."""
import copy, inspect, json, os, subprocess, sys
from pathlib import Path

import pytest
import torch
from conftest import REPO
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

import aigc.quant.plugin  # noqa: F401  (registers the quantizer)
from aigc.core.errors import AigcError
from aigc.core.store import Store
from aigc.models.sources import load_model, model_path
from aigc.quant.format import FORMATS, QuantConfig, tensor_shapes
from aigc.quant.layers import QuantLinear, quantized, weight_bytes
from aigc.quant.methods import quantize_model
from aigc.quant.plugin import AigcConfig

logging.disable_progress_bar()
IDS = torch.arange(3, 40)[None]


def logits(model): return model(IDS).logits


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad(): yield


@pytest.fixture(scope="module")
def store(tmp_path_factory): return Store(tmp_path_factory.mktemp("quant")/"store")


@pytest.fixture(scope="module")
def tiny(store): return load_model("tiny", store=store, device="cpu")[0]


def texts(count: int = 6) -> list[list[int]]:
    "Token ids; texts share their words, as texts do."
    return [(torch.randint(0, 40, (40,), generator=torch.Generator().manual_seed(i))*21 + 3).tolist() for i in range(count)]


# ---- the format ---------------------------------------------------------------------------------------------------------

def test_the_schema_is_small_and_comes_back():
    assert len(inspect.getsource(QuantConfig).splitlines()) <= 40
    for config in (*FORMATS.values(), QuantConfig(bits=8, group_size=64, method="clip", ignore=("a", "b.c"))):
        assert QuantConfig.read(json.loads(config.model_dump_json())) == config


@pytest.mark.parametrize("wrong,says", [(dict(format_version=2), "format 2"), (dict(bits=3), "bits"), (dict(group_size=0), "group_size"), (dict(group_sise=32), "group_size"), (dict(method="gtpq"), "method")])
def test_what_is_not_understood_is_refused(wrong, says):
    with pytest.raises(AigcError, match=says): QuantConfig.read(FORMATS["w4a16"].model_dump() | wrong)


def test_every_field_changes_the_checkpoint(tiny):
    def tensors(**fields):
        model = copy.deepcopy(tiny)
        quantize_model(model, QuantConfig(**dict(method="clip") | fields), texts())
        return {n: (tuple(t.shape), t.double().sum().item()) for n, t in model.state_dict().items()}
    usual = tensors()
    changed = dict(bits=8, group_size=64, symmetric=True, method="gptq", ignore=("lm_head", "down_proj"))
    assert set(changed) == set(QuantConfig.model_fields) - {"quant_method", "format_version", "fp8", "float_zeros", "act_order"}      # the last two come from imported checkpoints:
    assert tensors(**dict(FORMATS["fp8"])) != tensors(**dict(FORMATS["w8a16"])) and tensor_shapes(FORMATS["fp8"], 8, 64) != tensor_shapes(FORMATS["w8a16"], 8, 64)
    assert tensor_shapes(QuantConfig(float_zeros=True), 8, 64)["weight_zero_point"] != tensor_shapes(QuantConfig(), 8, 64)["weight_zero_point"]
    assert "weight_g_idx" in tensor_shapes(QuantConfig(act_order=True), 8, 64)
    for field, value in changed.items(): assert tensors(**{field: value}) != usual, field


def test_files_hold_what_the_format_says(tiny, tmp_path):
    for name, config in FORMATS.items():
        model = copy.deepcopy(tiny)
        quantize_model(model, config, texts())
        model(IDS)                                                                           # device layouts exist now, and must not be saved
        model.save_pretrained(tmp_path/name)
        found = {n: t for n, t in load_file(tmp_path/name/"model.safetensors").items() if "up_proj" in n and ".0." in n}
        assert {n.rsplit(".", 1)[1]: (tuple(t.shape), t.dtype) for n, t in found.items()} == tensor_shapes(config, 384, 128)
        said = json.loads((tmp_path/name/"config.json").read_text())["quantization_config"]
        assert QuantConfig.read(said) == config.model_copy(update={"ignore": ("lm_head",)})


# ---- models -------------------------------------------------------------------------------------------------------------

SMALL = dict(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128)


@pytest.mark.parametrize("make", [lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2)),                     # biases, an untied head
                                  lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL))], ids=["qwen2", "gpt-neox"])            # a fused matrix, a head called embed_out
@pytest.mark.parametrize("name", ["w4a16", "w8a16"])
def test_other_architectures(make, name, tmp_path):
    torch.manual_seed(0)
    model = make()
    for n, p in model.named_parameters():
        if n.endswith("bias"): p.copy_(torch.randn_like(p))
    model.save_pretrained(tmp_path/"made")
    model = AutoModelForCausalLM.from_pretrained(tmp_path/"made", dtype=torch.bfloat16).eval()
    before = logits(model).float()
    report = quantize_model(model, FORMATS[name], texts())
    assert report.share < (0.32 if name == "w4a16" else 0.54) and not isinstance(model.get_output_embeddings(), QuantLinear)
    assert (logits(model) - before).norm() < (0.3 if name == "w4a16" else 0.05) * before.norm()
    model.save_pretrained(tmp_path/"quantized", max_shard_size="60KB")
    assert len(list(tmp_path.glob("quantized/*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path/"quantized").eval()
    assert torch.equal(logits(again), logits(model))
    assert {n for n, _ in quantized(again)} == set(report.names)


def test_a_model_without_linear_layers_says_so():
    with pytest.raises(AigcError, match="no linear layer"):
        quantize_model(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=100)), QuantConfig())


def test_quantize_on_load_equals_quantize_in_memory(tiny, store):
    for config in (QuantConfig(), QuantConfig(method="clip", group_size=64), FORMATS["w8a16"]):
        model = copy.deepcopy(tiny)
        quantize_model(model, config)
        loaded = AutoModelForCausalLM.from_pretrained(model_path("tiny", store), quantization_config=AigcConfig(**config.model_dump())).eval()
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_activations_than_bf16(tiny, dtype, tmp_path):
    model = copy.deepcopy(tiny)
    quantize_model(model, FORMATS["w8a16"])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert logits(loaded).dtype == dtype and loaded.model.layers[0].mlp.up_proj.weight_scale.dtype == torch.bfloat16
    assert (logits(loaded).float() - logits(model).float()).norm() < 0.03 * logits(model).float().norm()


def test_compiled_and_cached_decoding(tiny):
    model = copy.deepcopy(tiny)
    quantize_model(model, FORMATS["w4a16"], texts())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.inference_mode(): assert torch.allclose(compiled(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits, atol=0.05)
    long = torch.arange(3, 103)[None]                                                        # 100 rows go through the dequantized weight, one row through the kernel
    with torch.inference_mode(): whole, step = model(long).logits[:, -1], model(long[:, -1:], past_key_values=model(long[:, :-1], use_cache=True).past_key_values).logits[:, -1]
    assert (whole - step).norm() < 0.03 * whole.norm()


def test_without_the_plugin_the_remedy_is_named(tiny, tmp_path):
    model = copy.deepcopy(tiny)
    quantize_model(model, QuantConfig())
    model.save_pretrained(tmp_path)
    run = subprocess.run([sys.executable, "-c", f"from aigc.models.sources import load_model; load_model({str(tmp_path)!r})"], capture_output=True, text=True)
    assert "import aigc.quant.plugin" in run.stderr.splitlines()[-1]


# ---- GPTQ ---------------------------------------------------------------------------------------------------------------

def test_gptq_keeps_what_nearest_loses(tiny):
    "A light low-rank change of the weights: its effect on the logits survives GPTQ better than rounding to nearest."
    tuned, generator = copy.deepcopy(tiny), torch.Generator().manual_seed(0)
    for layer in tuned.model.layers:
        w = layer.mlp.up_proj.weight
        w += (0.02 * torch.randn(w.shape[0], 2, generator=generator) @ torch.randn(2, w.shape[1], generator=generator)).to(w.dtype)
    unseen = torch.tensor(texts(20)[16:])
    goal, left = tuned(unseen).logits.float(), {}
    for method in ("rtn", "gptq"):
        model = copy.deepcopy(tuned)
        quantize_model(model, QuantConfig(method=method), texts(16))
        left[method] = (model(unseen).logits.float() - goal).norm() / (tiny(unseen).logits.float() - goal).norm()
    assert left["gptq"] < 0.75 * left["rtn"] and left["gptq"] < 1


def test_broken_weights_are_named(tiny):
    model = copy.deepcopy(tiny)
    model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(AigcError, match="NaN"): quantize_model(model, QuantConfig())


# ---- the job ------------------------------------------------------------------------------------------------------------

def job(store: Store, **parameters):
    command = [sys.executable, "-m", "aigc", "run", "quantize", *(a for n, v in parameters.items() for a in ("--set", f"{n}={v}"))]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AIGC_RUN")} | {"AIGC_STORE": str(store.local), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=REPO)


@pytest.mark.slow
def test_the_job_checks_that_the_fine_tune_survived(store, tiny):
    "A change of the whole model survives; one far below the grid's step does not, the run fails with a sentence, and the store keeps nothing."
    _, tokenizer = load_model("tiny", store=store)
    for name, strength in (("clear", 0.1), ("faint", 0.0005)):
        tuned = copy.deepcopy(tiny)
        torch.manual_seed(0)
        for p in tuned.model.layers.parameters():
            if p.ndim == 2: p += (strength * torch.randn_like(p.float()) * p.float().std()).to(p.dtype)
        with store.writing("model", name) as folder: tuned.save_pretrained(folder); tokenizer.save_pretrained(folder)
    done = job(store, model="model/clear", base="tiny", out="clear", limit=12)
    assert done.returncode == 0, done.stdout + done.stderr
    made = store.get("model/clear-w4a16")
    assert made.metrics["share_of_bf16"] <= 0.32 and 0 < made.metrics["survival_ratio"] < 1 and made.metrics["kl_to_source"] < made.metrics["kl_to_base"]
    assert made.inputs[0] == store.get("model/clear").ref and made.parameters["group_size"] == 32
    assert load_model("model/clear-w8a16", store=store)[0].model.layers[0].mlp.up_proj.bits == 8
    refused = job(store, model="model/faint", base="tiny", out="faint", limit=12, method="rtn")
    assert refused.returncode == 3 and "did NOT survive" in refused.stdout + refused.stderr
    assert not [a for a in store.list("model") if a.name.startswith("faint-")]


def test_the_command_quantizes_a_folder(store, tmp_path):
    from aigc.models.tiny import make_tiny
    make_tiny(tmp_path/"mine", seed=3)
    run = subprocess.run([sys.executable, "-m", "aigc", "quantize", str(tmp_path/"mine"), "--method", "clip", "--limit", "4", "--questions", "0", "--json"], env=os.environ | {"AIGC_STORE": str(store.local)}, capture_output=True, text=True)
    said = json.loads(run.stdout)
    assert said["artifact"].startswith("model/mine-w4a16@") and said["metrics"]["share_of_bf16"] <= 0.32


@pytest.mark.slow
def test_the_default_model_in_three_minutes(store):
    "GPTQ over SmolLM2's 210 linear layers on two quiet cores, and a quarter of the bytes."
    model, tokenizer = load_model("smollm2-135m", store=store)
    source = Path(inspect.getsourcefile(json)).read_text()
    report = quantize_model(model, FORMATS["w4a16"], [tokenizer(source[i:i + 500]).input_ids for i in range(0, 64*150, 150)])
    assert report.share <= 0.32 and weight_bytes(model)[0] == report.bytes
    assert sum(report.errors) < 0.7*sum(report.nearest) and report.seconds < 180
