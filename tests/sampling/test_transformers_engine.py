"""Sampling in process: the law, the seeds, the batch, and how an answer ends."""

import json
import shutil

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import make_tiny_policy

from irlign.data.chat import Encoded
from irlign.errors import ConfigError, DataError, ModelError
from irlign.policy.likelihood import sequence_log_probs
from irlign.policy.load import load_policy
from irlign.records import Prompt
from irlign.sampling.decoder import Decoder
from irlign.sampling.ending import ending
from irlign.sampling.engine import Request, SamplingSettings, load_engine

TEXTS = ("the cat", "The red bird sang on the mat and", "a", "the dog ran home", "now the blue bird", "home", "a dog and", "the")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_policy(tmp_path_factory.mktemp("policy"), seed=3)


def _engine(folder, **settings):
    return load_engine(folder, SamplingSettings(**{"max_new_tokens": 12, **settings}), "none")


def _requests(texts=TEXTS, count=4, first=0):
    return [Request(Prompt.of(t, "train"), tuple(1000 * i + first + j for j in range(count))) for i, t in enumerate(texts)]


def _drawn(samples):
    return [(s.prompt.content, s.index, s.completion, s.finish_reason, s.tokens) for s in samples]


def test_same_seeds_same_samples(folder):
    first, again = (_engine(folder).draw(_requests()) for _ in range(2))
    assert first == again  # log-probabilities included, bit for bit
    other = _engine(folder).draw(_requests(first=77))
    assert _drawn(other) != _drawn(first)
    assert [(s.prompt.content, s.index) for s in first] == [(t, i) for t in TEXTS for i in range(4)]
    assert len({s.completion for s in first}) > 20  # each answer has its own random numbers


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_batch_and_the_left_padding_change_nothing(tmp_path, architecture, batch_size):
    """Prompts of 2 to 8 tokens in one batch of 32, against batches of 5 and rows alone."""
    folder = make_tiny_policy(tmp_path, seed=3, architecture=architecture)
    together = _engine(folder, batch_size=32).draw(_requests())
    apart = _engine(folder, batch_size=batch_size).draw(_requests())
    assert _drawn(together) == _drawn(apart)
    assert [s.logprob for s in together] == pytest.approx([s.logprob for s in apart], abs=1e-4)


