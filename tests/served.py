"""A real server on loopback, in a thread: irlign's own, with the official client for it."""

import contextlib
import threading

import openai
import uvicorn

from irlign.serve import Limits, Server


@contextlib.contextmanager
def serving(answerer, limits=Limits(), key=""):
    """The server and a client that does not try again."""
    server = Server(answerer, limits, key)
    http = uvicorn.Server(uvicorn.Config(server, port=0, log_level="warning", access_log=False))
    thread = threading.Thread(target=http.run)
    thread.start()
    while not http.started:
        thread.join(0.01)
    port = http.servers[0].sockets[0].getsockname()[1]
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key or "none", max_retries=0, timeout=120) as client:
        try:
            yield server, client
        finally:
            http.should_exit = True
            thread.join()
