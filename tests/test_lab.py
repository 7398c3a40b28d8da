"""JupyterLab in a real browser: a job notebook run to its end and saved, with its tags kept; the template's job under `aigc run`."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest
from conftest import missing
from test_run import aigc, until

from aigc.cli.lab import new_job


@pytest.fixture
def lab(tmp_path):
    (tmp_path/"store").mkdir()
    return tmp_path


def test_the_template_runs(lab):
    (lab/"rows.jsonl").write_text("".join(json.dumps({"messages": [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}"}]}) + "\n" for i in range(40)))
    done = aigc(lab, "run", new_job("60_mine", lab), "--data", lab/"rows.jsonl", "--limit", "3", "--json")
    record = json.loads(done.stdout)
    assert (record["status"], record["metrics"]) == ("succeeded", {"rows": 3}), record["error"]
    refused = aigc(lab, "run", lab/"60_mine.ipynb", "--share", "1.5")
    assert refused.returncode == 2 and "parameter 'share' wants float at least 0 and at most 1, got 1.5" in refused.stderr


@pytest.fixture
def jupyter(lab):
    "`aigc lab` on a free port, with folders of its own."
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    private = {f"JUPYTER_{n}_DIR": str(lab/n.lower()) for n in ("CONFIG", "DATA", "RUNTIME")}
    (lab/"config").mkdir()
    for name in ("server", "lab"): (lab/"config"/f"jupyter_{name}_config.json").write_text(json.dumps({"IdentityProvider": {"token": ""}, "LabApp": {"expose_app_in_browser": True}}))
    process = subprocess.Popen([sys.executable, "-m", "aigc", "lab", str(lab/"notebooks"), "--port", str(port), "--no-browser"], env={**os.environ, **private, "HOME": str(lab), "AIGC_STORE": str(lab/"store")}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        until(lambda: process.poll() is not None or _answers(f"{address}/api/status"), 300, "JupyterLab's answer")
        assert process.poll() is None, "aigc lab has ended"
        yield address
    finally: process.terminate(); process.wait(30)


def _answers(address: str) -> bool:
    try: return urllib.request.urlopen(address, timeout=20).status == 200
    except OSError: return False


@pytest.fixture
def notebook(lab):
    path = new_job("60_mine", lab/"notebooks")
    text = path.read_text().replace('load_split(data, \\"train\\", run.store)[:limit or None]', "list(range(limit))")
    path.write_text(text)
    return path


@pytest.mark.slow
def test_a_job_in_the_browser(notebook, jupyter):
    try: from playwright.sync_api import sync_playwright
    except ImportError: missing("playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or missing("chromium")
    before = nbformat.read(notebook, 4)
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        page = browser.new_page()
        page.set_default_timeout(400_000)
        page.goto(f"{jupyter}/lab/tree/{notebook.name}?reset")
        page.wait_for_selector(".jp-NotebookPanel .jp-Cell")
        page.wait_for_function("document.body.innerText.includes('| Idle') && document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'")  # the kernel is there
        page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        page.wait_for_function("[...document.querySelectorAll('.jp-OutputArea-output')].some(e => e.textContent.includes('16 rows'))")
        page.wait_for_function("document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'")
        assert "Mem" in page.locator("#jp-bottom-panel, .jp-StatusBar-Widget, #jp-main-statusbar").first.inner_text() or page.locator("text=/Mem:/").count()  # resource usage
        page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
        for _ in range(60):
            after = nbformat.read(notebook, 4)
            if any(c.get("outputs") for c in after.cells): break
            time.sleep(0.5)
        browser.close()
    assert [c["id"] for c in after.cells] == [c["id"] for c in before.cells] and [c.metadata.get("tags") for c in after.cells] == [c.metadata.get("tags") for c in before.cells]
    assert not any(o.output_type == "error" for c in after.cells for o in c.get("outputs", [])) and after.metadata.kernelspec.name == "python3"
