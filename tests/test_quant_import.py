"""Checkpoints of others: synthetic AWQ, GPTQ, compressed-tensors and GGUF files, packed here by their own rules, bit by bit in Python integers; and files that mean harm."""
import json

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


def checkpoint(folder, quantization: dict, pack, bits: int = 4, group: int = 32, symmetric: bool = False, act_order: bool = False, one_scale: bool = False):
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
        if one_scale: scales = scales[:1].expand(n, 1).contiguous()
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
def floats(q, zeros, scales, g_idx): return dict(weight=(q - zeros).float().to(torch.float8_e4m3fn), weight_scale=scales.float())
def said_ct(bits, symmetric, strategy="group", actorder=None, form="pack-quantized"):
    weights = dict(num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, group_size=32 if strategy == "group" else None, dynamic=False, actorder=actorder)
    return dict(quant_method="compressed-tensors", format=form, config_groups={"group_0": dict(targets=["Linear"], weights=weights)}, ignore=["lm_head"])

def said_fp8(strategy):
    groups = {"group_0": dict(targets=["Linear"], weights=dict(num_bits=8, type="float", symmetric=True, strategy=strategy, dynamic=False), input_activations=dict(num_bits=8, type="float", dynamic=True, strategy="token"))}
    return dict(quant_method="compressed-tensors", format="float-quantized", config_groups=groups, ignore=["lm_head"])


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
    "ct-fp8": (said_fp8("channel"), floats, dict(group=-1)),
    "ct-fp8-tensor": (said_fp8("tensor") | {"ignore": ["lm_head"]}, lambda q, zeros, scales, g_idx: floats(q, zeros, scales[:1, :1], g_idx), dict(group=-1, one_scale=True)),
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
    ("ct-w4a16", f"{L}.weight_shape", lambda t: t + 1, "says"), ("ct-int8", f"{L}.weight_scale", lambda t: t*torch.inf, "NaN or infinite"), ("ct-fp8", f"{L}.weight", lambda t: (t.float()*torch.nan).to(t.dtype), "NaN"), ("ct-fp8", f"{L}.weight_scale", lambda t: t[:-1], "shape"), ("awq", "model.norm.weight", lambda t: t*torch.nan, "NaN")])
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


