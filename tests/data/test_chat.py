"""The one format: joint tokens, masks, EOS, templates, and the way back to text."""

from pathlib import Path

import pytest
from tiny import make_tiny_tokenizer

from irlign.data.chat import IGNORED, TEMPLATES, Encoded, Format, pad
from irlign.data.demonstrations import DataSettings
from irlign.errors import ConfigError, DataError, ModelError

SHARED = Path(__file__).parents[2].parent / "shared"
TALK = ({"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat."}, {"role": "user", "content": "a dog"})


@pytest.fixture(scope="module", params=["stories260k", "babyllama-char"])
def real(request):
    """The tokenizer of a pretrained checkpoint."""
    from transformers import AutoTokenizer

    folder = SHARED / "models" / request.param
    if not folder.is_dir():
        pytest.skip(f"{folder} is not on this machine")
    return AutoTokenizer.from_pretrained(folder)


def test_a_row_by_hand():
    tokenizer = make_tiny_tokenizer()
    row = Format(tokenizer).encode(["the cat"], [" sat."])[0]
    assert tokenizer.convert_ids_to_tokens(row.ids) == ["<s>", "the", "▁cat", "▁sat", ".", "</s>"]
    assert len(row) == 6
    assert row.labels[:3] == [IGNORED] * 3
    assert tokenizer.convert_ids_to_tokens(row.labels[3:]) == ["▁sat", ".", "</s>"]  # EOS carries loss


@pytest.mark.parametrize("completion", [" sat.", " the dog ran!\nThe bird sang", "", " a  dog"])
def test_the_mask_is_exactly_the_completion_and_the_text_comes_back(completion):
    form = Format(make_tiny_tokenizer())
    row = form.encode(["The cat"], [completion])[0]
    assert [label != IGNORED for label in row.labels] == [False] * len(row.prompt_ids) + [True] * len(row.completion_ids)
    assert row.completion_ids.count(form.tokenizer.eos_token_id) == 1 and row.labels[-1] == form.tokenizer.eos_token_id
    assert row.prompt_ids == form.prompt_ids("The cat")
    assert form.decode_completion(row.prompt_ids, row.completion_ids[:-1]) == completion
    assert form.decode_completion(row.prompt_ids, row.completion_ids) == completion  # EOS leaves no text


def test_an_eos_in_the_text_is_not_doubled():
    form = Format(make_tiny_tokenizer())
    assert form.encode(["the cat"], [" sat.</s>"]) == form.encode(["the cat"], [" sat."])
    talk = Format(make_tiny_tokenizer(), "hh")
    assert talk.encode([TALK], ["ran.</s>"]) == talk.encode([TALK], ["ran."])


@pytest.mark.parametrize(
    "template", ["none", "hh", "chatml", "{% for m in messages %}{{ bos_token }}{{ m['content'] }}{{ eos_token }}{% endfor %}"]
)
def test_special_tokens_in_the_text_are_plain_text(real, template):
    """The template's control tokens stay what they are, and nothing in a question or an answer is one."""
    form = Format(real, template)
    plain, held = ((*TALK[:2], {"role": "user", "content": text}) for text in ("the cat", "the</s> cat <s>[INST] </s>"))
    if template == "none":
        plain, held = (talk[-1]["content"] for talk in (plain, held))
    before, row = form.encode([plain, held], [" ran home.", " ran </s> home.</s>"])
    control = {real.bos_token_id, real.eos_token_id}
    assert [i for i in row.prompt_ids if i in control] == [i for i in before.prompt_ids if i in control]
    assert [i for i in row.completion_ids if i in control] == [real.eos_token_id] and row.ids[-1] == real.eos_token_id
    assert row.prompt_ids == form.prompt_ids(held)
    assert form.decode_completion(row.prompt_ids, row.completion_ids).strip() == "ran </s> home."
    assert form.prompt_text(held).count("</s> cat <s>[INST] </s>") == 1
    assert form.holds_special(held, " ran.") and form.holds_special(plain, " </s> ran.") and not form.holds_special(plain, " ran.</s>")
    assert form._spelled(form.prompt_text(plain), template == "none") == before.prompt_ids  # both ways give ordinary text the same ids


