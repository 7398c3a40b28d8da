"""Executors: Modal up to the remote call, and a real Ray cluster of several nodes whose worker is killed in the middle of a run."""
import inspect
import os
import signal
import threading

import pytest
from conftest import missing
from test_run import COUNTING, make_job, until

from aigc.core.errors import AigcError, UsageError
from aigc.core.store import Store
from aigc.run.executors import JobSpec, RayExecutor, make_spec, run_spec
from aigc.run.pipeline import run_pipeline
from aigc.run.listing import list_runs


@pytest.fixture
def lab(tmp_path):
    (tmp_path/"store").mkdir()
    return tmp_path


def test_a_spec_holds_no_secret_and_no_path_of_this_machine(lab, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "s3cr3t-of-the-house-0123"); monkeypatch.setenv("AIGC_THREADS", "2")
    text = make_spec(make_job(lab, "10_x", "n: int = 1", "run.log(n=n)"), {"n": 3}, store=Store(lab/"store"), at="/store").model_dump_json(by_alias=True)
    assert "s3cr3t" not in text and str(lab) not in text
    told = JobSpec.model_validate_json(text)
    assert (told.store, told.parameters, told.environment["AIGC_THREADS"]) == ("/store", {"n": 3}, "2")
    with pytest.raises(UsageError, match="this is no job spec"): run_spec(text.replace('"schema":1', '"schema":2'))


def test_modal_takes_every_option_we_give_it():
    modal = pytest.importorskip("modal")
    from aigc.run.modal_jobs import ModalExecutor, ModalOptions, function_options
    given = function_options(ModalOptions(gpu="H100:2", timeout=7200, retries=3), modal)
    inspect.signature(modal.App.function).bind(None, **given)
    assert (given["gpu"], given["timeout"], given["single_use_containers"], given["retries"].max_retries) == ("H100:2", 7200, True, 3) and list(given["volumes"]) == ["/store"]
    for name, value in {"gpu": "A100", "timeout": 60, "retries": 0, "cpu": 4.0, "memory": 8192}.items():  # every field changes something
        changed = function_options(ModalOptions(**{name: value}), modal)
        assert (changed[name].max_retries if name == "retries" else changed[name]) == value
    app, function = ModalExecutor(app="jobs-test", volume="v").app()
    assert app.name == "jobs-test" and function is not None
    for method in ("read_file", "listdir", "batch_upload", "commit"): assert hasattr(modal.Volume, method)


# ---- Ray

@pytest.fixture(scope="module")
def cluster():
    "A head without room and two nodes with two CPUs each."
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try: import ray; from ray.cluster_utils import Cluster
    except ImportError: missing("ray")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    made.nodes_added = [made.add_node(num_cpus=2) for _ in range(2)]
    yield made
    ray.shutdown(); made.shutdown()


@pytest.mark.slow
def test_a_lost_worker_is_started_again_and_goes_on(cluster, lab):
    job, results, store = make_job(lab, "30_count", "steps: int = 60", "pathlib.Path(run.store.local/'mark').write_text(str(os.getppid()))", *COUNTING), [], Store(lab/"store")
    executor = RayExecutor(cluster.address)
    thread = threading.Thread(target=lambda: results.append(executor.run(job, store=store)))
    thread.start()
    until(lambda: list((lab/"store"/"scratch").glob("*/count")) if (lab/"store"/"scratch").exists() else False, 120, "the job's first step")
    first = list_runs(store)[0]
    os.kill(first.host.pid, signal.SIGKILL)  # the Ray worker, which supervises the run
    thread.join(180)
    assert results and results[0].status == "succeeded" and results[0].metrics["begin"] > 0, results
    assert {r.status for r in list_runs(store)} == {"succeeded", "killed"} and next(r for r in list_runs(store) if r.id == first.id).status == "killed"


@pytest.mark.slow
def test_a_lost_node_is_survived(cluster, lab):
    job, results, store = make_job(lab, "30_count", "steps: int = 80", *COUNTING), [], Store(lab/"store")
    extra = cluster.add_node(num_cpus=2, resources={"here_first": 1})
    executor = RayExecutor(cluster.address)
    executor.task = executor.task.options(scheduling_strategy="DEFAULT")
    thread = threading.Thread(target=lambda: results.append(executor.run(job, store=store)))
    thread.start()
    until(lambda: list((lab/"store"/"scratch").glob("*/count")) if (lab/"store"/"scratch").exists() else False, 120, "the job's first step")
    import ray
    where = {n["NodeID"]: n for n in ray.nodes()}
    running = next(n for n in [extra, *cluster.nodes_added] if n.node_id in where and _runs_on(n, list_runs(store)[0].host.pid))
    cluster.remove_node(running, allow_graceful=False)
    thread.join(240)
    assert results and results[0].status == "succeeded", results


def _runs_on(node, pid: int) -> bool:
    import psutil
    raylet = node.all_processes["raylet"][0].process.pid
    return any(p.pid == raylet for p in psutil.Process(pid).parents())


@pytest.mark.slow
@pytest.mark.parametrize("pipeline, until", [("smoke", "quantize"), ("demo", "prepare")])
def test_local_and_ray_make_the_same(cluster, lab, monkeypatch, pipeline, until):
    "Equal digests here and on the cluster: all stages of smoke that make a dataset or a model, and the demo's whole dataset."
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made = {}
    for name, executor in (("local", None), ("ray", RayExecutor(cluster.address))):
        store = Store(lab/name); store.local.mkdir()
        results = run_pipeline(pipeline, store=store, until=until, executor=executor)
        assert all(r.status == "succeeded" for r in results), [(r.name, r.status, r.record and r.record.error) for r in results]
        made[name] = {(r.name, output): ref for r in results for output, ref in r.record.outputs.items()}
    assert made["local"] == made["ray"] and len(made["ray"]) >= (5 if pipeline == "smoke" else 1)


@pytest.mark.slow
def test_a_store_that_the_node_does_not_see(cluster, lab, monkeypatch):
    executor = RayExecutor(cluster.address)
    monkeypatch.setattr("aigc.run.executors.make_spec", lambda *a, **k: make_spec(*a, **k, at="/nowhere/at/all"))
    with pytest.raises(AigcError, match="the store's folder is not there"): executor.run(make_job(lab, "10_x", "n: int = 1", "run.log(n=n)"), store=Store(lab/"store"))
