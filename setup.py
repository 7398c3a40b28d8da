"""One build step that pyproject.toml cannot say: the wheel carries the jobs and pipelines of nbs/ (a checkout reads nbs/ itself)."""
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

NBS = Path(__file__).parent / "nbs"


class BuildWithJobs(build_py):
    def run(self):
        super().run()
        if self.editable_mode: return
        for folder, pattern in (("jobs", "*.ipynb"), ("pipelines", "*.yaml")):
            target = Path(self.build_lib) / "aigc" / f"_{folder}"
            target.mkdir(parents=True, exist_ok=True)
            for f in sorted((NBS / folder).glob(pattern)): shutil.copyfile(f, target / f.name)


setup(cmdclass={"build_py": BuildWithJobs})
