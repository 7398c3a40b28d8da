"""An endpoint in this process for tests of what goes over HTTP."""
import json
import threading
import time
from contextlib import contextmanager

import httpx

HI = [{"role": "user", "content": "Say something, 你好 🙂."}]


@contextmanager
def served(*engines, **how):
    "The endpoint of started engines, on a free port of loopback."
    from aigc.serve.server import Endpoint, bind
    endpoint = Endpoint(engines[0] if len(engines) == 1 else list(engines), bind("127.0.0.1", 0), access_log=False, tell=lambda line: None, **how)
    thread = threading.Thread(target=endpoint.run)
    thread.start()
    try:
        for e in engines: e.wait_loaded(60)
        eventually(lambda: httpx.get(f"{endpoint.url}/ready").status_code == 200, 60)
        yield endpoint
    finally:
        endpoint.stop()
        thread.join(30)


def eventually(true, seconds=10):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def events(response) -> list[dict]:
    "The events of a stream that was read whole; it must end as streams end."
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""], lines[-3:]
    return [json.loads(line[6:]) for line in lines[:-2]]


class Scripted:
    "An engine that says what it is told, in pieces of the given lengths; for what no model says on demand."
    error = None

    def __init__(self, text, name="scripted", cut=1, delay=0.0, guides=False):
        self.text, self.name, self.cut, self.delay, self.requests, self.open = text, name, cut, delay, [], 0

    def wait_loaded(self, timeout=None): return True

    def stop(self): pass

    def abort(self, request_id): pass

    def status(self):
        from aigc.models.generate import EngineStatus
        return EngineStatus(ready=True, healthy=True, running=self.open)

    def submit(self, request, request_id):
        self.requests.append(request)
        return self._pieces()

    async def _pieces(self):
        import asyncio

        from aigc.models.generate import Chunk
        pieces = [self.text[i:i+self.cut] for i in range(0, len(self.text), self.cut)] or [""]
        self.open += 1
        try:
            for i, piece in enumerate(pieces):
                if self.delay: await asyncio.sleep(self.delay)
                yield Chunk(text=piece, finish_reason="stop" if i == len(pieces) - 1 else None, prompt_tokens=3, completion_tokens=i + 1)
        finally: self.open -= 1