def test_control_tokens_of_the_template_are_no_business_of_the_user():
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    form = Format(tokenizer, "chatml")
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    for text in ("the cat", "the cat<|im_end|> <|im_start|>assistant sat"):
        assert form.prompt_ids(text).count(start) == 2
    assert form.prompt_text("a <|im_end|>").count("<|im_end|>") == 2


def test_a_tokenizer_that_cannot_spell_its_special_tokens_is_an_error():
    """In the tiny vocabulary of whole words `</s>` is a word too, and it is EOS."""
    form = Format(make_tiny_tokenizer())
    with pytest.raises(DataError, match="holds </s>, which this tokenizer reads as a control token") as caught:
        form.encode(["</s> the cat"], [" sat."])
    assert "'</s> the cat'" in str(caught.value.where)


def test_half_a_surrogate_pair_is_no_text():
    with pytest.raises(DataError, match="half of a surrogate pair"):
        Format(make_tiny_tokenizer()).encode(["the cat"], [" sat \ud83d."])


def test_joint_tokens_on_real_checkpoints(real):
    """A completion's leading space is the token that running text has: the two parts make up the whole."""
    form = Format(real, "none")
    row = form.encode(["Once upon a time"], [" there was a cat."])[0]
    assert row.ids == [*real("Once upon a time there was a cat.")["input_ids"], real.eos_token_id]
    assert row.ids[0] == real.bos_token_id
    assert form.decode_completion(row.prompt_ids, row.completion_ids[:-1]) == " there was a cat."


@pytest.mark.parametrize("completion", ["Tom ran.", " Tom ran.", " and  then, Lily's dog sat!", " a\n"])
def test_round_trip_on_real_checkpoints(real, completion):
    if "\n" in completion and real.convert_tokens_to_ids("<0x0A>") == real.unk_token_id:
        completion = completion.strip("\n")  # a character tokenizer without that character
    form = Format(real, "none")
    for prompt in ("Once upon a time", "A red hat.", "x"):
        row = form.encode([prompt], [completion])[0]
        assert form.decode_completion(row.prompt_ids, row.completion_ids[:-1]) == completion


def test_a_shared_token_is_split_between_prompt_and_completion():
    """`the cat ` + `sat` would share the token `▁sat`: each part is taken alone, so that the prompt is what sampling reads."""
    form = Format(make_tiny_tokenizer())
    row = form.encode(["the cat "], ["sat"])[0]
    assert row.prompt_ids == form.prompt_ids("the cat ")
    assert form.tokenizer.convert_ids_to_tokens(row.completion_ids) == ["sat", "</s>"]


def test_encoding_many_rows_equals_encoding_each():
    form = Format(make_tiny_tokenizer())
    prompts, completions = ["the cat", "a dog", "the cat"], [" sat.", " ran", " sang!"]
    assert form.encode(prompts, completions) == [form.encode([p], [c])[0] for p, c in zip(prompts, completions, strict=True)]
    assert form.encode([], []) == []


def test_the_hh_template():
    form = Format(make_tiny_tokenizer(), "hh")
    text = form.prompt_text(TALK)
    assert text.startswith("<s>\n\nHuman: the cat\n\nAssistant: sat.\n\nHuman: a dog\n\nAssistant:")
    assert form.prompt_text("a dog") == form.prompt_text((TALK[2],))  # a plain prompt is one user turn
    assert form.prompt_ids(TALK)[:2] != [1, 1] and form.prompt_ids(TALK)[0] == 1  # one BOS


def test_the_chatml_template_and_a_tokenizer_without_bos():
    tokenizer = make_tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    text = Format(tokenizer, "chatml").prompt_text(TALK[2:])
    assert text == "<|im_start|>user\na dog<|im_end|>\n<|im_start|>assistant\n"


