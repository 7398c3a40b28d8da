"""Checkpoints of others: synthetic AWQ, GPTQ, compressed-tensors and GGUF files, packed here by their own rules, bit by bit in Python integers; and files that mean harm."""
import json, os, subprocess, sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import aigc.quant.plugin  # noqa: F401  (registers the format)
from aigc.core.errors import AigcError
from aigc.quant.format import QuantConfig
from aigc.quant.exporters import compressed_tensors_config, export_compressed_tensors
from aigc.quant.importers import import_checkpoint, read_blocks
from aigc.quant.layers import quantized
from aigc.quant.methods import quantize_model

CONFIG = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False)
IDS = torch.arange(3, 40)[None]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad(): yield


def signed(word: int) -> int: return word - 2**32 if word >= 2**31 else word


def words(values, bits: int, order=None) -> torch.Tensor:
    "Integers `[R, C]` packed along the last axis, value `order[i]` of each word at position i; by Python's integers, not by our packer."
    per = 32 // bits
    order = order or range(per)
    return torch.tensor([[signed(sum(int(row[w + o]) << bits*i for i, o in enumerate(order) if w + o < len(row))) for w in range(0, len(row), per)] for row in values.tolist()], dtype=torch.int32)


def checkpoint(folder, quantization: dict, pack, bits: int = 4, group: int = 32, symmetric: bool = False, act_order: bool = False):
    "A random Llama whose linear layers are quantized; `pack(q, zeros, scales, g_idx)` makes the tensors of one. Returns the weights they stand for."
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(torch.bfloat16)
    model.save_pretrained(folder)
    tensors, dense = load_file(folder/"model.safetensors"), {}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        n, k = tensors.pop(name).shape
        q, size = torch.randint(0, 2**bits, (n, k)), k if group == -1 else group
        zeros = torch.full((n, k//size), 2**(bits - 1)) if symmetric else torch.randint(1, 2**bits, (n, k//size))
        scales = (torch.rand(n, k//size)/64 + 0.01).to(torch.bfloat16).to(torch.float16)        # numbers that both 16-bit kinds hold
        g_idx = (torch.randperm(k) if act_order else torch.arange(k))//size
        dense[name] = (q - zeros[:, g_idx]).float()*scales.float()[:, g_idx]
        tensors |= {f"{name.removesuffix('weight')}{part}": t.contiguous() for part, t in pack(q, zeros, scales, g_idx).items()}
    save_file(tensors, folder/"model.safetensors", metadata={"format": "pt"})
    said = json.loads((folder/"config.json").read_text())
    (folder/"config.json").write_text(json.dumps(said | {"quantization_config": quantization}))
    return dense


def awq(q, zeros, scales, g_idx): return dict(qweight=words(q.t(), 4, (0, 2, 4, 6, 1, 3, 5, 7)), qzeros=words(zeros.t(), 4, (0, 2, 4, 6, 1, 3, 5, 7)), scales=scales.t())
def gptq(version: int, bits: int = 4):
    def pack(q, zeros, scales, g_idx): return dict(qweight=words(q.t(), bits).new_tensor(words(q, bits).t().tolist()), qzeros=words(zeros.t() - int(version == 1), bits), scales=scales.t(), g_idx=g_idx.int())
    return pack
def packed(bits: int = 4, symmetric: bool = False, act_order: bool = False):
    def pack(q, zeros, scales, g_idx):
        found = dict(weight_packed=words(q, bits), weight_scale=scales, weight_shape=torch.tensor(q.shape))
        if not symmetric: found["weight_zero_point"] = words(zeros.t(), bits).t()
        if act_order: found["weight_g_idx"] = g_idx.int()
        return found
    return pack
def int8(q, zeros, scales, g_idx): return dict(weight=(q - 128).to(torch.int8), weight_scale=scales)
def said_ct(bits, symmetric, strategy="group", actorder=None, form="pack-quantized"):
    weights = dict(num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, group_size=32 if strategy == "group" else None, dynamic=False, actorder=actorder)
    return dict(quant_method="compressed-tensors", format=form, config_groups={"group_0": dict(targets=["Linear"], weights=weights)}, ignore=["lm_head"])


KINDS = {
    "awq": (dict(quant_method="awq", bits=4, group_size=32, zero_point=True, version="gemm"), awq, {}),
    "gptq-v1": (dict(quant_method="gptq", bits=4, group_size=32, sym=False, desc_act=False), gptq(1), {}),
    "gptq-v2": (dict(quant_method="gptq", bits=4, group_size=32, sym=False, checkpoint_format="gptq_v2"), gptq(2), {}),
    "gptq-sym": (dict(quant_method="gptq", bits=4, group_size=32, sym=True), gptq(1), dict(symmetric=True)),
    "gptq-act-order": (dict(quant_method="gptq", bits=4, group_size=32, sym=False, desc_act=True), gptq(1), dict(act_order=True)),
    "gptq-8": (dict(quant_method="gptq", bits=8, group_size=32, sym=False, checkpoint_format="gptq_v2"), gptq(2, 8), dict(bits=8)),
    "ct-w4a16": (said_ct(4, False), packed(), {}),
    "ct-w4a16-act-order": (said_ct(4, True, actorder="group"), packed(symmetric=True, act_order=True), dict(symmetric=True, act_order=True)),
    "ct-w8a16": (said_ct(8, True, "channel"), packed(8, True), dict(bits=8, group=-1, symmetric=True)),
    "ct-int8": (said_ct(8, True, "channel", form="int-quantized"), int8, dict(bits=8, group=-1, symmetric=True)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_others_checkpoints_mean_what_they_meant(kind, tmp_path):
    said, pack, how = KINDS[kind]
    dense = checkpoint(tmp_path/"theirs", said, pack, **how)
    config = import_checkpoint(tmp_path/"theirs", tmp_path/"ours")
    assert config.ignore == ("lm_head",) and config.act_order == ("act-order" in kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path/"ours", dtype=torch.bfloat16).eval()
    layers = dict(quantized(model))
    assert len(layers) == 7
    for name, layer in layers.items():
        assert torch.equal(layer.quant_tensor().dequantize(), dense[f"{name}.weight"]), name
        x = torch.randn(3, layer.in_features).bfloat16()                                        # packed, through the kernel
        exact = x.float() @ dense[f"{name}.weight"].t()
        assert (layer(x).float() - exact).norm() < 0.01*exact.norm(), name
    model.save_pretrained(tmp_path/"again")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path/"again", dtype=torch.bfloat16).eval()(IDS).logits, model(IDS).logits)


def harm(folder, name: str, change):
    tensors = load_file(folder/"model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder/"model.safetensors", metadata={"format": "pt"})


L = "model.layers.0.mlp.up_proj"
@pytest.mark.parametrize("kind,name,change,says", [
    ("gptq-act-order", f"{L}.g_idx", lambda t: t + 1, "there are 2"), ("gptq-act-order", f"{L}.g_idx", lambda t: t*0, "inputs"), ("gptq-act-order", f"{L}.g_idx", lambda t: t*10**6, "names group"),
    ("gptq-v1", f"{L}.g_idx", lambda t: t - 5, "names group -5"), ("ct-w4a16-act-order", f"{L}.weight_g_idx", lambda t: t + 7, "names group"),
    ("awq", f"{L}.qweight", lambda t: t[:-1], "shape"), ("awq", f"{L}.scales", lambda t: t*torch.nan, "NaN"), ("awq", f"{L}.qzeros", lambda t: t.float(), "dtype"),
    ("gptq-v1", f"{L}.qzeros", lambda t: t[:, :-1], "shape"), ("gptq-sym", f"{L}.qzeros", lambda t: t + 1, "sym"), ("ct-w4a16", f"{L}.weight_packed", lambda t: t[:5], "shape"),
    ("ct-w4a16", f"{L}.weight_shape", lambda t: t + 1, "says"), ("ct-int8", f"{L}.weight_scale", lambda t: t*torch.inf, "NaN or infinite"), ("awq", "model.norm.weight", lambda t: t*torch.nan, "NaN")])
def test_harm_is_refused_by_name(kind, name, change, says, tmp_path):
    said, pack, how = KINDS[kind]
    checkpoint(tmp_path/"theirs", said, pack, **how)
    harm(tmp_path/"theirs", name, change)
    with pytest.raises(AigcError, match=says) as refused: import_checkpoint(tmp_path/"theirs", tmp_path/"ours")
    assert refused.value.place == name and sorted(p.name for p in tmp_path.iterdir()) == ["theirs"]


@pytest.mark.parametrize("change,says", [(dict(bits=3), "3 bits"), (dict(group_size=48), "do not divide"), (dict(checkpoint_format="marlin"), "marlin"), (dict(quant_method="exl2"), "exl2")])
def test_configurations_are_refused(change, says, tmp_path):
    said, pack, how = KINDS["gptq-v1"]
    checkpoint(tmp_path/"theirs", said | change, pack, **how)
    with pytest.raises(AigcError, match=says): import_checkpoint(tmp_path/"theirs", tmp_path/"ours")


def test_a_file_cut_short_and_a_missing_tensor(tmp_path):
    said, pack, how = KINDS["awq"]
    checkpoint(tmp_path/"theirs", said, pack, **how)
    file = tmp_path/"theirs"/"model.safetensors"
    tensors = load_file(file)
    del tensors[f"{L}.scales"]
    save_file(tensors, file)
    with pytest.raises(AigcError, match="missing") as refused: import_checkpoint(tmp_path/"theirs", tmp_path/"ours")
    assert refused.value.place == f"{L}.scales"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(AigcError, match="cut short"): import_checkpoint(tmp_path/"theirs", tmp_path/"ours")


@pytest.mark.parametrize("part,change,says", [("weight_scale", lambda t: t*torch.nan, "NaN"), ("weight_g_idx", lambda t: t + 9, "names group")])
def test_our_own_format_is_checked_when_it_is_loaded(part, change, says, tmp_path):
    said, pack, how = KINDS["ct-w4a16-act-order"]
    checkpoint(tmp_path/"theirs", said, pack, **how)
    import_checkpoint(tmp_path/"theirs", tmp_path/"ours")
    harm(tmp_path/"ours", f"{L}.{part}", change)
    with pytest.raises(AigcError, match=says) as refused: AutoModelForCausalLM.from_pretrained(tmp_path/"ours")
    assert refused.value.place == f"{L}.{part}"


# ---- GGUF ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_gguf_blocks_against_the_gguf_library(kind):
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize
    weight = np.random.default_rng(0).normal(size=(16, 96)).astype(np.float32)
    data = quantize(weight, getattr(GGMLQuantizationType, kind))
    ours, theirs = read_blocks(torch.from_numpy(data), kind, 16, 96).dequantize(), torch.from_numpy(dequantize(data, getattr(GGMLQuantizationType, kind)))
    assert (ours - theirs).abs().max() < 0.006*theirs.abs().max()                               # the scale becomes bf16


# ---- out ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fields", [dict(), dict(bits=8, group_size=-1, symmetric=True), dict(symmetric=True, group_size=64)])
def test_compressed_tensors_unpacks_what_we_write(fields, tmp_path):
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(torch.bfloat16).eval()
    quantize_model(model, QuantConfig(**fields))
    model.save_pretrained(tmp_path/"ours")
    export_compressed_tensors(tmp_path/"ours", tmp_path/"out")
    said = json.loads((tmp_path/"out"/"config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(said).config_groups["group_0"]
    tensors = {k.removeprefix(f"{L}."): t for k, t in load_file(tmp_path/"out"/"model.safetensors").items() if k.startswith(L)}
    unpack = PackedQuantizationCompressor.decompress if hasattr(PackedQuantizationCompressor, "decompress") else None
    made = unpack(dict(tensors), scheme)
    weight = made["weight"] if isinstance(made, dict) else made
    assert torch.equal(weight.float(), model.get_submodule(L).dequantize().float())
    assert import_checkpoint(tmp_path/"out", tmp_path/"back").model_copy(update={"method": "rtn"}) == QuantConfig(**fields, ignore=("lm_head",))
    assert all(torch.equal(a, load_file(tmp_path/"back"/"model.safetensors")[n]) for n, a in load_file(tmp_path/"ours"/"model.safetensors").items())
    with pytest.raises(AigcError, match="integer zeros"): compressed_tensors_config(QuantConfig(float_zeros=True))


def test_the_commands(tmp_path):
    from aigc.models.tiny import make_tiny
    run = lambda *a: subprocess.run([sys.executable, "-m", "aigc", *map(str, a)], env=os.environ | {"AIGC_STORE": str(tmp_path/"store")}, capture_output=True, text=True)
    make_tiny(tmp_path/"mine", seed=3)
    assert run("quantize", tmp_path/"mine", "--method", "rtn", "--out", "small").returncode == 0
    done = run("export", "model/small", "--to", "compressed-tensors", "--out", tmp_path/"packed")
    assert done.returncode == 0 and json.loads((tmp_path/"packed"/"config.json").read_text())["quantization_config"]["format"] == "pack-quantized", done.stderr
    taken = run("quantize", tmp_path/"packed", "--out", "taken", "--json")
    assert taken.returncode == 0 and json.loads(taken.stdout)["artifact"].startswith("model/taken@"), taken.stderr
    done = run("export", "model/taken", "--out", tmp_path/"plain")
    assert done.returncode == 0 and isinstance(AutoModelForCausalLM.from_pretrained(tmp_path/"plain").model.layers[0].mlp.up_proj, torch.nn.Linear), done.stderr
    assert run("export", "model/taken", "--out", tmp_path/"plain").returncode == 2
