"""pi_0 of a world: a tokenizer that keeps every space, and a cache by content."""

import pytest

from irlign.files import hash_path
from irlign.policy.pretrain import PretrainSettings, pretrain, word_tokenizer
from irlign.records import Message

CORPUS = [("Ask me?", " Say this. Then stop."), ("And me?", " No.")] * 8
WORDS = ["Ask me?", "And me?", "Say this. Then stop.", "No."]
SMALL = PretrainSettings(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_train_epochs=1)


def _pretrain(folder, settings=SMALL, corpus=CORPUS, seed=0):
    return pretrain(corpus, WORDS, settings, folder=folder / "init", checkpoints=folder / "checkpoints", seed=seed)


def test_the_tokenizer_keeps_text_as_it_is():
    tokenizer = word_tokenizer(WORDS, 64)
    for text in ("Ask me? Say this.", " No. No.", "Then stop.\n\nAsk me"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id in tokenizer("unheard")["input_ids"]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_number_is_one_token():
    tokenizer = word_tokenizer(["7 plus 15 is 22."], 64)
    assert tokenizer.tokenize(" 7 plus 15 is 22.") == [" 7", " plus", " 15", " is", " 22", "."]


def test_a_world_that_speaks_in_turns_gives_pi_0_its_template(tmp_path, monkeypatch):
    from irlign.data.chat import TEMPLATES, Format
    from irlign.policy.load import load_tokenizer

    monkeypatch.setenv("IRLIGN_CACHE", str(tmp_path / "cache"))
    turns = [((Message(role="user", content="Ask me?"),), "Say this.")] * 8
    words = {"folder": tmp_path / "init", "checkpoints": tmp_path / "checkpoints", "seed": 0}
    pretrain(turns, [*WORDS, "Human: Assistant:"], SMALL, chat_template="hh", **words)
    form = Format(load_tokenizer(str(tmp_path / "init")), "auto")
    assert form.template == TEMPLATES["hh"]
    row = form.encode([turns[0][0]], ["Say this."])[0]
    assert form.tokenizer.decode(row.ids) == "\n\nHuman: Ask me?\n\nAssistant: Say this.<eos>"
    assert form.decode_completion(row.prompt_ids, row.completion_ids) == "Say this."


def test_the_cache_is_keyed_by_content(tmp_path, monkeypatch):
    monkeypatch.setenv("IRLIGN_CACHE", str(tmp_path / "cache"))
    first, second = _pretrain(tmp_path / "a"), _pretrain(tmp_path / "b")
    assert (first["cached"], second["cached"]) == (False, True) and first["losses"] == second["losses"]
    assert hash_path(tmp_path / "a/init") == hash_path(tmp_path / "b/init")
    for i, change in enumerate(({"seed": 1}, {"corpus": CORPUS[:-1]}, {"settings": SMALL.model_copy(update={"learning_rate": 1e-3})})):
        assert not _pretrain(tmp_path / f"c{i}", **change)["cached"]


def test_the_cache_replaces_what_a_killed_attempt_left(tmp_path, monkeypatch):
    monkeypatch.setenv("IRLIGN_CACHE", str(tmp_path / "cache"))
    _pretrain(tmp_path / "a")
    (tmp_path / "b/init").mkdir(parents=True)
    (tmp_path / "b/init/torn").write_text("half a file")
    assert _pretrain(tmp_path / "b")["cached"] and hash_path(tmp_path / "a/init") == hash_path(tmp_path / "b/init")


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IRLIGN_CACHE", str(tmp_path / "file/cache"))
    assert not _pretrain(tmp_path / "a")["cached"] and (tmp_path / "a/init/model.safetensors").is_file()


def test_plain_transformers_loads_it(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("IRLIGN_CACHE", str(tmp_path / "cache"))
    _pretrain(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "init"), AutoTokenizer.from_pretrained(tmp_path / "init")
    assert model.config.model_type == "llama" and model.config.vocab_size == len(tokenizer)
    assert tokenizer.eos_token_id == model.config.eos_token_id


def test_the_default_size_is_what_it_says():
    from irlign.policy.pretrain import _small_llama
    from irlign.recipe import WORLDS

    for world in WORLDS.values():
        model = _small_llama(word_tokenizer(world.vocabulary(), 256), PretrainSettings())
        assert 300_000 <= sum(p.numel() for p in model.parameters()) <= 500_000


def test_training_that_fails_is_not_cached(tmp_path, monkeypatch):
    from irlign.errors import ModelError

    monkeypatch.setenv("IRLIGN_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match="diverged"):
        _pretrain(tmp_path, SMALL.model_copy(update={"learning_rate": 1e30, "num_train_epochs": 5, "per_device_train_batch_size": 2}))
    assert not list((tmp_path / "cache").rglob("model.safetensors"))