def write_gguf(path, kind: str):
    "A small Llama as llama.cpp writes it (rows of q and k interleaved, a byte tokenizer), its linear layers in `kind`. Returns the model it was made from."
    import gguf
    from gguf.quants import quantize
    torch.manual_seed(0)
    config = LlamaConfig(**CONFIG | dict(vocab_size=259, tie_word_embeddings=True))
    model = LlamaForCausalLM(config)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64); writer.add_embedding_length(64); writer.add_block_count(1); writer.add_feed_forward_length(128); writer.add_vocab_size(259)
    writer.add_head_count(4); writer.add_head_count_kv(2); writer.add_rope_dimension_count(16); writer.add_layer_norm_rms_eps(config.rms_norm_eps); writer.add_rope_freq_base(10000.0)
    printable = [b for b in range(256) if chr(b).isprintable() and b not in (32, 160, 173)]
    letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in printable)}
    writer.add_tokenizer_model("gpt2"); writer.add_tokenizer_pre("smollm"); writer.add_token_list(["<s>", "</s>", *(letters[b] for b in range(256)), "ab"]); writer.add_token_merges(["a b"])
    writer.add_token_types([3, 3] + [1]*257); writer.add_bos_token_id(0); writer.add_eos_token_id(1)
    def rows(w, heads): return w.view(heads, 2, w.shape[0]//heads//2, w.shape[1]).transpose(1, 2).reshape(w.shape)
    names = {"self_attn.q_proj": ("attn_q", 4), "self_attn.k_proj": ("attn_k", 2), "self_attn.v_proj": ("attn_v", 0), "self_attn.o_proj": ("attn_output", 0), "mlp.gate_proj": ("ffn_gate", 0), "mlp.up_proj": ("ffn_up", 0), "mlp.down_proj": ("ffn_down", 0)}
    for ours, (theirs, heads) in names.items():
        w = model.get_submodule(f"model.layers.0.{ours}").weight
        form = getattr(gguf.GGMLQuantizationType, kind)
        writer.add_tensor(f"blk.0.{theirs}.weight", quantize((rows(w, heads) if heads else w).contiguous().numpy(), form), raw_dtype=form)
    for ours, theirs in (("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("model.layers.0.input_layernorm", "blk.0.attn_norm"), ("model.layers.0.post_attention_layernorm", "blk.0.ffn_norm")):
        writer.add_tensor(f"{theirs}.weight", model.get_submodule(ours).weight.numpy())
    writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
    return model


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_a_whole_gguf_file(kind, tmp_path):
    made = write_gguf(tmp_path/"small.gguf", kind)
    config = import_checkpoint(tmp_path/"small.gguf", tmp_path/"ours")
    assert (config.bits, config.float_zeros, config.symmetric) == (8 if kind == "Q8_0" else 4, kind == "Q4_1", kind != "Q4_1")
    model = AutoModelForCausalLM.from_pretrained(tmp_path/"ours").eval()
    layers = dict(quantized(model))
    assert len(layers) == 7
    for name, layer in layers.items():                                                          # rows of q and k are back in their places: the weights are those the file was made from
        w = made.get_submodule(name).weight
        assert (layer.dequantize().float() - w).norm() < (0.01 if kind == "Q8_0" else 0.12)*w.norm(), name
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf", dtype=torch.float32).eval()
    exact = theirs(IDS).logits
    assert (model(IDS).logits.float() - exact).norm() < 0.02*exact.norm()                       # bf16 against fp32, the same numbers
    data = (tmp_path/"small.gguf").read_bytes()
    (tmp_path/"cut.gguf").write_bytes(data[:len(data)//2])
    with pytest.raises(AigcError, match="no whole GGUF"): import_checkpoint(tmp_path/"cut.gguf", tmp_path/"none")


@pytest.mark.slow
def test_the_default_models_own_file(tmp_path):
    "The Q4_1 file that the default model comes from, packed as it is, beside what transformers makes of it."
    from aigc.core.settings import settings
    from aigc.core.store import Store
    from aigc.models.sources import GGUF, load_model
    plain, tokenizer = load_model("smollm2-135m", store=Store(tmp_path/"store"), device="cpu")
    import_checkpoint(f"{settings().cache}/smollm2-135m/{GGUF}", tmp_path/"ours")
    packed, _ = load_model(tmp_path/"ours", device="cpu")
    assert len(list(quantized(packed))) == 210
    ids = torch.tensor([tokenizer("The capital of France is Paris. " * 8).input_ids])
    a, b = (m(ids).logits.float().log_softmax(-1) for m in (packed, plain))
    kl = (a.exp()*(a - b)).sum(-1).mean().item()
    print(f"\n  KL of the packed file to its dequantized form: {kl:.5f}")
    assert kl < 0.01 and (a.argmax(-1) == b.argmax(-1)).float().mean() > 0.95


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


def test_the_commands(tmp_path, monkeypatch):
    from aigc.cli.export import Target, export_command
    from aigc.cli.quantize import Format, Method, quantize_command
    from aigc.core.errors import GateError, UsageError
    from aigc.core.store import Store
    from aigc.models.tiny import make_tiny
    monkeypatch.setenv("AIGC_STORE", str(tmp_path/"store"))
    monkeypatch.setenv("AIGC_CACHE", str(tmp_path/"cache"))
    make_tiny(tmp_path/"mine", seed=3)
    quantize_command(str(tmp_path/"mine"), method=Method.rtn, out="small", questions=0)
    export_command("model/small", to=Target.compressed_tensors, out=str(tmp_path/"packed"))
    assert json.loads((tmp_path/"packed"/"config.json").read_text())["quantization_config"]["format"] == "pack-quantized"
    quantize_command(str(tmp_path/"packed"), out="taken")
    export_command("model/taken", out=str(tmp_path/"plain"))
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path/"plain").model.layers[0].mlp.up_proj, torch.nn.Linear)
    with pytest.raises(UsageError, match="exists"): export_command("model/taken", out=str(tmp_path/"plain"))
    quantize_command(str(tmp_path/"mine"), format=Format.fp8, out="floats", questions=4, max_kl=0.05)         # the drift is measured, and small enough
    assert 0 < Store().get("model/floats").metrics["kl_to_source"] < 0.05
    with pytest.raises(GateError, match="mean KL") as refused: quantize_command(str(tmp_path/"mine"), method=Method.rtn, out="worse", questions=4, max_kl=1e-6)
    with pytest.raises(UsageError, match="no questions"): quantize_command(str(tmp_path/"mine"), questions=0, max_kl=1.0)
    assert refused.value.exit_code == 3 and not [m for m in Store().list("model") if m.name == "worse"]
    assert not list((tmp_path/"cache"/"quantize").glob("*"))                                     # and no half-finished blocks are left
