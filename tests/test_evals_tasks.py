"""Suites, harness, verifiers, sandbox, statistics on real data: what crosses rooms or takes outside programs."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import missing

from aigc.core.errors import AigcError
from aigc.core.store import Store
from aigc.evals.suites import Task, make_items, make_task, ready


def mean(results, metric): return sum(r.scores[metric] * r.weight for r in results) / sum(r.weight for r in results)


@pytest.mark.slow
def test_three_local_tasks_equal_the_harness_and_are_not_slower(sample, tmp_path):
    "SmolLM2-135M in float32 on MMLU with two solved examples, AGIEval in Chinese, WikiText and GSM8K (24 tokens): both sides in one run, the same items, the same batch size."
    import torch
    from aigc.evals.ask import ask_task
    from aigc.evals.harness import harness_scores, run_harness, write_harness_task
    from aigc.models.generate import TransformersGenerator
    from aigc.models.sources import load_model
    eval_folder = sample("eval/gsm8k_test.jsonl").parent
    model, tokenizer = load_model("smollm2-135m", dtype=torch.float32, device="cpu")
    generator = TransformersGenerator(model, tokenizer, batch_size=4, name="smollm2")
    wiki = [p.strip() for p in sample("raw/wikitext2_valid.txt").read_text(encoding="utf-8").split("\n") if 200 < len(p) < 800][:16]
    tasks = [ready("mmlu", eval_folder, few_shot=2), ready("agieval_zh", eval_folder), Task(name="wikitext", kind="text", rows=lambda: [{"text": p} for p in wiki], prompt="{{ text }}"),
             ready("gsm8k", eval_folder, chat=False, prompt="Question: {{ question }}\nAnswer:", max_tokens=24, answer="{{ answer.split(' ')[-1] }}", verifier={"kind": "pattern", "pattern": r"(\d+)"})]
    table = {}
    for task in tasks:
        items = make_items(task, limit=8 if task.kind == "generate" else 32)[0]
        write_harness_task(task, items, tmp_path)
        start = time.perf_counter(); theirs = harness_scores(run_harness(generator, [f"aigc_{task.name}"], tmp_path))[task.name]; middle = time.perf_counter()
        ours = ask_task(generator, task, items, tmp_path/f"{task.name}.results.jsonl"); end = time.perf_counter()
        for metric, name in {"choice": [("accuracy", "acc"), ("accuracy_norm", "acc_norm")], "text": [("bits_per_byte", "bits_per_byte")], "generate": [("score", "exact_match/pattern")]}[task.kind]:
            assert abs(mean(ours, metric) - theirs[name]) < 1e-4, (task.name, metric, mean(ours, metric), theirs[name])
            table[task.name, metric] = (round(theirs[name], 6), round(mean(ours, metric), 6), round(middle - start, 1), round(end - middle, 1))
    print(json.dumps({f"{t}.{m}": v for (t, m), v in table.items()}))
    seconds = {t: v[2:] for (t, m), v in table.items()}
    assert sum(o for _, o in seconds.values()) <= 1.05 * sum(h for h, _ in seconds.values()), table