def test_a_request_alone_gives_what_it_gives_among_others(folder):
    together = _engine(folder).draw(_requests())
    alone = _engine(folder).draw(_requests()[3:4])
    assert _drawn(alone) == _drawn(together[12:16])


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5, "top_k": 5, "top_p": 0.8}, {"stop": ["."], "max_new_tokens": 40}])
def test_the_stored_log_probability_is_the_policys_own(folder, settings):
    """At temperature 1 and unfiltered, whatever the sampling fields; the drawn ids are rebuilt from the engine itself."""
    engine = _engine(folder, **settings)
    samples = engine.draw(_requests())
    prompts = [engine.format.prompt_ids(s.prompt.content) for s in samples]
    drawing, drawn = engine.drawing(), {}
    drawing.add(dict(enumerate(_requests())))
    rows = [row for one in drawing.open.values() for row in one.rows]
    while len(drawn) < len(rows):
        drawn |= {row: ids for row, ids, _ in drawing._ended()}
    ids = [drawn[row] for row in rows]
    used = [i[: s.tokens] for i, s in zip(ids, samples, strict=True)]
    expected = sequence_log_probs(engine.policy, [Encoded(p, i) for p, i in zip(prompts, used, strict=True)])
    assert (used == ids) == ("stop" not in settings)  # what was drawn past a stop string is not counted
    assert [s.logprob for s in samples] == pytest.approx(list(expected), abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_tokens_follow_the_models_law(folder, temperature):
    engine = _engine(folder, max_new_tokens=1, batch_size=4000, temperature=temperature)
    prompt = engine.format.prompt_ids("the cat")
    drawn = engine.answers([Request(Prompt.of("the cat", "train"), tuple(range(4000)))])
    counts = np.bincount([d.ids[0] for d in drawn], minlength=engine.policy.model.config.vocab_size)
    with torch.inference_mode():
        logits = engine.policy.model(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    expected = 4000 * (logits / temperature).softmax(-1).numpy()
    rare = expected < 5
    pooled = [(counts[~rare], expected[~rare]), ([counts[rare].sum()], [expected[rare].sum()])]
    observed, law = (np.concatenate([p[k] for p in pooled if np.sum(p[1]) > 0]) for k in (0, 1))
    assert len(law) > 8 and stats.chisquare(observed, law).pvalue > 0.01
    wrong = np.roll(law, 1)
    assert stats.chisquare(observed, wrong).pvalue < 1e-6  # the test has power


def test_top_k_1_is_greedy_generation(folder):
    engine = _engine(folder, top_k=1)
    prompt = engine.format.prompt_ids(TEXTS[1])
    (drawn,) = engine.answers([Request(Prompt.of(TEXTS[1], "train"), (5,))])
    out = engine.policy.model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=12, attention_mask=torch.ones(1, len(prompt))
    )
    assert list(drawn.ids) == out[0, len(prompt) :].tolist()


class Scripted:
    """What was drawn is told: its ending alone is looked at."""

    def __init__(self, folder, **settings):
        self.engine = _engine(folder, **settings)
        self.prompt = self.engine.format.prompt_ids("the cat")

    def finish(self, text, *, eos=False):
        ids = self.engine.format.encode(["the cat"], [text])[0].completion_ids
        engine = self.engine
        return ending(engine.format, self.prompt, ids if eos else ids[:-1], eos_ids=engine.eos_ids, stop=engine.settings.stop)


def test_how_an_answer_ends(folder):
    plain = Scripted(folder)
    assert plain.finish(" sat.", eos=True) == (" sat.", "eos", 3)
    assert plain.finish(" sat.") == (" sat.", "length", 2)
    stops = Scripted(folder, stop=["\n", ". The"])
    assert stops.finish(" sat on the mat. The dog ran") == (" sat on the mat", "stop", 6)  # sat on the mat . The
    assert stops.finish(" sat\n a dog. The", eos=True) == (" sat", "stop", 2)
    assert stops.finish("\n sat") == ("", "stop", 1)
    assert stops.finish(" sat.", eos=True) == (" sat.", "eos", 3)


def test_a_stop_string_ends_the_drawing(folder):
    """The same answers with and without a stop string: equal up to where it stands, and no further tokens are counted."""
    free = _engine(folder, max_new_tokens=40).draw(_requests(count=8))
    stopped = _engine(folder, max_new_tokens=40, stop=["."]).draw(_requests(count=8))
    for a, b in zip(free, stopped, strict=True):
        if "." in a.completion:
            assert (b.completion, b.finish_reason) == (a.completion.split(".")[0], "stop")
            assert b.tokens <= a.tokens and b.logprob >= a.logprob
        else:
            assert _drawn([b]) == _drawn([a])
    reasons = {s.finish_reason for s in stopped}
    assert "stop" in reasons and len(reasons) > 1


def test_the_limits_give_length(folder):
    short = _engine(folder, max_new_tokens=3).draw(_requests(count=16))
    assert {s.tokens for s in short if s.finish_reason == "length"} == {3}
    assert all(s.tokens <= 3 for s in short) and any(s.finish_reason == "length" for s in short)
    long = " ".join(["the cat ran"] * 20)  # 61 of 64 tokens with BOS
    full = _engine(folder, max_new_tokens=500).draw([Request(Prompt.of(long, "train"), tuple(range(40)))])
    assert {s.tokens for s in full if not s.finished} == {3}
    with pytest.raises(DataError, match="64 tokens leaves no room"):
        _engine(folder).draw([Request(Prompt.of(f"{long} the cat ran", "train"), (1,))])


def test_the_models_generation_config_narrows_nothing(folder, tmp_path):
    narrowed = tmp_path / "narrowed"
    shutil.copytree(folder, narrowed)
    stored = json.loads((narrowed / "generation_config.json").read_text())
    greedy = {"do_sample": True, "top_k": 1, "top_p": 0.1, "temperature": 0.1, "max_length": 5, "repetition_penalty": 9.0}
    (narrowed / "generation_config.json").write_text(json.dumps({**stored, **greedy}))
    assert load_policy(str(narrowed)).model.generation_config.top_k == 1
    assert _drawn(_engine(narrowed).draw(_requests())) == _drawn(_engine(folder).draw(_requests()))


def test_every_end_token_of_the_generation_config_ends(folder, tmp_path):
    chat = tmp_path / "chat"
    shutil.copytree(folder, chat)
    (chat / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 4]}))  # 4 is the full stop
    samples = _engine(chat, max_new_tokens=40).draw(_requests(count=8))
    assert not any("." in s.completion for s in samples)
    assert sum(s.finish_reason == "eos" for s in samples) > sum(
        s.finish_reason == "eos" for s in _engine(folder, max_new_tokens=40).draw(_requests(count=8))
    )