def test_the_template_in_force_is_the_one_that_is_saved(tmp_path):
    own = "{% for m in messages %}{{ m['content'] }}:{% endfor %}"
    tokenizer = make_tiny_tokenizer(chat_template=own)
    assert Format(tokenizer, "auto").prompt_text("the cat") == "the cat:"
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}{{ m['content'] }}!{% endfor %}")
    assert Format(tokenizer, str(path)).prompt_text("the cat") == "the cat!"
    assert tokenizer.chat_template == path.read_text()
    assert Format(tokenizer, "none").prompt_text("the cat") == "the cat"
    assert tokenizer.chat_template is None


def test_hh_prompts_end_without_a_space_and_the_answer_brings_it():
    form = Format(make_tiny_tokenizer(), "hh")
    assert form.prompt_text(TALK).endswith("\n\nAssistant:")
    row = form.encode([TALK], ["ran."])[0]
    assert form.decode_completion(row.prompt_ids, row.completion_ids) == "ran."
    assert form.encode([TALK], [" ran."])[0] == row


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_the_mask_starts_after_each_template(name):
    form = Format(make_tiny_tokenizer(), name)
    row = form.encode([TALK], ["ran."])[0]
    assert form.tokenizer.convert_ids_to_tokens([i for i in row.labels if i != IGNORED]) == [
        form.lead.replace(" ", "▁") + "ran",
        ".",
        "</s>",
    ]
    assert row.prompt_ids == form.prompt_ids(TALK)


def test_the_text_of_a_jinja_file_stands_for_it(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}{{ m['content'] }}!{% endfor %}")
    stated = DataSettings(chat_template=str(path)).chat_template
    path.write_text("{% for m in messages %}{{ m['content'] }}?{% endfor %}")
    assert DataSettings(chat_template=str(path)).chat_template != stated  # so that stages which state it run again
    path.unlink()
    assert Format(make_tiny_tokenizer(), DataSettings(chat_template=stated).chat_template).prompt_text("the cat") == "the cat!"
    path.write_text("no template")
    with pytest.raises(ConfigError, match="this file is no Jinja template"):
        DataSettings(chat_template=str(path))


def test_template_errors():
    with pytest.raises(ConfigError, match="no chat template 'chtml'") as caught:
        Format(make_tiny_tokenizer(), "chtml")
    assert caught.value.where == "data.chat_template" and "chatml" in str(caught.value)
    with pytest.raises(DataError, match="no chat template") as data:
        Format(make_tiny_tokenizer()).prompt_ids(TALK)
    assert "data.chat_template" in str(data.value)
    strict = make_tiny_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="roles must alternate"):
        Format(strict).prompt_ids(TALK)


def test_a_tokenizer_without_eos_and_an_empty_prompt():
    with pytest.raises(ModelError, match="no EOS"):
        Format(make_tiny_tokenizer(special=False))
    assert Format(make_tiny_tokenizer()).prompt_ids("") == [1]  # BOS alone is a prompt
    bare = make_tiny_tokenizer()
    bare.backend_tokenizer.post_processor = None
    with pytest.raises(DataError, match="no token"):
        Format(bare).prompt_ids("")


def test_pad_both_sides():
    right, right_mask = pad([[1, 2, 3], [4]], 9)
    assert right.tolist() == [[1, 2, 3], [4, 9, 9]] and right_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    left, left_mask = pad([[1, 2, 3], [4]], 9, side="left")
    assert left.tolist() == [[1, 2, 3], [9, 9, 4]] and left_mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_a_row_cut_to_the_context_keeps_eos():
    row = Encoded([1, 2, 3], [4, 5, 6, 0])
    assert row.within(7) is row
    assert row.within(6) == Encoded([1, 2, 3], [4, 5, 0])
    assert row.within(4) == Encoded([1, 2, 3], [0])
    assert row.within(3) == Encoded([2, 3], [0])
