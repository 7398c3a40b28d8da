"""nbdev wiring, written by hand because an export needs it: two packages from one `nbs/`, warm test workers, update, README and documentation.

    python -m aigc._nbx export            notebooks → modules of both packages
    python -m aigc._nbx update [FILE.py]  edited modules → their notebooks (kernels included, which nbdev-update forgets)
    python -m aigc._nbx clean             strip execution metadata from the notebooks
    python -m aigc._nbx test [PATH]       run the notebooks as tests; each with its seconds, and those of the processor (a busy machine takes longer)
    python -m aigc._nbx test-slow [PATH]  run those with slow cells, and these cells, too
    python -m aigc._nbx readme            nbs/index.ipynb → README.md
    python -m aigc._nbx docs              nbs/ → _docs/, plain HTML without a link to anybody else's server
"""
import html
import json
import os
import re
import shutil
import sys
from pathlib import Path

from nbdev.config import add_init, get_config
from nbdev.doclinks import _build_modidx, nbdev_export
from nbdev.export import nb_export


class Route:
    "An `export_procs` processor: notebooks whose `default_exp` starts with a package of `[tool.nbdev.packages]` go to that package."
    def __init__(self, nb): self.nb, self.to = nb, ""

    def _default_exp_(self, cell, exp_to): self.to = exp_to

    def end(self):
        config = get_config()
        package, _, module = self.to.partition(".")
        folder = (config.get("packages") or {}).get(package)
        if not folder: return
        for cell in self.nb.cells: cell.cell_type = "raw"  # nothing is left for `lib_path`
        dest = config.config_path / folder
        nb_export(self.nb.path_, lib_path=dest, name=module)
        add_init(dest)
        _build_modidx(dest)


def warm(cells=None):
    "nbdev-test's `test_setup`: import the slow libraries once, before the workers fork; torch computes nothing here."
    sys.modules.setdefault("rfc3987_syntax", None)  # a grammar of IRIs that jsonschema builds for 2.5 s
    import fastapi, matplotlib.pyplot, nbconvert.exporters, openai, peft, scipy.stats, torch, trl  # noqa: E401, F401
    from trl import DPOTrainer, SFTTrainer  # noqa: F401
    torch.set_num_threads(1)


def _one(notebook: Path, slow: bool) -> tuple[str, bool, float, float]:
    from nbdev.test import test_nb
    config = get_config()
    flags = config.tst_flags.split() if isinstance(config.tst_flags, str) else config.tst_flags
    passed, seconds = test_nb(notebook, skip_flags=[f for f in flags if f != "slow" or not slow], basepath=config.config_path, cell_timeout=config.cell_timeout)
    return str(notebook.relative_to(config.nbs_path)), passed, seconds, sum(os.times()[:4])


def _rehearsed() -> set[Path]:
    "The jobs of the pipeline `smoke`: tests/test_readme.py runs each to its end, with `aigc run smoke`."
    import yaml
    nbs = get_config().nbs_path
    return {(nbs / "jobs" / f"{step['job']}.ipynb").absolute() for step in yaml.safe_load((nbs / "pipelines" / "smoke.yaml").read_text(encoding="utf-8"))["jobs"].values()}


def _run(files: list[Path], workers: int, slow: bool) -> list[Path]:
    "Run notebooks, so many at a time, each in a fork of its own; returns those that failed."
    import multiprocessing.connection
    failed, waiting, running, context = [], files[::-1], {}, multiprocessing.get_context("fork")
    while waiting or running:
        while waiting and len(running) < workers:
            notebook, (ours, theirs) = waiting.pop(), context.Pipe(duplex=False)
            child = context.Process(target=lambda f, pipe: pipe.send(_one(f, slow)), args=(notebook, theirs))
            child.start(); theirs.close()
            running[child.sentinel] = child, ours, notebook
        for sentinel in multiprocessing.connection.wait([*running]):
            child, ours, notebook = running.pop(sentinel)
            try: name, passed, seconds, work = ours.recv()
            except EOFError: name, passed, seconds, work = str(notebook.relative_to(get_config().nbs_path)), False, 0.0, 0.0  # killed by a signal: a pool would wait for it for ever
            child.join()
            print(f"{'ok    ' if passed else 'FAILED'} {seconds:5.1f} s ({work:5.1f})  {name}" + (f"  (exit code {child.exitcode})" if child.exitcode else ""), flush=True)
            if not passed: failed.append(notebook)
    return failed


