#!/usr/bin/env python3
"""One command on a machine with a GPU: is every kernel right, and how fast is it beside the physical limit, cuBLAS, GemLite and torchao?

    python kernels/bench/gpu.py [--quick] [--out kernels/bench/results]

Needs torch and triton only (GemLite, torchao and matplotlib take part where they can be imported). Timing: CUDA graphs, another weight for every call so that none is in the L2 cache, the median of many and the spread.
Writes RESULTS/DEVICE.json (device, versions, commit, every figure) and RESULTS/DEVICE.svg (the roofline), and prints one JSON line last."""
import argparse, json, subprocess, sys, time
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 128256))  # K, N of Llama-3-8B
ROWS = (1, 4, 16, 64, 128, 256, 512, 1024, 4096)
BANDWIDTH = {"H200": 4.3e12, "H100": 3.0e12, "A100": 1.8e12}           # bytes a second that a copy reaches; others are measured


def random_weight(n: int, k: int, group: int, seed: int = 0):
    g = torch.Generator("cuda").manual_seed(seed)
    return (torch.randint(0, 16, (n, k), generator=g, device="cuda", dtype=torch.uint8), (torch.rand(n, k // group, generator=g, device="cuda") / 50 + 0.01).bfloat16(),
            torch.randint(0, 16, (n, k // group), generator=g, device="cuda", dtype=torch.uint8))


def check_products() -> dict:
    "Every group, both dtypes, ragged shapes, against float64; row 0 in any company; a hundred repetitions."
    from aigc_kernels.ops import w4_layout, w4a16_mm, w8_layout, w8a16_mm
    from aigc_kernels.packing import dequantize
    worst = {}
    for group in (32, 64, 128, 256, -1):
        for n, k in ((2000, 4096), (70, 1536), (33, 768)):
            size = k if group == -1 else group
            q, scales, zeros = random_weight(n, k, size)
            layout, dense = w4_layout(q, scales, zeros, size), dequantize(q, scales, zeros).double()
            for dtype in (torch.float16, torch.bfloat16):
                x = torch.randn(300, k, device="cuda", dtype=dtype)
                exact, first = x.double() @ dense.t(), None
                for m in (1, 2, 16, 17, 33, 64, 300):
                    y = w4a16_mm(x[:m], *layout, size)
                    error = ((y.double() - exact[:m]).abs().max() / exact[:m].abs().max()).item()
                    worst[str(dtype)[6:]] = max(worst.get(str(dtype)[6:], 0), error)
                    assert error < (2e-3 if dtype == torch.float16 else 8e-3), ("w4a16", group, n, k, m, dtype, error)
                    if m <= 64:
                        first = y[0] if first is None else first
                        assert torch.equal(y[0], first), ("the row depends on its company", group, n, k, m)
                assert all(torch.equal(w4a16_mm(x[:4], *layout, size), w4a16_mm(x[:4], *layout, size)) for _ in range(100))
    q8, s8 = torch.randint(0, 256, (500, 1024), device="cuda", dtype=torch.uint8), torch.rand(500, 8, device="cuda").bfloat16()
    for scales in (s8[:, :1].contiguous(), s8):
        x = torch.randn(40, 1024, device="cuda").bfloat16()
        exact = x.double() @ dequantize(q8, scales, bits=8).double().t()
        error = ((w8a16_mm(x, *w8_layout(q8, scales)).double() - exact).abs().max() / exact.abs().max()).item()
        worst["w8a16"] = max(worst.get("w8a16", 0), error)
        assert error < 8e-3, ("w8a16", error)
    return worst


def check_operators() -> list[str]:
    "Every operator on this device: torch's contract, one graph for the compiler, and captured into a CUDA graph that gives the same bits when it is replayed on other inputs."
    from aigc_kernels.attention import paged_attention
    from aigc_kernels.ops import w4_layout, w4a16_mm, w8_layout, w8a16_mm
    q, scales, zeros = random_weight(512, 1024, 128)
    q8 = torch.randint(0, 256, (512, 1024), device="cuda", dtype=torch.uint8)
    caches = [torch.randn(64, 16, 2, 64, device="cuda").bfloat16() for _ in range(2)]
    table, lengths = torch.randperm(64, device="cuda").view(4, 16).int(), torch.tensor([1, 17, 200, 256], dtype=torch.int32, device="cuda")
    eight = [w8_layout(q8, scales[:, :1].contiguous())] + ([w8_layout(torch.randn(512, 1024, device="cuda").to(torch.float8_e4m3fn), scales[:, :1].contiguous())] if torch.cuda.get_device_capability() >= (8, 9) else [])
    four = w4_layout(q, scales, zeros, 128)
    calls = {"w4a16_mm": (lambda x: w4a16_mm(x, *four, 128), four, 128), "paged_attention": (lambda x: paged_attention(x.view(4, 4, 64), *caches, table, lengths, 0.125), (*caches, table, lengths), 0.125)}
    calls |= {f"w8a16_mm {w[0].dtype}": (lambda x, w=w: w8a16_mm(x, *w), w, None) for w in eight}
    for name, (call, tensors, last) in calls.items():
        x = torch.randn(4, 256 if "attention" in name else 1024, device="cuda").bfloat16()
        if "float8" not in name: torch.library.opcheck(getattr(torch.ops.aigc, name.split()[0]).default, (x.view(4, 4, 64) if "attention" in name else x, *tensors, *([] if last is None else [last])), test_utils=("test_schema", "test_faketensor"))
        assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x)), name
        still, graph = x.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph): out = call(still)
        for seed in range(3):
            still.copy_(torch.randn(still.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)))
            graph.replay()
            assert torch.equal(out, call(still)), (name, "captured")
    return list(calls)


def check_attention() -> float:
    from aigc_kernels.attention import _on_cpu, paged_attention
    worst = 0.0
    for heads, kv_heads, size, window, cap in ((32, 8, 128, 0, 0.0), (9, 3, 64, 0, 0.0), (8, 4, 256, 100, 30.0), (8, 8, 80, 65, 0.0)):
        lengths = torch.tensor([1, 17, 300, 0, 2000], dtype=torch.int32, device="cuda")
        blocks = 5 * 128
        keys, values = (torch.randn(blocks, 16, kv_heads, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        table, q = torch.randperm(blocks, device="cuda").view(5, -1).int(), torch.randn(5, heads, size, device="cuda", dtype=torch.bfloat16)
        y = paged_attention(q, keys, values, table, lengths, size**-0.5, window, cap)
        exact = _on_cpu(q.float().cpu(), keys.float().cpu(), values.float().cpu(), table.cpu(), lengths.cpu(), size**-0.5, window, cap)
        worst = max(worst, (y.float().cpu() - exact).abs().max().item())
        assert worst < 3e-2, ("attention", heads, size, worst)
        assert torch.equal(paged_attention(q[2:3], keys, values, table[2:3], lengths[2:3], size**-0.5, window, cap)[0], y[2])
    return worst


def graph_times(calls: list, repeat: int) -> list[float]:
    "Seconds for one call: all `calls` (each with a weight of its own) are captured into one graph, which is replayed."
    for call in calls[:2]: call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls: call()
    found = []
    for _ in range(repeat):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(); graph.replay(); end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / 1e3 / len(calls))
    return sorted(found)


def summary(times: list[float]) -> dict: return dict(us=round(times[len(times)//2]*1e6, 2), low=round(times[len(times)//10]*1e6, 2), high=round(times[-len(times)//10 - 1]*1e6, 2))


def peers(q, scales, zeros, group: int) -> dict:
    "Calls of other libraries on the same weight, by name; a library that cannot take part says why."
    found = {}
    try:
        from gemlite import DType, GemLiteLinear
        layer = GemLiteLinear(W_nbits=4, group_size=group, in_features=q.shape[1], out_features=q.shape[0], input_dtype=DType.BF16, output_dtype=DType.BF16)
        layer.pack(q, scales.clone(), zeros.to(scales.dtype), bias=None)
        found["gemlite"] = lambda x: layer(x)
    except Exception as error: found["gemlite"] = f"{type(error).__name__}: {error}"[:200]
    try:
        from torchao.quantization import Int4WeightOnlyConfig, quantize_
        linear = torch.nn.Linear(q.shape[1], q.shape[0], bias=False, device="cuda", dtype=torch.bfloat16)
        quantize_(linear, Int4WeightOnlyConfig(group_size=group))
        found["torchao"] = lambda x: linear(x)
    except Exception as error: found["torchao"] = f"{type(error).__name__}: {error}"[:200]
    return found


def time_products(quick: bool, group: int, bandwidth: float) -> list[dict]:
    from aigc_kernels.dequant import dequantize_blocks
    from aigc_kernels.launch import find_launch
    from aigc_kernels.ops import w4_layout
    from aigc_kernels.packing import dequantize
    from aigc_kernels.w4a16 import w4a16
    rows, repeat = [], 20 if quick else 100
    for k, n in SHAPES[:2] if quick else SHAPES:
        copies = max(2, min(12, int(3e8 // (n * k // 2)) + 1))            # together beyond any L2 cache
        weights = [random_weight(n, k, group, seed) for seed in range(copies)]
        layouts, dense = [w4_layout(*w, group) for w in weights], [dequantize(*w, dtype=torch.bfloat16) for w in weights[:max(2, copies // 2)]]
        others = peers(*weights[0], group)
        for m in (1, 16, 64, 256) if quick else ROWS:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            small, wide = (0.5 + 4 / group) * n * k + 2 * m * (n + k), 2 * n * k + 2 * m * (n + k)
            row = dict(k=k, n=n, m=m, group=group, launch=list(find_launch(m, n, k // 128, group, x.device)), floor_us=round(small / bandwidth * 1e6, 2), floor_bf16_us=round(wide / bandwidth * 1e6, 2))
            row["bf16"] = summary(graph_times([lambda w=w: F.linear(x, w) for w in dense], repeat))
            row["w4a16"] = summary(graph_times([lambda l=l: w4a16(x, *l) for l in layouts], repeat))
            row["dequantize_then_bf16"] = summary(graph_times([lambda l=l: F.linear(x, dequantize_blocks(*l, k)) for l in layouts], repeat))
            for name, call in others.items():
                if isinstance(call, str): row[name] = call; continue
                try: row[name] = summary(graph_times([lambda: call(x)] * copies, repeat)) | {"warm_cache": True}
                except Exception as error: row[name] = f"{type(error).__name__}: {error}"[:200]
            row["speedup"], row["of_floor"] = round(row["bf16"]["us"] / row["w4a16"]["us"], 3), round(row["floor_us"] / row["w4a16"]["us"], 3)
            rows.append(row)
            print(f"K {k:6} N {n:6} M {m:5}: bf16 {row['bf16']['us']:9.1f} µs, w4a16 {row['w4a16']['us']:9.1f} µs ({row['speedup']:.2f}×, {row['of_floor']:.0%} of the memory floor), dequantize + bf16 {row['dequantize_then_bf16']['us']:9.1f} µs", flush=True)
    return rows


def time_attention(bandwidth: float) -> list[dict]:
    from aigc_kernels.attention import paged_attention
    rows = []
    for sequences, length in ((1, 4096), (8, 4096), (32, 4096), (1, 32768)):
        per = length // 16
        keys, values = (torch.randn(sequences * per, 16, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        table, lengths = torch.randperm(sequences * per, device="cuda").view(sequences, per).int(), torch.full((sequences,), length, dtype=torch.int32, device="cuda")
        q = torch.randn(sequences, 32, 128, device="cuda", dtype=torch.bfloat16)
        times, floor = graph_times([lambda: paged_attention(q, keys, values, table, lengths, 128**-0.5)], 50), 2 * keys.nbytes / bandwidth
        rows.append(dict(sequences=sequences, length=length, floor_us=round(floor * 1e6, 2), of_floor=round(floor / times[len(times)//2], 3)) | summary(times))
        print(f"attention, {sequences} × {length} tokens: {rows[-1]['us']:.1f} µs, {rows[-1]['of_floor']:.0%} of the memory floor", flush=True)
    return rows


def time_model(layers: int = 32) -> dict:
    "A decode step of the linear layers of an 8B-shaped random model, batch 1, one CUDA graph: tokens a second."
    from aigc_kernels.ops import w4_layout, w4a16_mm
    found, shapes = {}, ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
    x = {k: torch.randn(1, k, device="cuda", dtype=torch.bfloat16) for k in (4096, 14336)}
    head = torch.randn(128256, 4096, device="cuda", dtype=torch.bfloat16)
    for name in ("bf16", "w4a16"):
        if name == "bf16": calls = [lambda w=torch.randn(n, k, device="cuda", dtype=torch.bfloat16), k=k: F.linear(x[k], w) for _ in range(layers) for k, n in shapes]
        else: calls = [lambda l=w4_layout(*random_weight(n, k, 128, i), 128), k=k: w4a16_mm(x[k], *l, 128) for i in range(layers) for k, n in shapes]
        calls.append(lambda: F.linear(x[4096], head))
        seconds = graph_times(calls, 20)[10] * len(calls)
        found[name] = round(1 / seconds, 1)
        print(f"8B-shaped linear layers, {name}, bf16 head: {found[name]} tokens a second", flush=True)
        del calls
        torch.cuda.empty_cache()
    return found


def copy_bandwidth() -> float:
    a = torch.empty(2**30, dtype=torch.uint8, device="cuda"); b = torch.empty_like(a)
    times = graph_times([lambda: b.copy_(a)], 20)
    return 2 * a.nbytes / times[len(times)//2]


def roofline(rows: list[dict], bandwidth: float, out: Path) -> None:
    try: from matplotlib.figure import Figure
    except ImportError: print("no matplotlib: no picture"); return
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for color, name in (("#bbbbbb", "bf16"), ("#4878a8", "w4a16"), ("#d08050", "dequantize_then_bf16")):
        axes.plot([r["m"] for r in rows if r["n"] == 14336], [2e-6 * r["m"] * r["n"] * r["k"] / r[name]["us"] for r in rows if r["n"] == 14336], ".-", color=color, label=name.replace("_", " "))
    axes.plot([r["m"] for r in rows if r["n"] == 14336], [2e-6 * r["m"] * r["n"] * r["k"] / r["floor_us"] for r in rows if r["n"] == 14336], ":", color="#4878a8", label="memory limit, 4 bits")
    axes.plot([r["m"] for r in rows if r["n"] == 14336], [2e-6 * r["m"] * r["n"] * r["k"] / r["floor_bf16_us"] for r in rows if r["n"] == 14336], ":", color="#bbbbbb", label="memory limit, bf16")
    axes.set(xscale="log", yscale="log", xlabel="rows of activations", ylabel="TFLOP/s", title=f"4096 × 14336 on {torch.cuda.get_device_name()}, copy {bandwidth/1e12:.2f} TB/s", ylim=(None, 2000))
    axes.legend(frameon=False, fontsize=8); axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="two shapes, four heights, fewer repetitions")
    options.add_argument("--group", type=int, default=128)
    options.add_argument("--out", type=Path, default=HERE/"results")
    options = options.parse_args()
    if not torch.cuda.is_available(): sys.exit("this benchmark needs a CUDA device; without one: aigc bench kernels")
    import triton
    start, device = time.time(), torch.cuda.get_device_name()
    commit = subprocess.run(["git", "-C", HERE, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    result = dict(device=device, torch=torch.__version__, triton=triton.__version__, cuda=torch.version.cuda, commit=commit, made=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    result["errors"] = check_products() | dict(attention=check_attention())
    result["captured"] = check_operators()
    print("correct:", result["errors"], flush=True)
    bandwidth = result["copy_bytes_s"] = next((v for k, v in BANDWIDTH.items() if k in device), None) or copy_bandwidth()
    result["measured_copy_bytes_s"] = copy_bandwidth()
    result["products"], result["attention"], result["model_tok_s"] = time_products(options.quick, options.group, bandwidth), time_attention(bandwidth), time_model(8 if options.quick else 32)
    options.out.mkdir(parents=True, exist_ok=True)
    name = device.replace(" ", "_")
    (options.out/f"{name}.json").write_text(json.dumps(result, indent=1))
    roofline(result["products"], bandwidth, options.out/f"{name}.svg")
    at = {(r["k"], r["n"], r["m"]): r for r in result["products"]}
    print(json.dumps(dict(device=device, seconds=round(time.time() - start), **{f"speedup_m{m}": at[4096, 14336, m]["speedup"] for m in (1, 16) if (4096, 14336, m) in at}, worst_speedup_to_m256=min(r["speedup"] for r in result["products"] if r["m"] <= 256), **{f"model_{k}_tok_s": v for k, v in result["model_tok_s"].items()})))


if __name__ == "__main__": main()
