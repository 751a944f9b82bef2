"""A real HTTP server on loopback that speaks the OpenAI JSON: it answers by a script and remembers what it was asked."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def completion(body: dict[str, Any], text: str = "", *, tokens: int = 3, reason: str = "stop", **more: Any) -> dict[str, Any]:
    """A whole answer of the endpoint that the body is for. The text, unless given, tells the prompt and the seed."""
    chat = "messages" in body
    prompt = body["messages"][-1]["content"] if chat else body["prompt"]
    text = text or f"{prompt}/{body.get('seed')}"
    logprobs = {"content": [{"token": "x", "logprob": -0.5}] * tokens} if chat else {"token_logprobs": [-0.5] * tokens}
    said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    choice = {"index": 0, **said, "finish_reason": reason, "logprobs": logprobs if "logprobs" in body else None, **more}
    usage = {"prompt_tokens": 10, "completion_tokens": tokens, "total_tokens": 10 + tokens}
    return {"id": "1", "object": "chat.completion", "model": body["model"], "choices": [choice], "usage": usage}


def error(message: str, **more: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", **more}}


class Server:
    """`with Server(answer) as server`: `answer(n, body)` gives the n-th request (from 0) its (status, headers, JSON or text)."""

    def __init__(self, answer: Any = None, *, delay: float = 0.0, models: tuple[str, ...] = ("served",)):
        self.answer = answer or (lambda n, body: (200, {}, completion(body)))
        self.delay, self.models = delay, models
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()

    def __enter__(self) -> "Server":
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._send(200, {}, {"data": [{"id": name} for name in server.models]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with server._lock:
                    number = len(server.bodies)
                    server.bodies.append(body)
                    server.paths.append(self.path)
                    server.keys.append(self.headers.get("authorization"))
                    server.times.append(time.monotonic())
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                time.sleep(server.delay)
                status, headers, said = server.answer(number, body)
                with server._lock:
                    server.at_once -= 1
                self._send(status, headers, said)

            def _send(self, status: int, headers: dict[str, str], said: Any) -> None:
                data = said.encode() if isinstance(said, str) else json.dumps(said).encode()
                self.send_response(status)
                for name, value in {"content-type": "application/json", "content-length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler
