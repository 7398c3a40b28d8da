"""The house itself: floors, light imports, notebook hygiene, exports that match their notebooks."""
import ast
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import REPO

FLOORS = {"core": 1, "aigc_kernels": 1, "models": 2, "run": 2, "data": 3, "quant": 4, "evals": 4, "train": 5, "serve": 5, "cli": 6}
LIGHT = ("core", "data", "run", "cli")
MODULES = sorted(p for p in [*REPO.glob("aigc/*/*.py"), *REPO.glob("kernels/aigc_kernels/*.py")] if p.name not in ("__init__.py", "_modidx.py"))
NOTEBOOKS = sorted(p for p in REPO.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def room(path): return "aigc_kernels" if "aigc_kernels" in path.parts else path.parent.name


def imported_rooms(path):
    "Rooms of our own packages that a module imports, wherever in it the import stands."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0: names = [node.module]
            else:  # exported modules import their own package relatively
                base = ["aigc", path.parent.name] if room(path) != "aigc_kernels" else ["aigc_kernels"]
                names = [".".join([*base[:len(base) - node.level + 1], *([node.module] if node.module else [])])]
        for name in names:
            parts = name.split(".")
            if parts[0] == "aigc_kernels": yield "aigc_kernels"
            elif parts[0] == "aigc" and len(parts) > 1 and parts[1] in FLOORS: yield parts[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: f"{room(p)}.{p.stem}")
def test_a_room_imports_only_from_floors_below(path):
    own = room(path)
    wrong = {r for r in imported_rooms(path) if r != own and FLOORS[r] >= FLOORS[own]}
    assert not wrong, f"{path.relative_to(REPO)} (floor {FLOORS[own]}) imports {wrong}"
    assert own != "aigc_kernels" or not {r for r in imported_rooms(path) if r != own}


def test_light_rooms_import_no_torch():
    names = [f"aigc.{room(p)}.{p.stem}" for p in MODULES if room(p) in LIGHT]
    code = f"import importlib, sys\nfor n in {names!r}:\n    importlib.import_module(n)\n    assert 'torch' not in sys.modules, n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_answers_at_once():
    import time
    command = [sys.executable, "-m", "aigc", "--help"]
    def once(): start = time.perf_counter(); subprocess.run(command, check=True, capture_output=True); return time.perf_counter() - start
    bare = min((lambda s: (subprocess.run([sys.executable, "-c", "import typer, rich.console"], check=True), time.perf_counter() - s)[1])(time.perf_counter()) for _ in range(3))
    ours = min(once() for _ in range(5))
    assert ours < max(0.5, 4*bare), f"aigc --help took {ours:.2f} s (typer alone {bare:.2f} s)"  # the ratio keeps a busy machine from failing it


def test_no_package_called_kernels(): assert not (REPO/"kernels"/"__init__.py").exists()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(REPO/"nbs")))
def test_notebooks_are_clean(path):
    nb = json.loads(path.read_text(encoding="utf-8"))
    assert nb["metadata"]["kernelspec"]["name"] == "python3"
    assert path.stat().st_size < 200_000, "saved outputs should be few"
    assert re.fullmatch(r"(\d\d_)?[a-z0-9_]+", path.stem)
    for cell in nb["cells"]:
        assert cell.get("execution_count") is None and set(cell["metadata"]) <= {"tags"}, cell["id"]
        for out in cell.get("outputs", []):
            assert not (out["output_type"] == "stream" and out["name"] == "stderr"), f"stderr in cell {cell['id']}"
            assert out["output_type"] != "error", f"an error in cell {cell['id']}"
            assert str(REPO.parent) not in json.dumps(out).replace("\\/", "/") or str(REPO.parent) == "/", f"a path of this machine in cell {cell['id']}"


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.parent.name == "jobs"], ids=lambda p: p.stem)
def test_jobs_have_their_parameters(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    assert "parameters" in code[0]["metadata"].get("tags", []), "the first code cell is the parameters cell"
    declared = {n.target.id for n in ast.walk(ast.parse("".join(code[0]["source"]))) if isinstance(n, ast.AnnAssign)}
    assert {"model", "data", "seed", "out", "limit"} <= declared
    assert "check(globals())" in "".join(code[1]["source"])
    assert not any("default_exp" in "".join(c["source"]) for c in code)
    assert "aigc run" in "".join(cells[0]["source"]), "the story names the command that runs it"


def test_exports_match_their_notebooks(tmp_path):
    listed = subprocess.run(["git", "-C", REPO, "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True).stdout.splitlines()
    for name in listed:
        if not (REPO/name).is_file() or name.startswith(("tests/", "kernels/bench/")): continue
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPO/name, tmp_path/name)
    done = subprocess.run([sys.executable, "-m", "aigc._nbx", "export"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    drifted = [str(p.relative_to(REPO)) for p in MODULES if p.read_text() != (tmp_path/p.relative_to(REPO)).read_text()]
    strays = [str(p.relative_to(tmp_path)) for p in [*tmp_path.glob("aigc/**/*.py"), *tmp_path.glob("kernels/**/*.py")] if not (REPO/p.relative_to(tmp_path)).exists()]
    assert not drifted and not strays, f"run make export: {drifted + strays}"


def test_nothing_dangerous_in_the_packages():
    forbidden = re.compile(r"\bpickle\.load|torch\.load\(|trust_remote_code\s*=\s*True|yaml\.load\(|(?<![\w.])eval\(|(?<![\w.])exec\(|shell=True")
    found = [f"{p.relative_to(REPO)}: {line.strip()}" for p in MODULES for line in p.read_text().splitlines() if forbidden.search(line) and not line.lstrip().startswith("#")]
    assert not found, found
