"""A pairwise judge against a real server: both orders, ties, the cache and its cost; and the length taken out, by hand."""

import numpy as np
import pytest
from openai_server import Server, completion, error
from small import small_recipe

from irlign import endpoint
from irlign.cli import main
from irlign.errors import ConfigError
from irlign.evaluate.judge import PAIR, JudgeSettings, compared, judge_pairs, read_verdict
from irlign.files import read_json
from irlign.pipeline import run, run_stage
from irlign.statistics import length_controlled

OPTIONS = {"resamples": 200, "seed": 0}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.01)
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def rows(count=6):
    """The answers of `sft` are good, those of `initial` bad but at two prompts, where both are the same; `aligned` misses a prompt."""
    found = []
    for i in range(count):
        same = i < 2
        found.append({"prompt_id": f"{i:02}", "prompt": f"ask {i}", "answer/sft": "same" if same else f"good {i}"})
        found[-1] |= {"answer/initial": "same" if same else f"bad and long {i}", "answer/aligned": None if i == 0 else f"good, too {i}"}
    return found


def sides(body):
    """The two answers in a request."""
    text = body["messages"][1]["content"]
    return text.split("[Answer A]\n")[1].split("\n\n[Answer B]\n")


def by_quality(n, body):
    first, second = (side.startswith("good") for side in sides(body))
    return 200, {}, completion(body, "A" if first > second else "B" if second > first else "TIE", tokens=2)


def judged(server, tmp_path, pairs=(("sft", "initial"),), **settings):
    own = JudgeSettings(base_url=server.url, model="served", **settings)
    return judge_pairs(rows(), list(pairs), own, tmp_path / "judged.jsonl", **OPTIONS)


def test_the_better_answer_wins_in_both_orders(tmp_path):
    with Server(by_quality) as server:
        found = judged(server, tmp_path, [("aligned", "sft"), ("sft", "initial")], criterion="harmless")
    aligned, sft = found["pairs"]
    # aligned: five prompts, of which at 1 it is good and sft is not, and four good ones tie
    assert (aligned["a"], aligned["b"], aligned["win_rate"]["prompts"]) == ("aligned", "sft", 5)
    assert aligned["win_rate"]["mean"] == pytest.approx((1 + 4 * 0.5) / 5) and aligned["ties"]["mean"] == pytest.approx(4 / 5)
    assert sft["win_rate"]["mean"] == pytest.approx((4 + 2 * 0.5) / 6) and sft["agreement"]["mean"] == 1 and sft["first"] == 0.5
    assert sft["words"] == pytest.approx([(2 + 4 * 2) / 6, (2 + 4 * 4) / 6])
    assert len(server.bodies) == 2 * 5 + 2 * 4  # equal answers are asked about by nobody
    body = server.bodies[0]
    assert body["temperature"] == 0 and body["max_tokens"] == 16 and "less harm" in body["messages"][0]["content"]
    assert {tuple(sides(b)) for b in server.bodies if "initial" in str(b)} == set()  # sources are never named
    assert PAIR.format(prompt="ask 5", first="good 5", second="bad and long 5") in {b["messages"][1]["content"] for b in server.bodies}


def test_a_judge_of_positions_has_no_say(tmp_path):
    with Server(lambda n, body: (200, {}, completion(body, "A"))) as server:
        sft = judged(server, tmp_path)["pairs"][0]
    assert sft["win_rate"]["mean"] == 0.5 and sft["first"] == 1.0 and sft["agreement"]["mean"] == pytest.approx(2 / 6)


def test_a_rerun_asks_nothing_twice_and_says_what_it_cost(tmp_path):
    prices = {"price_in": 2.0, "price_out": 4.0}
    with Server(by_quality) as server:
        first = judged(server, tmp_path, **prices)
        torn = (tmp_path / "judged.jsonl").read_text()
        (tmp_path / "judged.jsonl").write_text(torn[: torn.rindex("said") - 1])
        again = judged(server, tmp_path, max_concurrency=1, **prices)
        assert len(server.bodies) == 8 + 1 and again == first
        assert judged(server, tmp_path, **prices) == first and len(server.bodies) == 9
        other = judged(server, tmp_path, criterion="harmless", **prices)
    assert len(server.bodies) == 9 + 8 and other["pairs"] == first["pairs"]  # another question
    assert first["usage"] == {"verdicts": 8, "prompt_tokens": 80, "completion_tokens": 16, "cost": pytest.approx((80 * 2 + 16 * 4) / 1e6)}


def test_fewer_prompts_are_a_part_of_more(tmp_path):
    with Server(by_quality) as server:
        few = judged(server, tmp_path, max_prompts=4)
        assert few["pairs"][0]["win_rate"]["prompts"] == 4 and len(server.bodies) == 4
        judged(server, tmp_path, max_prompts=5)
    assert len(server.bodies) == 6


def test_what_the_server_does_not_know_is_left_out(tmp_path):
    def strict(n, body):
        for name in ("max_tokens", "temperature"):
            if name in body:
                said = "Use 'max_completion_tokens' instead" if name == "max_tokens" else "Unsupported value: 'temperature'"
                return 400, {}, error(said)
        return by_quality(n, body)

    with Server(strict) as server:
        found = judged(server, tmp_path, max_concurrency=1)
    assert found["pairs"][0]["win_rate"]["mean"] == pytest.approx(5 / 6) and len(server.bodies) == 8 + 2
    assert server.bodies[-1]["max_completion_tokens"] == 16


