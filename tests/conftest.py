"""Shared by all tests: one thread, no colours, and skips that `AIGC_REQUIRE=all` turns into failures."""
import os, secrets, shutil, signal, socket, subprocess, time, urllib.error, urllib.request
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NO_COLOR", "1")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)  # started in the background: the programs that tests start would ignore Ctrl-C, too
REPO = Path(__file__).resolve().parents[1]


LONGEST_FIRST = ("test_readme", "test_gateway", "test_train", "test_run", "test_run_warm", "test_endpoint_stress", "test_evals_tasks", "test_packaging", "test_train_methods", "test_kernels")


def pytest_collection_modifyitems(items):
    "The longest files first, so that two workers end together; xdist gives them out in this order (`--no-loadscope-reorder`)."
    rank = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def missing(what: str):
    "Skip because a component is missing; where everything is required (AIGC_REQUIRE=all), fail."
    if os.environ.get("AIGC_REQUIRE") == "all": pytest.fail(f"missing: {what}", pytrace=False)
    pytest.skip(f"missing: {what}")


@pytest.fixture
def repo() -> Path: return REPO


@pytest.fixture
def sample():
    "A file of the folder `shared/data` beside the checkout, or a visible skip."
    def find(name: str) -> Path:
        path = REPO.parent/"shared"/"data"/name
        if not path.exists(): missing(f"the sample data {name}")
        return path
    return find


@pytest.fixture(scope="session")
def label_studio(tmp_path_factory):
    "`(url, token)` of a real Label Studio server with an empty database, started once and stopped at the end; from `kernels/bench/peers.sh label-studio`. Tests that ask for it carry the markers `slow` and `services`."
    peers = Path(os.environ.get("AIGC_PEERS") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home()/".cache")/"aigc/peers")
    program = peers/"label-studio/bin/label-studio"
    if not program.exists(): missing("Label Studio (run: kernels/bench/peers.sh label-studio)")
    folder, token = tmp_path_factory.mktemp("label-studio"), secrets.token_hex(20)
    with socket.socket() as free: free.bind(("127.0.0.1", 0)); port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true", "SSRF_PROTECTION_ENABLED": "false", "COLLECT_ANALYTICS": "false", "LATEST_VERSION_CHECK": "false", "SENTRY_DSN": "", "FRONTEND_SENTRY_DSN": ""}
    words = ["start", "--no-browser", "--data-dir", str(folder), "--internal-host", "127.0.0.1", "--port", str(port), "--username", "a@example.org", "--password", token, "--user-token", token]
    with open(folder/"log.txt", "wb") as log: server = subprocess.Popen([str(program), *words], env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        end = time.monotonic() + 1200  # its first start writes a database in many migrations: about a minute of CPU, over seven minutes of waiting beside busy neighbours
        while True:
            try:
                with urllib.request.urlopen(urllib.request.Request(f"{url}/api/projects/", headers={"Authorization": f"Token {token}"}), timeout=5): break
            except (urllib.error.URLError, OSError):
                if server.poll() is not None or time.monotonic() > end: pytest.fail("Label Studio does not answer: " + (folder/"log.txt").read_text(errors="replace")[-800:], pytrace=False)
                time.sleep(.5)
        yield url, token
    finally:
        if server.poll() is None: os.killpg(server.pid, signal.SIGTERM)
        try: server.wait(10)
        except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL); server.wait()
        shutil.rmtree(folder, ignore_errors=True)
