"""The running batch against the model itself: logits, greedy text, and rows that come and go."""

import numpy as np
import pytest
import torch
from families import FAMILIES, HYBRIDS, make_model

from irlign.sampling.attention import attention
from irlign.sampling.decoder import ALL_THERE, MORE_MAY_COME, Decoder, Room, Row
from irlign.sampling.engine import SamplingSettings
from irlign.sampling.state import CopiedState, SharedState, serves

PROMPTS = [(1, 7, 9, 11, 4, 8, 20, 31), (1, 5), (1, 30, 22, 6, 17)]
ENDS = {2, 10, 11}
STATES = {"shared": SharedState, "copied": CopiedState}


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request):
    return make_model(request.param)


def _own(model, texts):
    """What the model says after each text by itself, without a cache."""
    with torch.inference_mode():
        return torch.stack([model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1] for text in texts])


def test_logits_are_the_models_own_while_rows_leave_and_join(model):
    """Texts longer than the window of 5, more steps than the room grows by, rows of three prompts, two cohorts."""
    assert serves(model, 3)
    state, rng = SharedState(model, 3), np.random.default_rng(0)
    texts = [list(PROMPTS[p]) for p in (0, 0, 1, 1, 1, 2)]
    with torch.inference_mode(), attention(model, state.attention_name):
        found = [state.add(PROMPTS, np.array([0, 0, 1, 1, 1, 2]))]
        for step in range(20):
            tokens = torch.from_numpy(rng.integers(4, 60, len(texts)))
            texts = [[*text, int(token)] for text, token in zip(texts, tokens, strict=True)]
            found.append(state.step(tokens, torch.tensor([len(text) - 1 for text in texts])))
            with attention(model, state.own_attention):
                assert (found[-1] - _own(model, texts)).abs().max() < 1e-4, step
            if step == 6:  # prompt 2 loses all its rows, prompt 1 its middle one
                state.keep(np.array([0, 1, 2, 4]))
                texts = [texts[i] for i in (0, 1, 2, 4)]
            if step == 11:
                state.add([PROMPTS[1], PROMPTS[0]], np.array([0, 0, 1]))
                texts += [list(PROMPTS[p]) for p in (1, 1, 0)]
            if step == 14:  # the first cohort is left with one row, then with none
                state.keep(np.array([1, 4, 5, 6]))
                texts = [texts[i] for i in (1, 4, 5, 6)]
            if step == 17:
                state.keep(np.array([1, 3]))
                texts = [texts[i] for i in (1, 3)]
    assert len(state.cache.cohorts) == 1 and len(texts[1]) == 8 + 8


@pytest.mark.parametrize("kind", STATES)
def test_greedy_text_is_what_generate_gives(model, kind):
    rows = [Row(PROMPTS[p], seed, 24) for p in (0, 1, 2) for seed in (1, 2)]
    ids, logprobs = _decode(model, rows, kind, room=Room(4, 10**6), top_k=1)
    for row, got, logprob in zip(rows, ids, logprobs, strict=True):
        prompt = torch.tensor([row.prompt])
        whole = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=24)[0].tolist()
        assert [*row.prompt, *got] == whole
        places = range(len(row.prompt), len(whole))
        own = [float(_own(model, [whole[:n]])[0].log_softmax(-1)[whole[n]]) for n in places]
        assert list(logprob) == pytest.approx(own, abs=1e-4)


def _decode(model, rows, kind="shared", room=None, ends=(2,), **settings):
    """All rows to their ends: ids and log-probabilities of each."""
    decoder = _decoder(model, kind, ends, **settings)
    decoder.add(rows)
    found = {}
    while len(found) < len(rows):
        found |= {row: (ids, logprobs) for row, ids, logprobs in decoder.turn(room or Room(64, 10**6))}
    return tuple([found[row][part] for row in rows] for part in (0, 1))


def _decoder(model, kind="shared", ends=(2,), joining=ALL_THERE, **settings):
    about = {"ends": ends, "context": 64, "stopped": lambda rows, _: np.zeros(len(rows), bool), "joining": joining}
    return Decoder(STATES[kind](model, 3), SamplingSettings(**settings), **about)