def test_errors(folder, tmp_path):
    with pytest.raises(ConfigError, match="no engine 'vlm'"):
        _engine(folder, engine="vlm")
    engine = _engine(folder)
    with torch.no_grad():
        engine.policy.model.lm_head.weight[7] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        engine.draw(_requests())


def test_bfloat16_draws_nearly_the_same_and_scores_its_own(folder):
    """Half the digits: the same uniforms give mostly the same tokens; rotary frequencies keep all their digits."""
    exact, half = _engine(folder), _engine(folder, dtype="bfloat16")
    assert exact.settled["dtype"] == "float32"  # auto, for a model this small
    assert half.policy.model.dtype == torch.bfloat16 and half.state.joins
    assert all(buffer.dtype == torch.float32 for buffer in half.policy.model.buffers())
    a, b = exact.draw(_requests()), half.draw(_requests())
    alike = [(x, y) for x, y in zip(a, b, strict=True) if x.completion == y.completion]
    assert len(alike) > len(a) / 2
    assert [y.logprob for _, y in alike] == pytest.approx([x.logprob for x, _ in alike], rel=0.05)


def test_an_answer_is_watched_while_it_is_drawn(folder):
    """What is heard grows toward the answer. A limit of one's own holds."""
    heard = {}

    def watch(i, text):
        heard.setdefault(i, []).append(text)

    engine = _engine(folder, max_new_tokens=40)
    prompt = Prompt.of("the cat", "train")
    alone = engine.draw([Request(prompt, (5, 6, 7))])
    watched = engine.answers([Request(prompt, (5, 6, 7), watch=watch), Request(prompt, (5,), limit=3)])
    assert [d.sample.completion for d in watched[:3]] == [s.completion for s in alone]
    assert all(alone[i].completion.startswith(text) for i in range(3) for text in heard[i]) and sum(map(len, heard.values())) > 3
    assert watched[3].sample.tokens <= 3 and alone[0].completion.startswith(watched[3].sample.completion)
    assert [len(d.ids) for d in watched] == [len(d.logprobs) for d in watched] == [d.sample.tokens for d in watched]
    assert sum(watched[0].logprobs) == pytest.approx(watched[0].sample.logprob) and watched[0].prompt_tokens == 3
    greedy = engine.under(SamplingSettings(max_new_tokens=5, top_k=1))
    assert len({s.completion for s in greedy.draw([Request(prompt, (1, 2, 3))])}) == 1 and engine.settings.top_k == 0


def _to_the_end(drawing, found=None):
    """The answers to all requests that are open, by number."""
    found = {} if found is None else found
    while drawing.open:
        found |= drawing.turn()
    return found


