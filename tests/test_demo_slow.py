"""The demo's promise on many questions: what is left of a fine-tuned model after quantization. Minutes to an hour on two cores.

Reads a store in which the demo has finished: `AIGC_STORE=.aigc pytest -m slow tests/test_demo_slow.py -s`."""
import pytest
from conftest import missing

from aigc.core.errors import AigcError
from aigc.core.store import Store
from aigc.evals.compare import compare_models, label_models
from aigc.evals.measure import read_items
from aigc.evals.statistics import paired_bootstrap, ratio_bootstrap

ITEMS, KEPT = 600, 0.90  # on at least so many questions, the lower end of the ROUGE-L ratio


def finished_demo(store: Store):
    "The newest evaluation in the store that compared a quantized model of some size with its source, as (parameters, first model)."
    for report in reversed(store.list("report")):
        p = report.parameters
        if not p.get("source") or not p.get("models"): continue
        try: parts = [store.get(m) for m in (p["source"], p["models"][-1], p["data"])]
        except AigcError: continue
        if parts[0].size > 50e6: return p
    return None


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_quantization_keeps_nine_tenths_of_the_fine_tune(tmp_path):
    import aigc.quant.plugin  # noqa: F401
    store = Store()
    demo = finished_demo(store) or missing(f"a finished demo in the store {store.url} (make one with: aigc demo)")
    rows, source = label_models([demo["model"], demo["models"][-1]], ["base", "quantized"], demo["source"], store)
    tuned = {label: ref for label, ref in rows.items() if label != "base"}
    report = compare_models(tuned, demo["data"], folder=tmp_path, source=source, new_split=True, limit=ITEMS//2, max_tokens=demo["max_tokens"], batch_size=demo["batch_size"], seed=demo["seed"], store=store)
    items = read_items(tmp_path/"items.jsonl")
    of = {label: {(i.split, i.id): i for i in items if i.model == label} for label in tuned}
    asked = list(of[source])
    groups = [f"{split}/{of[source][split, id].group}" for split, id in asked]
    before, after = ([of[label][key].rouge_l for key in asked] for label in (source, "quantized"))
    ratio, difference = ratio_bootstrap(after, before, groups), paired_bootstrap(after, before, groups)
    print("", *report.headline(), report.markdown(), f"all {ratio.n} questions of {ratio.groups} groups together: ROUGE-L ratio {ratio}, difference {difference.show('+.3f')}", sep="\n")
    assert len(asked) >= ITEMS, f"the demo's data has {len(asked)} test questions, {ITEMS} are needed"
    assert ratio.low >= KEPT, f"quantization keeps {ratio} of the ROUGE-L"
