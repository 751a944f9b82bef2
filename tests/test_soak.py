"""The short form of the soak (`make soak`), and an upstream that fails now and then."""

import concurrent.futures

import openai
import openai_server
import pytest
from served import serving
from small import small_recipe
from soak import Figures, soak, summary

from irlign.pipeline import run_stage
from irlign.serve import Wanted
from irlign.serving.load import load_answerer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return run_stage("bon", small_recipe(tmp_path_factory.mktemp("soak") / "run", best_of_n={"n": 2, "force": True}))


def test_sixteen_clients_for_a_few_seconds(made):
    figures = soak(made, seconds=5, clients=16, seed=100)
    assert not figures.lost and figures.code == 0, summary(figures)
    assert all(figures.count[name] for name in ("answered", "429", "left", "refused")), summary(figures)
    assert figures.count["answered after SIGTERM"] == 4


def test_growth_by_hand():
    assert Figures(memory=[1.0, 9.0, 10.0, 10.0, 11.0, 11.0, 12.0, 13.0]).growth() == 2.5


def test_an_upstream_that_fails_now_and_then_loses_nothing(made):
    """Every third of its answers is 429, 500 or 503: asked again, and all that was accepted is answered. One that fails always is one error."""

    def flaky(n, body):
        if n % 3 == 1:
            return (429, {"retry-after": "0"}, openai_server.error("slow down")) if n % 2 else (500, {}, openai_server.error("oops"))
        return 200, {}, openai_server.completion(body)

    with openai_server.Server(flaky) as upstream:
        answerer = load_answerer(made, Wanted(upstream=upstream.url, upstream_model="served", n=1))
        with serving(answerer) as (_, client), concurrent.futures.ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(client.completions.create, model="best-of-n", prompt=f"What is {i}?", seed=i) for i in range(24)]
            assert all(f"What is {i}?" in one.result().choices[0].text for i, one in enumerate(asked)) and len(upstream.bodies) > 24
    with openai_server.Server(lambda n, body: (500, {}, openai_server.error("oops"))) as upstream:
        answerer = load_answerer(made, Wanted(upstream=upstream.url, upstream_model="served", n=1))
        with serving(answerer) as (_, client), pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="best-of-n", prompt="What is it?")
        assert caught.value.status_code == 502 and "Traceback" not in caught.value.response.text