@pytest.mark.parametrize(
    "room", [Room(1, 10**6), Room(7, 10**6), Room(64, 150), Room(64, 900, row_tokens=40)], ids=["1 row", "7 rows", "tokens", "logits"]
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_row_is_the_same_whatever_runs_beside_it(family, room):
    """Few rows, few tokens: other batches, other cohorts, prompts computed twice."""
    model = make_model(family)
    rows = [Row(PROMPTS[i % 3], 100 + i, 10 + i) for i in range(20)]
    together, apart = (_decode(model, rows, room=r, ends=ENDS) for r in (None, room))
    assert apart[0] == together[0] and len({tuple(ids) for ids in together[0]}) == 20
    for a, b in zip(apart[1], together[1], strict=True):
        assert list(a) == pytest.approx(list(b), abs=1e-4)
    assert any(ids[-1] in ENDS for ids in together[0]) and not any(ENDS & set(ids[:-1]) for ids in together[0])
    assert any(len(ids) == row.limit for ids, row in zip(together[0], rows, strict=True))
    assert _decode(model, rows, "copied", room, ENDS)[0] == together[0]


def test_the_room_is_kept(monkeypatch):
    model, seen = make_model("llama"), []
    step = SharedState.step

    def watched(self, token_B, position_B):
        seen.append((len(token_B), 16 * len(token_B) + self.prompt_tokens, len(self.cache.cohorts)))
        return step(self, token_B, position_B)

    monkeypatch.setattr(SharedState, "step", watched)
    rows = [Row(PROMPTS[i // 8 % 3], i, 16) for i in range(48)]
    _decode(model, rows, room=Room(12, 10**6), ends=range(2, 8))
    assert max(s[0] for s in seen) == 12 and max(s[2] for s in seen) > 1  # freed places are taken again
    seen.clear()
    _decode(model, rows, room=Room(48, 100))
    assert 50 < max(s[1] for s in seen) <= 100


@pytest.mark.parametrize(
    ("late", "joining", "turns"),
    [(2, MORE_MAY_COME, 1), (1, MORE_MAY_COME, 5), (1, ALL_THERE, 1)],
    ids=["a quarter", "fewer", "none more come"],
)
def test_few_that_come_late_are_held_back_for_a_while(late, joining, turns):
    """Beside eight rows, two may join at once and one after four turns, where more may come."""
    decoder, room = _decoder(make_model("llama"), ends=(), joining=joining), Room(64, 10**6)
    decoder.add([Row(PROMPTS[0], seed, 50) for seed in range(8)])
    decoder.turn(room)
    decoder.add([Row(PROMPTS[1], seed, 50) for seed in range(late)])
    waited = next(n for n in range(1, 99) if not decoder.turn(room) and not decoder.waiting)
    assert waited == turns and len(decoder.running) == 8 + late


def test_those_that_are_dropped_leave_at_once():
    """The last row of a batch, a waiting one, and a row between others, whose answers stay what they were."""
    model, room = make_model("llama"), Room(3, 10**6)
    rows = [Row(PROMPTS[i % 3], i, 30) for i in range(5)]
    whole = _decode(model, rows, ends=())[0]
    decoder, found = _decoder(model, ends=()), {}
    decoder.add(rows)
    decoder.turn(room)
    decoder.drop([rows[1], rows[4]])
    assert set(decoder.running) == {rows[0], rows[2]} and decoder.waiting == [rows[3]]
    while decoder.waiting or decoder.running:
        found |= {row: ids for row, ids, _ in decoder.turn(room)}
    assert found == {rows[i]: whole[i] for i in (0, 2, 3)}
    decoder.add(rows[:1])
    decoder.turn(room)
    decoder.drop(rows)
    assert decoder.turn(room) == [] and not decoder.running and not decoder.state.prompt_tokens


def test_a_model_that_keeps_another_state_is_served_by_copies():
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    model = BloomForCausalLM(
        BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    )
    assert not serves(model.eval(), 3)


@pytest.mark.parametrize("family", HYBRIDS)
def test_models_that_keep_states_beside_keys_and_values_are_served_by_copies(family):
    """Greedy text is that of the whole text read anew, in a batch that rows leave one by one: prompts of three lengths, answers of four."""
    model = make_model(family)
    assert not serves(model, 3)
    texts, limits = [list(PROMPTS[p]) for p in (0, 0, 1, 1, 2)], (3, 12, 7, 12, 5)
    rows = [Row(tuple(text), seed, limit) for seed, (text, limit) in enumerate(zip(texts, limits, strict=True))]
    ids, _ = _decode(model, rows, "copied", Room(8, 10**6), ends=(99,), top_k=1)
    for _ in range(max(limits)):
        following = [int(_own(model, [text])[0].argmax()) for text in texts]
        texts = [[*text, token] for text, token in zip(texts, following, strict=True)]
    for row, drawn, text, limit in zip(rows, ids, texts, limits, strict=True):
        assert list(drawn) == text[len(row.prompt) :][:limit]
    assert len({int(token) for drawn in ids for token in drawn}) > 5
