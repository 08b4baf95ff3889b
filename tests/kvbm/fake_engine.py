"""A vLLM OpenAI server's outside without a model: a program that does as it is told at /control.

python -m tests.kvbm.fake_engine MODEL --port 8000 [vLLM's other options, told back]
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
vllm:num_requests_running{{engine="0",model_name="{model}"}} {running}
vllm:num_requests_running{{engine="1",model_name="{model}"}} 0.0
vllm:num_requests_waiting{{engine="0",model_name="{model}"}} {waiting}
vllm:generation_tokens_total{{engine="0",model_name="{model}"}} {tokens}
vllm:cache_config_info{{block_size="16",engine="0",num_gpu_blocks="4321",user="a\\"b"}} 1.0
process_cpu_seconds_total 1.5
"""

VARIABLE = "FAKE_ENGINE"  # what the state is to be at first, as JSON

STATE: dict[str, Any] = {
    "health": 200,
    "completion": 200,
    "completion_s": 0.0,
    "running": 0,
    "waiting": 0,
    "tokens": 1,  # 0: more at every look
    "asked": 0,  # completions
    "figures": 0,
    "sigterms": 0,
    "ignores_sigterm": False,
    "api_key": None,
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        match self.path:
            case "/health":
                self._answer(STATE["health"], "")
            case "/metrics":
                STATE["figures"] += 1
                told = {**STATE, "tokens": STATE["tokens"] or time.monotonic_ns()}
                self._answer(200, METRICS.format(model=model(), **told))
            case "/v1/models":
                listed = [
                    {"id": model(), "root": model(), "max_model_len": 4096},
                    {"id": "an-adapter"},
                ]
                self._answer(200 if self._may() else 401, {"data": listed})
            case "/control":
                worker_id = os.environ.get("KVBM_WORKER_ID")
                told = {"arguments": sys.argv[1:], "worker_id": worker_id, "pid": os.getpid()}
                self._answer(200, {**STATE, **told})
            case _:
                self._answer(404, "")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/control":
            if "exit" in body:
                sys.stderr.write("the last words of the engine\n")
                sys.stderr.flush()
                os._exit(body["exit"])
            STATE.update(body)
            self._answer(200, {})
        elif self.path == "/v1/completions" and self._may():
            assert body["max_tokens"] == 1 and body["model"] == model()
            STATE["asked"] += 1
            time.sleep(STATE["completion_s"])
            self._answer(STATE["completion"], {"choices": [{"text": "!"}]})
        else:
            self._answer(401, {})

    def log_message(self, *_: Any) -> None:
        pass

    def _may(self) -> bool:
        key = STATE["api_key"]
        return key is None or self.headers["Authorization"] == f"Bearer {key}"

    def _answer(self, status: int, body: object) -> None:
        content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A watcher that gave up waiting is no fault."""


def model() -> str:
    return sys.argv[1]


def stop(number: int, frame: object) -> None:
    STATE["sigterms"] += 1
    if not STATE["ignores_sigterm"]:
        threading.Thread(target=os._exit, args=(0,)).start()


def main() -> None:
    signal.signal(signal.SIGTERM, stop)
    STATE.update(json.loads(os.environ.get(VARIABLE, "{}")))
    if "--api-key" in sys.argv:
        STATE["api_key"] = sys.argv[sys.argv.index("--api-key") + 1]
    port = int(sys.argv[sys.argv.index("--port") + 1])
    sys.stdout.write("a fake engine begins\n")
    sys.stdout.flush()
    Server(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
