"""Every command of the README runs (but the two that make environments), in both languages, and the README is what its notebook says."""
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from conftest import REPO

MAKES_AN_ENVIRONMENT = {"make demo", "make test"}
STAYS = ("aigc serve", "aigc lab")  # these run until they are stopped


def blocks(name, language): return re.findall(rf"^```{language}\n(.*?)^```", (REPO/name).read_text(encoding="utf-8"), flags=re.M | re.S)


def commands(name): return [line for block in blocks(name, "bash") for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    store = tmp_path_factory.mktemp("readme")
    return os.environ | {"AIGC_STORE": str(store/"store"), "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def start_and_wait(command, environment, url):
    "Start a command that stays; return its process once `url` answers."
    extra = " --no-browser --port 8899" if command.startswith("aigc lab") else ""
    process = subprocess.Popen(command + extra, shell=True, cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    for _ in range(300):
        if process.poll() is not None: raise AssertionError(f"{command} ended: {process.stdout.read()}")
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200: return process
        except OSError: time.sleep(.3)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError(f"{command} never answered: {process.stdout.read()}")


@pytest.mark.parametrize("name", ["README.md"])
def test_every_command_runs(name, environment, tmp_path):
    running = []
    try:
        for command in commands(name):
            if command in MAKES_AN_ENVIRONMENT: continue
            if command.startswith(STAYS):
                url = "http://127.0.0.1:8000/ready" if "serve" in command else "http://127.0.0.1:8899/lab"
                running.append(start_and_wait(command, environment, url))
                continue
            command = command.replace(" sft.ipynb", f" {tmp_path}/sft.ipynb")  # no litter in the checkout
            done = subprocess.run(command, shell=True, cwd=REPO, env=environment, capture_output=True, text=True, timeout=400)
            assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            if command.startswith("curl"): assert '"choices"' in done.stdout, done.stdout
    finally:
        for process in running: os.killpg(process.pid, signal.SIGTERM); process.wait(30)


def test_both_languages_give_the_same_commands():
    assert commands("README.md") == commands("README.zh-CN.md")
    assert blocks("README.md", "python") == blocks("README.zh-CN.md", "python")
    def figures(name):  # of the second section that starts with "## ": the results
        return re.findall(r"[\d.]+\d", (REPO/name).read_text(encoding="utf-8").split("\n## ")[2])
    assert len(figures("README.md")) > 40
    assert sorted(figures("README.md")) == sorted(figures("README.zh-CN.md")), "the figures differ between the languages"


def test_the_python_example_runs(environment):
    for block in blocks("README.md", "python"): subprocess.run([sys.executable, "-c", block], check=True, env=environment, cwd=REPO)


def test_the_readme_is_its_notebook():
    from aigc._nbx import _markdown
    assert (REPO/"README.md").read_text(encoding="utf-8") == _markdown(REPO/"nbs"/"index.ipynb"), "run make export"


def test_links_lead_somewhere():
    for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", (REPO/name).read_text(encoding="utf-8")):
            assert target.startswith("https://") or (REPO/target).exists(), f"{name}: {target}"