def test(path: str = "", workers: int = 2, slow: bool = False) -> int:
    """Run the notebooks below `path` as tests; returns how many failed.

    nbdev-test lets several notebooks share a process, so that one's monkey patches and registered operators reach the next. Here each gets a fork of its own
    from a parent that has imported the slow libraries. A few that failed beside others are run once more, alone, and named when they pass then."""
    import tempfile
    from nbdev.doclinks import nbglob
    os.environ.setdefault("AIGC_STORE", tempfile.mkdtemp(prefix="aigc-test-"))  # jobs are notebooks too: they leave the workspace's store alone
    files = sorted(Path(f).absolute() for f in nbglob(path or None, as_path=True))
    if not path and not slow:
        rehearsed = _rehearsed()
        print(f"left to tests/test_readme.py: {', '.join(sorted(f.name for f in files if f in rehearsed))}")
        files = [f for f in files if f not in rehearsed]
    if slow: files = [f for f in files if '"#| slow' in f.read_text(encoding="utf-8")]
    warm()
    os.chdir(get_config().nbs_path)
    first = failed = _run(files, workers, slow)
    if first and len(first) < min(5, len(files)): failed = _run(first, 1, slow)
    print(f"notebooks: {len(files) - len(failed)} passed, {len(failed)} failed", flush=True)
    if again := [f.name for f in first if f not in failed]: print(f"passed only alone, at the second try: {', '.join(again)}", flush=True)
    return len(failed)


def update(*files: str):
    "Bring edits of exported modules back to their notebooks: all modules of all packages, or the ones named."
    from nbdev.sync import _update_mod
    config = get_config()
    packages = [config.lib_path, *(config.config_path / folder for folder in (config.get("packages") or {}).values())]
    for package in packages:
        wanted = [Path(f).absolute() for f in files] or list(package.rglob("*.py"))
        for module in wanted:
            if package in module.parents and "AUTOGENERATED" in module.read_text(encoding="utf-8"): _update_mod(module, package.parent)


def _markdown(notebook: Path) -> str:
    from nbconvert import MarkdownExporter
    text, _ = MarkdownExporter().from_filename(str(notebook))
    return text.strip().replace("](images/", "](nbs/images/") + "\n"


def readme():
    "README.md from nbs/index.ipynb."
    config = get_config()
    (config.config_path / "README.md").write_text(_markdown(config.nbs_path / "index.ipynb"), encoding="utf-8")


PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><style>
:root{{color-scheme:light dark;--ink:light-dark(#1c2330,#dfe4ec);--dim:light-dark(#667085,#98a2b3);--line:light-dark(#e4e7ec,#2c3442);--soft:light-dark(#f6f7f9,#171c25);--back:light-dark(#fff,#10141b);--link:light-dark(#1d5fbf,#7db3ff)}}
body{{margin:0;font:16px/1.6 system-ui,sans-serif;color:var(--ink);background:var(--back);display:grid;grid-template-columns:16rem minmax(0,1fr)}} a{{color:var(--link);text-decoration:none}}
nav{{position:sticky;top:0;height:100vh;overflow:auto;padding:1rem 1.2rem;box-sizing:border-box;border-right:1px solid var(--line);font-size:14px}} nav b{{display:block;margin:1rem 0 .2rem;color:var(--dim)}} nav a{{display:block;padding:.1rem 0}} nav a.here{{font-weight:600}}
main{{max-width:54rem;padding:1.5rem 2.5rem 6rem}} pre{{background:var(--soft);padding:.7rem .9rem;border-radius:6px;overflow:auto;font:13px/1.5 ui-monospace,monospace}} code{{font-family:ui-monospace,monospace;font-size:.9em}}
img{{max-width:100%}} table{{border-collapse:collapse;display:block;overflow:auto}} td,th{{border-bottom:1px solid var(--line);padding:.3rem .6rem;text-align:left}} blockquote{{margin:0;color:var(--dim);font-size:1.1em}} .anchor-link,.jp-InputPrompt,.jp-OutputPrompt,.prompt{{display:none}}
.highlight .k,.highlight .kn,.highlight .ow{{color:light-dark(#a626a4,#d89cf6)}} .highlight .s1,.highlight .s2,.highlight .sd,.highlight .sa{{color:light-dark(#35803b,#9bd49f)}} .highlight .c1{{color:var(--dim);font-style:italic}} .highlight .nf,.highlight .nc{{color:light-dark(#1d5fbf,#7db3ff)}}
@media(max-width:60rem){{body{{display:block}}nav{{position:static;height:auto;border:0}}}}
</style></head><body><nav><a href="{up}index.html"><strong>aigc</strong></a>{nav}</nav><main>{body}</main></body></html>"""
ROOMS = ("core", "models", "data", "train", "quant", "kernels", "evals", "run", "serve", "cli", "jobs", "tutorials")


def _prepare(notebook: Path):
    """nbdev executes exported cells and every cell that imports, to make its tables; a lesson that happens to import would run without its
    predecessors, so only pure import cells are left to it."""
    import ast
    import nbformat
    nb = nbformat.read(notebook, 4)
    for cell in nb.cells:
        if cell.cell_type != "code" or "#| export" in cell.source: continue
        try: pure = all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(cell.source).body)
        except SyntaxError: pure = False  # a magic
        if not pure: cell.source = "#| eval: false\n" + cell.source
    head = nb.cells[next(i for i, c in enumerate(nb.cells) if c.cell_type == "markdown")]
    title, _, rest = head.source.partition("\n\n")  # nbdev reads the whole title cell as front matter: what follows the title gets a cell of its own
    if title.startswith("# ") and rest:
        head.source = title
        nb.cells.insert(nb.cells.index(head) + 1, nbformat.v4.new_markdown_cell(rest))
    nbformat.write(nb, notebook)


def _joined(output: dict) -> dict:
    "An output with its lists of lines joined, as nbformat holds it in memory."
    def text(value): return "".join(value) if isinstance(value, list) else value
    return {k: {m: text(v) for m, v in value.items()} if k == "data" else text(value) if k == "text" else value for k, value in output.items()}


def _page(processed: Path, root: Path):
    "A processed notebook as `(path of its page, title, notebook)`: nbdev's front matter becomes a heading, its tables become text."
    import nbformat
    import yaml
    data = json.loads(processed.read_text(encoding="utf-8"))
    front, cells = {}, []
    for cell in data["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "raw": front |= yaml.safe_load(source.strip().strip("-")) or {}; continue
        if cell["cell_type"] == "markdown": cells.append(nbformat.v4.new_markdown_cell(source)); continue
        if cell.get("has_sd"):  # the table of a function: its signature, parameters and docstring
            tables = ["".join(o["data"]["text/markdown"]) for o in cell["outputs"] if "text/markdown" in o.get("data", {})]
            cells += [nbformat.v4.new_markdown_cell(re.sub(r"^---\s*\n|\[source\]\([^)]*\)\{[^}]*\}", "", t, flags=re.M)) for t in tables]
            continue
        cell["source"] = re.sub(r"^#\|.*\n?", "", source, flags=re.M)
        cells.append(nbformat.v4.new_code_cell(cell["source"], outputs=[nbformat.from_dict(_joined(o)) for o in cell["outputs"]]))
    title = str(front.get("title", processed.stem)).replace("`", "")
    cells.insert(0, nbformat.v4.new_markdown_cell(f"# {title}\n> {front.get('description', '')}"))
    return processed.relative_to(root).with_name(front.get("output-file", processed.stem + ".html")), title, nbformat.v4.new_notebook(cells=cells)


def docs():
    "The documentation: every notebook as a page, with nbdev's tables of parameters, a navigation and no link to a CDN."
    from nbconvert import HTMLExporter
    from nbdev.serve import proc_nbs
    config = get_config()
    _build_modidx()
    source = config.config_path / "_docs_source"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(config.nbs_path, source)
    for notebook in source.rglob("*.ipynb"): _prepare(notebook)
    made = proc_nbs(str(source), n_workers=0, force=True)
    shutil.rmtree(source)
    out = config.config_path / "_docs"
    shutil.rmtree(out, ignore_errors=True)
    pages = [_page(n, made) for room in ("", *ROOMS) for n in sorted((made / room).glob("*.ipynb"))]
    exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    for here, title, nb in pages:
        up = "../" * (len(here.parts) - 1)
        nav, room = "", None
        for there, name, _ in pages:
            if len(there.parts) > 1 and there.parts[0] != room: room = there.parts[0]; nav += f"<b>{room}</b>"
            nav += f'<a{" class=here" if there == here else ""} href="{up}{there.as_posix()}">{html.escape(name)}</a>'
        body, _ = exporter.from_notebook_node(nb)
        body = re.sub(r'href="/(\w+/\w+\.html)', rf'href="{up}\1', body)
        body = re.sub(r'href="([^":]*?)(?:\d\d_)?(\w+)\.ipynb', r'href="\1\2.html', body)
        (out / here).parent.mkdir(parents=True, exist_ok=True)
        (out / here).write_text(PAGE.format(title=html.escape(title), nav=nav, up=up, body=body), encoding="utf-8")
    if (config.nbs_path / "images").is_dir(): shutil.copytree(config.nbs_path / "images", out / "images")
    shutil.rmtree(made, ignore_errors=True)
    print(f"{len(pages)} pages in {out}")


def main():
    command, *rest = sys.argv[1:] or [""]
    if command == "export":
        nbdev_export()
        (get_config().nbs_path / "llms.txt").unlink(missing_ok=True)
    elif command == "update": update(*rest)
    elif command == "clean":
        from nbdev.clean import nbdev_clean
        nbdev_clean()
    elif command in ("test", "test-slow"): sys.exit(min(test(*rest, slow=command == "test-slow"), 1))
    elif command in ("readme", "docs"): globals()[command]()
    else: sys.exit(__doc__)


if __name__ == "__main__":
    from aigc._nbx import main  # nbdev's commands read sys.argv themselves when their caller is __main__
    main()
