"""The wheel: built, installed in a clean environment, used outside the checkout."""
import os
import subprocess
import sys
import sysconfig
import zipfile

import pytest
from conftest import REPO


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source")
    # built from a copy of what git knows: setuptools leaves build/ and egg-info behind
    for name in subprocess.run(["git", "-C", REPO, "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True).stdout.splitlines():
        if (REPO/name).is_file() and not name.startswith("tests/"):
            (source/name).parent.mkdir(parents=True, exist_ok=True); (source/name).write_bytes((REPO/name).read_bytes())
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source], check=True, capture_output=True)
    return next(out.glob("aigc_notebooks-*.whl"))


def test_the_wheel_carries_everything(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for f in REPO.glob("nbs/jobs/*.ipynb"): assert f"aigc/_jobs/{f.name}" in names
    for f in REPO.glob("nbs/pipelines/*.yaml"): assert f"aigc/_pipelines/{f.name}" in names
    for f in REPO.glob("kernels/aigc_kernels/*.py"): assert f"aigc_kernels/{f.name}" in names
    assert not [n for n in names if n.startswith(("kernels/", "nbs/", "tests/"))], "nothing else at the top level"


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory):
    "A fresh environment with our wheel and nothing of this checkout; the dependencies are seen through a path file."
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder/"venv"], check=True)
    python = folder/"venv"/"bin"/"python"
    site = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True).stdout.strip()
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel], check=True, capture_output=True)
    # path files are not read recursively, so the editable install of this checkout stays out of sight
    (REPO.__class__(site)/"dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def call(clean, *arguments, **more):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("AIGC_", "PYTHONPATH"))} | {"AIGC_STORE": str(clean/"store"), "OMP_NUM_THREADS": "1"}
    return subprocess.run([clean/"venv"/"bin"/arguments[0], *arguments[1:]], cwd=clean, env=env, capture_output=True, text=True, **more)


def test_the_installed_package_is_not_the_checkout(clean):
    done = call(clean, "python", "-c", "import aigc, aigc_kernels; print(aigc.__file__, aigc_kernels.__file__)")
    assert done.returncode == 0, done.stderr
    assert str(REPO) not in done.stdout and done.stdout.count(str(clean)) == 2


def test_a_job_runs_outside_the_checkout(clean):
    assert "Usage" in call(clean, "aigc", "--help").stdout
    done = call(clean, "aigc", "run", "prepare", "--set", "limit=60", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    listed = call(clean, "aigc", "store", "list", "--kind", "dataset")
    assert "dataset/" in listed.stdout
