"""Kernels without a GPU: exact in Triton's interpreter, sound as sm_90 machine code, and correct operators on the CPU. With one (`-m gpu`): exact, deterministic, captured.

Triton decides at import whether it interprets or compiles, so the two ways run this file as a program, each in a process of its own."""
import json, os, subprocess, sys
from importlib.util import find_spec

import pytest
import torch
from conftest import REPO, missing

from aigc_kernels.ops import w4_layout, w4a16_mm, w8_layout, w8a16_mm
from aigc_kernels.packing import blocks_layout, cpu_int4_fits, dequantize, dequantize_packed, pack_blocks, pack_int32, pack_zeros, unpack_blocks, unpack_int32, unpack_zeros


def weight(n: int, k: int, group: int, seed: int = 0, power_of_two: bool = False):
    "Random integers, scales and zeros of an `[n, k]` weight."
    g = torch.Generator().manual_seed(seed)
    scales = 2.0 ** torch.randint(-6, -2, (n, k//group), generator=g) if power_of_two else (torch.rand(n, k//group, generator=g) + 0.1).bfloat16()
    return torch.randint(0, 16, (n, k), generator=g), scales, torch.randint(0, 16, (n, k//group), generator=g)


def relative(y, exact) -> float: return ((y.double() - exact).abs().max() / exact.abs().max()).item()


# ---- in the interpreter -------------------------------------------------------------------------------------------------

def interpret() -> None:
    "Runs with TRITON_INTERPRET=1 and prints one JSON line per finding."
    from aigc_kernels.launch import Launch
    from aigc_kernels.w4a16 import w4a16
    for group, n, k in ((32, 50, 160), (64, 33, 192), (128, 16, 256), (256, 40, 512), (96, 24, 288), (100, 20, 100)):    # N beside every tile, K padded to 128; the last has one scale per output
        q, scales, zeros = weight(n, k, group, power_of_two=True)
        for dtype in (torch.float16, torch.bfloat16):
            y = w4a16(torch.eye(k, dtype=dtype), *blocks_layout(q, scales, zeros, group), Launch(32, 32, 2))
            assert torch.equal(y.t().float(), dequantize(q, scales, zeros)), (group, dtype)
        print(json.dumps(dict(what="identity", group=group)))
    q, scales, zeros = weight(70, 576, 32)
    layout, rows = blocks_layout(q, scales, zeros, 32), torch.randn(64, 576, generator=torch.Generator().manual_seed(1))
    for dtype, tolerance in ((torch.float16, 6e-4), (torch.bfloat16, 4e-3)):                                  # half a unit in the last place of the output
        x = rows.to(dtype)
        exact = x.double() @ dequantize(q, scales, zeros).double().t()
        first = w4a16(x[:1], *layout, out_dtype=torch.float32)[0]
        for m in (1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 64):
            y = w4a16(x[:m], *layout, out_dtype=torch.float32)
            assert relative(y.to(dtype), exact[:m]) < tolerance, (m, dtype)
            assert torch.equal(y[0], first), m                                                                # the row's result does not depend on its company
        assert torch.equal(w4a16(x, *layout, out_dtype=torch.float32), y)                                     # nor on the day
        wide = torch.zeros(64, 600, dtype=dtype); wide[:, :576] = x
        assert torch.equal(w4a16(wide[:, :576], *layout, out_dtype=torch.float32), y)                         # rows further apart
        print(json.dumps(dict(what="rows", dtype=str(dtype), error=relative(y, exact))))
    for split in (1, 2, 4, 5):                                                                                # more parts than blocks is fine, too
        assert relative(w4a16(x[:3], *layout, Launch(16, 64, split)), x[:3].double() @ dequantize(q, scales, zeros).double().t()) < 4e-3
    print(json.dumps(dict(what="split")))


def properties() -> None:
    "Any shape, group, dtype and kind of zero against float64, before the output is rounded. Runs with TRITON_INTERPRET=1."
    from hypothesis import HealthCheck, Phase, given, settings, strategies as st
    from aigc_kernels.dequant import dequantize_blocks
    from aigc_kernels.w4a16 import w4a16
    from aigc_kernels.w8a16 import w8a16
    worst = {}

    def off(y, x, dense) -> float:
        "The error over the largest output; where the outputs are few, over what the largest of many would be: twice what a sum of this length comes to when its signs are random."
        exact = x.double() @ dense.t()
        return ((y.double() - exact).abs().max() / torch.maximum(exact.abs().max(), 2 * (x.double().abs() @ dense.abs().t()).max() / x.shape[1]**0.5)).item()

    @settings(max_examples=int(os.environ.get("AIGC_EXAMPLES", 25)), deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate))
    @given(m=st.integers(1, 70), n=st.integers(1, 150), groups=st.integers(1, 6), group=st.sampled_from([32, 64, 96, 128, 160, 256, -1]), width=st.integers(1, 300),
           dtype=st.sampled_from([torch.float16, torch.bfloat16]), zero=st.sampled_from(["none", "integer", "float"]), scale=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), seed=st.integers(0, 2**16))
    def four_bits(m, n, groups, group, width, dtype, zero, scale, seed):
        g = torch.Generator().manual_seed(seed)
        k, groups = (width, 1) if group == -1 else (group*groups, groups)
        q, scales = torch.randint(0, 16, (n, k), generator=g), (torch.rand(n, groups, generator=g) + 0.05).to(scale)
        zeros = {"none": None, "integer": torch.randint(0, 16, (n, groups), generator=g), "float": 15*torch.rand(n, groups, generator=g)}[zero]
        x = torch.randn(m, k, generator=g).to(dtype)
        layout = blocks_layout(q, scales, zeros, k if group == -1 else group)
        middle = 8.0 if zeros is None else zeros.double()[..., None]
        dense = ((q.view(n, groups, -1).double() - middle) * scales.double()[..., None]).view(n, k)
        error = off(w4a16(x, *layout, out_dtype=torch.float32), x, dense)
        worst[dtype] = max(worst.get(dtype, 0), error)
        assert error < 5e-5, error
        assert torch.allclose(dequantize_blocks(*layout, k, torch.float32).double(), dense, atol=1e-5, rtol=1e-6)

    @settings(max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate))
    @given(m=st.integers(1, 40), n=st.integers(1, 150), k=st.integers(1, 400), group=st.sampled_from([0, 32, 64, 128]), dtype=st.sampled_from([torch.float16, torch.bfloat16]), integers=st.booleans(), seed=st.integers(0, 2**16))
    def eight_bits(m, n, k, group, dtype, integers, seed):
        g = torch.Generator().manual_seed(seed)
        if group: k = -(-k//group)*group
        w, scales = torch.randint(-128, 128, (n, k), generator=g).to(torch.int8) if integers else (100*torch.randn(n, k, generator=g)).clamp(-448, 448).to(torch.float8_e4m3fn), (torch.rand(k//group if group else 1, n, generator=g) + 0.05).bfloat16()
        x = torch.randn(m, k, generator=g).to(dtype)
        dense = (w.double().view(n, len(scales), -1) * scales.t().double()[..., None]).view(n, k)
        error = off(w8a16(x, w, scales, out_dtype=torch.float32), x, dense)
        assert error < 5e-5, error

    four_bits(); eight_bits()
    print(json.dumps({str(d)[6:]: e for d, e in worst.items()}))


def compile_all() -> None:
    "Compiles every shipped launch for its capability and prints one JSON line per kernel."
    from aigc_kernels.aot import compile_attention, compile_dequant, compile_w4a16, compile_w8a16, shipped
    from aigc_kernels.launch import Launch
    import triton
    everything = os.environ.get("AIGC_COMPILE") == "all"
    print(json.dumps(dict(triton=triton.__version__)))
    for arch, group, launch in shipped():
        for dtype in (torch.bfloat16, torch.float16) if everything or (arch == 90 and launch.block_m == 16) else (torch.bfloat16,):
            if not everything and arch != 90 and group == 64: continue
            for columns in (4096, 4000) if everything else (4096,):
                r = compile_w4a16(launch, group, dtype, arch=arch, columns=columns)
                print(json.dumps(dict(arch=arch, launch=launch, group=group, dtype=str(dtype)[6:], registers=r.registers, stack=r.stack, shared=r.shared, tensor_cores=r.tensor_cores, per_weight=round(r.per_weight, 2), problems=r.problems())))
    assert compile_w4a16(Launch(64, 128, 1), 32).problems()                                                   # the gate does say no: this one spills
    def say(kernel, r, product=True, **more): print(json.dumps(dict(kernel=kernel, arch=r.arch, registers=r.registers, stack=r.stack, shared=r.shared, tensor_cores=r.tensor_cores, per_weight=round(r.per_weight, 2), problems=r.problems(product), **more)))
    for arch, size, group, cap in ((90, 64, 3, False), (90, 128, 4, True), (90, 256, 2, False), (80, 64, 3, False), (89, 128, 4, False)):
        say("attention", compile_attention(size, group, soft_cap=cap, arch=arch), size=size)
    for arch in (80, 89, 90):
        for launch in sorted({launch for a, group, launch in shipped() if a == arch and group == 128}):           # the launches that `find_launch` gives this product
            if not everything and arch != 90 and launch.block_m != 16: continue
            for group in (0, 32, 64, 128) if everything else (0,): say("w8a16", compile_w8a16(launch, group, arch=arch), launch=launch, group=group)
            if arch > 80 and (everything or launch.block_m == 16): say("fp8", compile_w8a16(launch, 0, arch=arch, fp8=True), launch=launch)
        for group in (32, 64, 128) if everything else (128,): say("dequant", compile_dequant(group, arch=arch), product=False, group=group)
    print(json.dumps(dict(interleaved=compile_interleaved())))


def compile_interleaved() -> float:
    "Instructions per weight of the usual kernel (as in vLLM's): words along N, three interleaves, shifts, zero and scale in the loop. The counter must see how much more it does."
    import triton
    import triton.language as tl
    from aigc_kernels.aot import compile_for, report

    @triton.jit
    def usual(x, weight, zeros, scales, y, K, N, BN: tl.constexpr, G: tl.constexpr):
        columns, words = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(0) * (BN // 8) + tl.arange(0, BN // 8)
        shifts = (tl.arange(0, 8) * 4)[None, :].broadcast_to(BN // 8, 8).reshape(BN)
        total = tl.full((16, BN), 0., tl.float32)
        ok = columns < N
        for k in range(0, K, 32):
            ks = k + tl.arange(0, 32)
            a = tl.load(x + tl.arange(0, 16)[:, None] * K + ks[None, :], mask=(ks < K)[None, :], other=0.)
            q = tl.load(weight + ks[:, None] * (N // 8) + words[None, :], mask=(ks < K)[:, None] & (words < N // 8)[None, :], other=0)
            q = tl.interleave(q, q); q = tl.interleave(q, q); q = tl.interleave(q, q)
            zero = tl.load(zeros + (k // G) * (N // 8) + words[None, :], mask=(words < N // 8)[None, :], other=0)
            zero = tl.interleave(zero, zero); zero = tl.interleave(zero, zero); zero = tl.interleave(zero, zero)
            scale = tl.load(scales + (k // G) * N + columns, mask=ok, other=0.)
            q, zero = (q >> shifts[None, :]) & 15, (zero >> shifts[None, :]) & 15
            total = tl.dot(a, ((q - zero) * scale[None, :]).to(tl.bfloat16), total)
        tl.store(y + tl.arange(0, 16)[:, None] * N + columns[None, :], total)

    kernel = compile_for(usual, dict(x="*bf16", weight="*i32", zeros="*i32", scales="*bf16", y="*fp32", K="i32", N="i32"), dict(BN=128, G=128), warps=4, stages=3, divisible=("K", "N"))
    return report(kernel, arch=90, weights_per_thread=32 * 128 / 128).per_weight


def as_program(mode: str) -> list[dict]:
    if find_spec("triton") is None: missing("triton")
    run = subprocess.run([sys.executable, __file__, mode], env={**os.environ, "TRITON_INTERPRET": str(int(mode != "compile"))}, capture_output=True, text=True, cwd=REPO/"tests")
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_interpreted_kernel_is_exact():
    found = as_program("interpret")
    assert [f["group"] for f in found if f["what"] == "identity"] == [32, 64, 128, 256, 96, 100]
    assert {f["what"] for f in found} == {"identity", "rows", "split"}


def test_any_shape_against_float64(capsys):
    found, = as_program("properties")
    with capsys.disabled(): print(f"\n  w4a16, worst error over the largest output: {found}")
    assert set(found) == {"float16", "bfloat16"}


def test_machine_code(capsys):
    _, *found, counter = as_program("compile")
    others = [f for f in found if "kernel" in f]
    found = [f for f in found if "kernel" not in f]
    assert {(f["kernel"], f["arch"]) for f in others} == {(k, a) for k in ("attention", "w8a16", "dequant", "fp8") for a in (80, 89, 90)} - {("fp8", 80)} and {f["size"] for f in others if "size" in f} == {64, 128, 256}
    for f in others: assert f["problems"] == [] and f["stack"] == 0, f
    assert all(f["per_weight"] <= 6.9 for f in others if f["kernel"] in ("w8a16", "fp8") and f["arch"] == 90 and f["launch"][0] == 16)   # a byte takes twice as long to come as four bits
    with capsys.disabled():
        print()
        for f in others: print(f"  {f['kernel']} sm_{f['arch']} {f.get('launch') or f.get('size') or ''} {f.get('group', '')}: {f['per_weight']} instructions per weight, {f['registers']} registers, {f['shared']} bytes shared, {'+'.join(f['tensor_cores'])}")
        for f in found: print(f"  w4a16 sm_{f['arch']} {f['launch']} group {f['group']} {f['dtype']}: {f['per_weight']} instructions per weight, {f['registers']} registers, {f['shared']} bytes shared, {'+'.join(f['tensor_cores'])}")
    for f in found: assert f["problems"] == [] and f["stack"] == 0 and f["registers"] <= 255, f
    assert {f["arch"] for f in found} == {80, 89, 90} and {f["group"] for f in found} == {32, 64, 128}
    assert all(f["per_weight"] <= 3.7 for f in found if f["arch"] == 90 and f["group"] == 128)   # what an H200 can issue while memory delivers
    assert counter["interleaved"] >= 8, counter
    assert any("HGMMA" in f["tensor_cores"] for f in found)


# ---- layouts and operators on the CPU -----------------------------------------------------------------------------------

def test_packing_is_that_of_compressed_tensors():
    "Words that compressed-tensors 0.20 made of the same numbers."
    for bits, q_words, zero_words in EXPECTED:
        q, z = torch.arange(60).view(3, 20)*37 % 2**bits, torch.arange(20).view(10, 2)*29 % 2**bits
        assert pack_int32(q, bits).tolist() == q_words and pack_zeros(z, bits).tolist() == zero_words
        assert unpack_int32(pack_int32(q, bits), bits, 20).tolist() == q.tolist() and unpack_zeros(pack_zeros(z, bits), bits, 10).tolist() == z.tolist()


EXPECTED = [  # bits, weight_packed, weight_zero_point
    (4, [[1049950800, -1239649576, 64080], [1926774420, -95373796, 16020], [-1239649576, 1049950800, 29400]], [[1814619296, 972403069], [160, 125]]),
    (8, [[1867130112, 64928148, -1754116824, 721871292, -1080396464], [1395526116, -406676104, 2069246220, 267044256, -1552000716],
         [923987400, -878280356, 1597642224, -204559996, -2023604968]], [[-1368114688, -879667427], [-1772346648, -1283899643], [2768, 10221]])]


@pytest.mark.parametrize("n,k", [(1, 1), (7, 33), (16, 128), (50, 576), (3, 300)])
def test_layouts_invert(n, k):
    q = torch.randint(0, 16, (n, k), generator=torch.Generator().manual_seed(n))
    assert torch.equal(unpack_blocks(pack_blocks(q), k), q.to(torch.uint8)) and pack_blocks(q).shape == (-(-k//128), n, 16)
    assert torch.equal(unpack_int32(pack_int32(q, 4), 4, k), q.to(torch.uint8))


@pytest.mark.parametrize("n,k,group", [(64, 96, 32), (48, 256, 64), (16, 512, 256), (60, 96, 32), (64, 96, 48), (17, 40, 8), (8, 640, 640)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_w4_on_cpu(n, k, group, dtype):
    q, scales, zeros = weight(n, k, group)
    layout = w4_layout(q, scales, zeros, group)
    assert layout[0].is_floating_point() != cpu_int4_fits(n, k, group)
    for m in (1, 17):
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
        y = w4a16_mm(x, *layout, group)
        assert y.dtype == dtype and relative(y, x.double() @ dequantize(q, scales, zeros).double().t()) < 0.01
    packed = dequantize_packed(pack_int32(q, 4), scales, pack_zeros(zeros, 4), bits=4, columns=k)
    assert torch.equal(packed, dequantize(q, scales, zeros, dtype=torch.bfloat16))


@pytest.mark.parametrize("groups", [1, 3])
def test_w8_on_cpu(groups):
    q, scales = torch.randint(0, 256, (40, 96)), (torch.rand(40, groups) + 0.1).bfloat16()
    for m in (1, 17):
        x = torch.randn(m, 96).bfloat16()
        assert relative(w8a16_mm(x, *w8_layout(q, scales)), x.double() @ dequantize(q, scales, bits=8).double().t()) < 0.01


@pytest.mark.parametrize("rows", [1, 5])
def test_operators_keep_torchs_contract(rows):
    import aigc_kernels.attention  # noqa: F401  (registers the operator)
    q, scales, zeros = weight(64, 96, 32)
    x = torch.randn(rows, 96).bfloat16()
    torch.library.opcheck(torch.ops.aigc.w4a16_mm.default, (x, *w4_layout(q, scales, zeros, 32), 32))
    torch.library.opcheck(torch.ops.aigc.w4a16_mm.default, (x, dequantize(q, scales, zeros, dtype=torch.bfloat16), scales.new_empty(0), 32))
    torch.library.opcheck(torch.ops.aigc.w8a16_mm.default, (x, *w8_layout(q, scales[:, :1])))
    torch.library.opcheck(torch.ops.aigc.w8a16_mm.default, (x, *w8_layout(q.float().to(torch.float8_e4m3fn), scales)), test_utils=("test_autograd_registration", "test_faketensor"))  # the others compare inputs, and torch cannot compare float8
    caches, table, lengths = [torch.randn(6, 4, 2, 16).bfloat16() for _ in range(2)], torch.tensor([[0, 2], [5, 1]], dtype=torch.int32), torch.tensor([3, 8], dtype=torch.int32)
    torch.library.opcheck(torch.ops.aigc.paged_attention.default, (torch.randn(2, 4, 16).bfloat16(), *caches, table, lengths, 0.25, 5, 2.0))


def test_every_operator_is_one_graph():
    "`fullgraph=True` over all of them, and the same numbers as without."
    from aigc_kernels.attention import paged_attention
    q, scales, zeros = weight(64, 96, 32)
    four, eight, floats = w4_layout(q, scales, zeros, 32), w8_layout(q, scales[:, :1]), w8_layout(q.float().to(torch.float8_e4m3fn), scales[:, :1])
    caches, table, lengths = [torch.randn(6, 4, 4, 16).bfloat16() for _ in range(2)], torch.tensor([[0, 2], [5, 1]], dtype=torch.int32), torch.tensor([3, 8], dtype=torch.int32)
    def step(x):
        y = w4a16_mm(x, *four, 32) + w8a16_mm(x, *eight) + w8a16_mm(x, *floats)
        return paged_attention(y.view(2, 4, 16), *caches, table, lengths, 0.25).view(2, 64) + y
    x = torch.randn(2, 96).bfloat16()
    torch._dynamo.reset()
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(x), step(x))


def test_arguments_are_looked_at_before_any_kernel_runs():
    from aigc_kernels.attention import paged_attention
    q, scales, zeros = weight(64, 96, 32)
    layout, x = w4_layout(q, scales, zeros, 32), torch.randn(2, 96).bfloat16()
    eight, caches = w8_layout(q, scales[:, :1]), [torch.randn(6, 4, 2, 16) for _ in range(2)]
    ask, table, lengths = torch.randn(2, 4, 16), torch.tensor([[0, 2], [5, 1]], dtype=torch.int32), torch.tensor([3, 8], dtype=torch.int32)
    for says, call in (("x has 95", lambda: w4a16_mm(x[:, :95], *layout, 32)), ("x has 3 dim", lambda: w4a16_mm(x[None], *layout, 32)), ("x is torch.int32", lambda: w4a16_mm(x.int(), *layout, 32)), ("group_size", lambda: w4a16_mm(x, *layout, 48)),
                       ("scales are", lambda: w4a16_mm(x, layout[0], layout[1][:, :9], 32)), ("contiguous", lambda: w4a16_mm(x, layout[0].t().contiguous().t(), layout[1], 32)), ("q should hold", lambda: w4_layout(q + 9, scales, zeros, 32)),
                       ("scales are", lambda: w4_layout(q, scales[:, :1], zeros[:, :1], 32)), ("scales are", lambda: w8a16_mm(x, eight[0], eight[1][:, :9])), ("weight is", lambda: w8a16_mm(x, eight[0].int(), eight[1])), ("q should hold", lambda: w8_layout(q.int() - 99, scales[:, :1])),
                       ("names a block", lambda: paged_attention(ask, *caches, table + 5, lengths, 0.25)), ("lengths go", lambda: paged_attention(ask, *caches, table, lengths + 1, 0.25)), ("block_table is", lambda: paged_attention(ask, *caches, table.long(), lengths, 0.25)),
                       ("q has 3 heads", lambda: paged_attention(ask[:, :3], *caches, table, lengths, 0.25)), ("window", lambda: paged_attention(ask, *caches, table, lengths, 0.25, -1))):
        with pytest.raises(ValueError, match=says): call()


def test_fake_kernel_knows_both_layouts():
    from torch._subclasses.fake_tensor import FakeTensorMode
    q, scales, zeros = weight(50, 160, 32)
    blocks = blocks_layout(q, scales, zeros, 32)
    with FakeTensorMode() as mode: assert w4a16_mm(mode.from_tensor(torch.empty(3, 160)), *map(mode.from_tensor, blocks), 32).shape == (3, 50)


def test_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; import aigc_kernels.packing, aigc_kernels.ops; assert not any(m.startswith('aigc.') for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- on a GPU -----------------------------------------------------------------------------------------------------------

@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_on_cuda(group, dtype):
    if not torch.cuda.is_available(): missing("a CUDA device")
    q, scales, zeros = (t.cuda() for t in weight(2000, 4096, group))
    layout, x = w4_layout(q, scales, zeros, group), torch.randn(300, 4096, device="cuda", dtype=dtype)
    exact = x.double() @ dequantize(q, scales, zeros).double().t()
    first = w4a16_mm(x[:1], *layout, group)
    for m in (1, 2, 16, 17, 33, 64, 300):
        y = w4a16_mm(x[:m], *layout, group)
        assert relative(y, exact[:m]) < (2e-3 if dtype == torch.float16 else 5e-3)
        if m <= 64: assert torch.equal(y[:1], first)
    assert all(torch.equal(w4a16_mm(x, *layout, group), y) for _ in range(20))
    graph, still = torch.cuda.CUDAGraph(), x[:4].clone()
    with torch.cuda.graph(graph): out = w4a16_mm(still, *layout, group)
    graph.replay()
    assert torch.equal(out, w4a16_mm(still, *layout, group))


if __name__ == "__main__": {"interpret": interpret, "properties": properties, "compile": compile_all}[sys.argv[1]]()