@pytest.mark.parametrize("settings", [{}, {"top_k": 1}, {"stop": ["."]}], ids=["sampled", "greedy", "stops"])
@pytest.mark.parametrize("batch_size", [3, 64])
def test_a_request_that_joins_gets_what_it_gets_alone(folder, settings, batch_size):
    """One more at every turn, in batches with and without room for it; each is answered as if nothing else had been asked."""
    engine = _engine(folder, max_new_tokens=40, batch_size=batch_size, **settings)
    requests = _requests(count=2)
    drawing, found = engine.drawing(), {}
    for number, request in enumerate(requests):
        drawing.add({number: request})
        found |= drawing.turn()
    assert len(found) < len(requests)  # some did join others
    _to_the_end(drawing, found)
    for number, request in enumerate(requests):
        alone = engine.answers([request])
        assert _drawn(d.sample for d in found[number]) == _drawn(d.sample for d in alone)
        assert [d.ids for d in found[number]] == [d.ids for d in alone]
        assert [d.sample.logprob for d in found[number]] == pytest.approx([d.sample.logprob for d in alone], abs=1e-4)


def test_a_short_request_that_comes_late_is_answered_first(folder):
    engine = _engine(folder, max_new_tokens=60)
    with torch.no_grad():
        engine.policy.model.lm_head.weight[engine.eos_ids] *= 0  # nothing ends before its limit, or hardly
    drawing, order = engine.drawing(), []
    drawing.add({0: Request(Prompt.of("the cat", "train"), (1, 2, 3, 4))})
    order += drawing.turn()
    drawing.add({1: Request(Prompt.of("the dog", "train"), (1,), limit=4)})
    while drawing.open:
        order += drawing.turn()
    assert order == [1, 0]


def test_a_request_that_is_dropped_frees_its_rows(folder):
    """Rows that run and rows that wait; those beside them are drawn as without it."""
    engine = _engine(folder, max_new_tokens=40, batch_size=4)
    requests = _requests(count=3)[:3]
    drawing = engine.drawing()
    drawing.add(dict(enumerate(requests)))
    early = drawing.turn()
    decoder = drawing.decoder
    assert decoder.waiting and 1 not in early and any(row in decoder.running for row in drawing.open[1].rows)
    gone = drawing.open[1].rows
    drawing.drop(1)
    assert not {*gone} & {*decoder.running, *decoder.waiting} and len(decoder.running) == len(decoder.batch.age_B)
    found = _to_the_end(drawing, early)
    assert set(found) == {0, 2}
    for number in found:
        assert _drawn(d.sample for d in found[number]) == _drawn(engine.draw([requests[number]]))
    drawing.add({7: requests[1]})
    drawing.drop(7)
    assert not drawing.turn() and not drawing.open


def test_a_prompt_too_long_joins_nothing_and_stops_nothing(folder):
    engine = _engine(folder)
    drawing = engine.drawing()
    drawing.add({0: _requests()[0]})
    drawing.turn()
    with pytest.raises(DataError, match="leaves no room"):
        drawing.add({1: Request(Prompt.of(" ".join(["the cat ran"] * 30), "train"), (1,))})
    assert _drawn(d.sample for d in _to_the_end(drawing)[0]) == _drawn(engine.draw(_requests()[:1]))


def test_memory_that_runs_out_starts_only_unfinished_answers_anew(folder, monkeypatch):
    """The fourth turn fails once: what was there is kept, the rest is drawn in half the batch, and the answers are the same."""
    engine = _engine(folder, max_new_tokens=40)
    whole, turn, rooms = engine.answers(_requests()), Decoder.turn, []

    def failing(self, room):
        rooms.append((room.rows, len(self.waiting) + len(self.running)))
        if len(rooms) == 4:
            raise RuntimeError("CUDA out of memory")
        return turn(self, room)

    monkeypatch.setattr(Decoder, "turn", failing)
    assert [d.ids for d in engine.answers(_requests())] == [d.ids for d in whole] and engine.halvings == 1
    rows = engine.settings.batch_size
    assert rooms[3][0] == rows and rooms[4] == (rows // 2, rooms[3][1]) and rooms[3][1] < rooms[0][1]
