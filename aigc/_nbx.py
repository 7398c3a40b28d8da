"""nbdev wiring, written by hand because an export needs it: two packages from one `nbs/`, warm test workers, update, README and docs.

`python -m aigc._nbx export | update | readme | docs`
"""
import sys
from pathlib import Path

from nbdev.config import add_init, get_config
from nbdev.doclinks import _build_modidx
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
    "nbdev-test's `test_setup`: import the slow libraries once, before the workers fork."
    import torch, transformers, trl  # noqa: F401
    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(f"unknown command {sys.argv[1:]}")
