"""The server over loopback with the official client: what it answers is what the run selects, and what it cannot serve it refuses."""

import contextlib
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import openai
import pytest
import uvicorn
from small import small_recipe

from irlign.files import read_json, read_table, write_json
from irlign.optimise.best_of_n import select
from irlign.pipeline import run_stage
from irlign.reward.load import load_reward
from irlign.serve import Limits, Server, Wanted
from irlign.serving.load import load_answerer

N, MOST = 4, 2  # candidates of each prompt in the run, and the label-free n that it is given here
REWARD = "init-sft+likelihood"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run up to its evaluation whose judge, so it says, takes two answers."""
    folder = run_stage("eval", small_recipe(tmp_path_factory.mktemp("served") / "run", optimise={"method": "none"}))
    choice = read_json(folder / "best_of_n/choice.json")
    write_json(folder / "best_of_n/choice.json", {**choice, "reward": REWARD, "n": MOST, "label_free": MOST})
    return folder


@contextlib.contextmanager
def serving(folder, wanted=Wanted(), limits=Limits(), key=""):
    """A server in a thread: itself, and the official client for it."""
    server = Server(load_answerer(folder, wanted), limits, key)
    http = uvicorn.Server(uvicorn.Config(server, port=0, log_level="warning", access_log=False))
    thread = threading.Thread(target=http.run)
    thread.start()
    while not http.started:
        thread.join(0.01)
    port = http.servers[0].sockets[0].getsockname()[1]
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key or "none", max_retries=0, timeout=60) as client:
        try:
            yield server, client
        finally:
            http.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def plain(finished):
    with serving(finished) as both:
        yield both


@pytest.fixture
def client(plain):
    return plain[1]


def _asked(text):
    return {"model": "best-of-n", "messages": [{"role": "user", "content": text}]}


def test_a_chat_is_answered_as_bon_selects(finished, client):
    """With the run's own seed the served answer is the one that selection among the stored candidates gives, with its reward."""
    for row in select(read_table(finished / "best_of_n/candidates.parquet"), REWARD, MOST)[:6]:
        answer = client.chat.completions.create(**_asked(row["prompt"]), seed=0)
        (choice,) = answer.choices
        assert choice.message.content == row["completion"] and choice.irlign["index"] == row["index"]
        assert choice.irlign["reward"] == pytest.approx(row["reward"], abs=1e-4)
        assert choice.finish_reason == ("length" if row["finish_reason"] == "length" else "stop")
        assert answer.irlign["best_of"] == MOST == answer.irlign["candidates"] and answer.irlign["as_measured"] is True