def test_a_reply_without_a_verdict_is_a_tie_and_counted(tmp_path):
    with Server(lambda n, body: (200, {}, completion(body, "Both have merit."))) as server:
        sft = judged(server, tmp_path)["pairs"][0]
    assert sft["win_rate"]["mean"] == 0.5 and sft["unreadable"] == 8 and sft["first"] is None


def test_a_wrong_name_is_an_error(tmp_path):
    with (
        Server(lambda n, body: (404, {}, error("no such model")), models=("other",)) as server,
        pytest.raises(ConfigError, match="it serves other"),
    ):
        judged(server, tmp_path)


VERDICTS = {
    "A": "A",
    " B.\n": "B",
    "tie": "TIE",
    "Answer A is better": "A",
    "A is long, B is short.\nB": "B",
    "A tie": "",
    "A or B": "",
    "": "",
    "Ab": "",
}


@pytest.mark.parametrize("text", VERDICTS)
def test_verdicts_are_read(text):
    assert read_verdict(text) == VERDICTS[text]


def test_the_win_rate_at_equal_length_by_hand():
    """Two lengths only, +d and -d: the regression goes through both rates, so theta is the mean of their log odds. Longer answers win 9 of
    10 and shorter ones 5 of 10: (log 9 + log 1) / 2 = log 3, a rate of 3/4, where the raw one is 7/10."""
    scores, lengths = [1] * 9 + [0] + [1] * 5 + [0] * 5, [30] * 10 + [-30] * 10
    found = length_controlled(scores, lengths, resamples=300)
    assert found.mean == pytest.approx(0.75, abs=1e-3) and np.mean(scores) == 0.7 and found.prompts == 20
    assert 0.4 < found.ci95[0] < 0.75 < found.ci95[1] < 1
    turned = length_controlled([1 - s for s in scores], [-d for d in lengths], resamples=300)
    assert turned.mean == pytest.approx(1 - found.mean, abs=1e-9)  # the other side's rate
    assert length_controlled([1, 0.5, 0.5, 0], [7, 7, 7, 7]).mean == pytest.approx(0.5, abs=1e-3)  # no difference to take out
    assert length_controlled([1, 0, 1, 1], [0, 0, 0, 0]).mean == pytest.approx(0.75, abs=1e-3)
    only_length = length_controlled([1, 1, 0, 0], [5, 9, -5, -9], resamples=100)
    assert only_length.mean == pytest.approx(0.5, abs=1e-6) and np.isfinite(only_length.ci95).all()
    assert length_controlled([1, 1, 1], [1, 2, 3], resamples=100).mean > 0.9


def test_compared_by_hand():
    """Three prompts: a wins in both orders, the orders disagree, the second order ties."""
    found = compared(np.array([[1, 1], [1, 0], [0, 0.5]]), np.array([[3, 3], [2, 4], [4, 2]]), **OPTIONS)
    assert found["win_rate"]["mean"] == pytest.approx((1 + 0.5 + 0.25) / 3) and found["ties"]["mean"] == pytest.approx(1 / 3)
    assert found["agreement"]["mean"] == pytest.approx(1 / 3) and found["words"] == [3, 3]
    assert found["first"] == pytest.approx(3 / 5)  # the first, the second; the first, the first; the second, nobody


def test_the_run_asks_the_judge_and_the_report_shows_it(tmp_path):
    run(small_recipe(tmp_path / "run", optimise={"method": "none"}, best_of_n={"n": 4, "force": True}))
    with Server(lambda n, body: (200, {}, completion(body, "A" if n % 3 else "TIE"))) as server:
        words = [f"output_dir={tmp_path}/run", f"evaluation.judge.base_url={server.url}", "evaluation.judge.model=served"]
        with pytest.raises(SystemExit) as ended:
            main(["eval", words[0], "--judge", server.url, "--judge-model", "served"])
        assert not ended.value.code
        asked = len(server.bodies)
        run_stage("report", None, [*words, "evaluation.resamples=300"])
    assert asked == len(server.bodies) == len([line for line in (tmp_path / "run/judged.jsonl").read_text().splitlines() if line])
    results = read_json(tmp_path / "run/evaluation/results.json")
    assert [(p["a"], p["b"]) for p in results["pairwise"]["pairs"]] == [("best_of_n", "sft"), ("sft", "initial")]
    assert results["headline"][-1].startswith("The judge served prefers SFT to the initial policy in ")
    assert "both orders agree on" in results["headline"][-1]
    with pytest.raises(ConfigError, match="no address of an endpoint"):
        run_stage("eval", None, [words[0], "evaluation.judge={model: served}"])
    with pytest.raises(ConfigError, match=r"evaluation\.judge\.model"):
        run_stage("eval", None, [words[0], "evaluation.judge={base_url: http://localhost/v1}"])
    html = (tmp_path / "run/report.html").read_text()
    assert "A judge's verdicts: served, asked which answer is more helpful" in html and f"{asked} verdicts" in html
