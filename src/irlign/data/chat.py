"""The one place where text meets the tokenizer: the format that SFT, sampling, rewards and evaluation all use.

A row is `prompt_ids + completion_ids`, and `completion_ids` always end with EOS. The prompt is the text as it
stands (with BOS where the tokenizer adds one) or the chat template's rendering up to the assistant's turn. Special tokens
that stand in the user's own text, a `</s>` in a question, are plain text: only the template writes control tokens.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from irlign.errors import ConfigError, DataError, ModelError
from irlign.records import Message, PromptContent, is_text, prompt_identity

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that transformers' losses skip
BLOCK = 4096  # answers that are tokenized, sorted by length and scored together
STANDS_IN = 0x10F000  # from here on, private characters stand for the special tokens in the user's text until it is tokenized

TEMPLATES = {
    "hh": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '\n\nHuman: ' + m['content'] }}"
        "{% elif m['role'] == 'assistant' %}{{ '\n\nAssistant: ' + m['content'] | trim }}"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
    ),
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}


@dataclass(frozen=True)
class Encoded:
    """Token ids of one prompt and one completion; the completion ends with EOS unless it was cut."""

    prompt_ids: list[int]
    completion_ids: list[int]

    @property
    def ids(self) -> list[int]:
        return self.prompt_ids + self.completion_ids

    @property
    def labels(self) -> list[int]:
        """Loss on the completion only, its EOS included."""
        return [IGNORED] * len(self.prompt_ids) + self.completion_ids

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    def within(self, limit: int) -> "Encoded":
        """At most `limit` tokens (2 or more), for a model that reads no more: the completion loses its end but keeps its
        last token, then the prompt its start. Decoding and encoding again may have made a sample a few tokens longer."""
        if len(self) <= limit:
            return self
        prompt = self.prompt_ids[-(limit - 1) :]
        room = limit - len(prompt) - 1
        return Encoded(prompt, [*self.completion_ids[:-1][:room], self.completion_ids[-1]])


class Format:
    """How prompts and completions become token ids, for one tokenizer.

    `chat_template`: "auto" (the tokenizer's own; plain text where it has none), "none" (plain text), "hh", "chatml", a
    Jinja template, or the path of its file. With a template in force a plain string is one user message; without one, a conversation
    is an error. The template in force is set on the tokenizer, so that it is saved with every model.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", chat_template: str = "auto"):
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no EOS token, so no policy could learn to end its answer",
                where=tokenizer.name_or_path or None,
                do="set `eos_token` in its tokenizer_config.json",
            )
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.template = _resolve_template(chat_template, tokenizer)
        # An HH prompt ends in "Assistant:" (a space there would be a token of its own), so the answer brings the space.
        self.lead = " " if (self.template or "").endswith(TEMPLATES["hh"]) else ""
        tokenizer.chat_template = self.template
        special = sorted((t for t in tokenizer.added_tokens_decoder.values() if t.special), key=lambda t: -len(t.content))
        self._control_ids = {tokenizer.convert_tokens_to_ids(t.content) for t in special} - {tokenizer.unk_token_id}
        self._spelling = {STANDS_IN + i: t.content for i, t in enumerate(special)}
        self._stand_in = {t: chr(code) for code, t in self._spelling.items()}
        self._special = re.compile("|".join(re.escape(t.content) for t in special) or "(?!)")
        # As the tokenizer finds them: some take the spaces beside them along.
        own = (r"\s*" * t.lstrip + re.escape(t.content) + r"\s*" * t.rstrip for t in special)
        self._control = re.compile(f"({'|'.join(own) or '(?!)'})")

    def prompt_text(self, content: PromptContent) -> str:
        """The prompt as the model reads it, without BOS."""
        return self._rendered(content).translate(self._spelling)

    def holds_special(self, content: PromptContent, completion: str) -> bool:
        """Whether the prompt or the answer holds a special token, which is then read as plain text."""
        texts = [content] if isinstance(content, str) else [m["content"] for m in content]
        return any(self._special.search(text) for text in (*texts, self._before_eos(completion)))

    def _before_eos(self, completion: str) -> str:
        """Many files end an answer with the text of EOS: it is the end, as every answer has one, and no part of the answer."""
        return completion.removesuffix(str(self.tokenizer.eos_token))

    def _own(self, text: str) -> str:
        """The user's text with a private character in the place of each special token."""
        return self._special.sub(lambda found: self._stand_in[found[0]], text)

    def _rendered(self, content: PromptContent) -> str:
        """The prompt's text, where the special tokens of the user's own text are private characters."""
        if self.template is None:
            if isinstance(content, str):
                return self._own(content)
            raise DataError(
                "the data holds conversations, and this model has no chat template",
                where=self.tokenizer.name_or_path or None,
                do="say how turns are written: data.chat_template=chatml, hh, or the path of a Jinja template",
            )
        turns = [Message(role="user", content=content)] if isinstance(content, str) else content
        messages = [{**m, "content": self._own(m["content"])} for m in turns]
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))  # type: ignore[arg-type]
        except Exception as error:  # Jinja raises whatever the template asks for
            raise DataError(f"the chat template refuses this conversation: {error}", where=str(messages)[:200]) from error

    def _ids(self, texts: Sequence[str], bos: bool) -> list[list[int]]:
        """Token ids of rendered texts, with BOS where `bos` and the tokenizer adds one (a template has written its own)."""
        held = [not text.isascii() and text != text.translate(self._spelling) for text in texts]
        ordinary = iter(self._tokenized([text for text, special in zip(texts, held, strict=True) if not special], bos))
        return [self._spelled(text, bos) if special else next(ordinary) for text, special in zip(texts, held, strict=True)]

    def _spelled(self, text: str, bos: bool) -> list[int]:
        """Token ids of a text with private characters: the template's control tokens as they are, each stretch between them as
        plain text. Raises DataError where the tokenizer knows no spelling of a special token but the token itself.
        """
        ids: list[int] = []
        for number, piece in enumerate(self._control.split(text)):
            if number % 2:
                ids.append(int(self.tokenizer.convert_tokens_to_ids(piece.strip())))  # type: ignore[arg-type]
            elif piece:
                own = self._tokenized([piece.translate(self._spelling)], bos and not number, split_special_tokens=True)[0]
                added = self._tokenized([""], bos and not number)[0]
                if sum(i in self._control_ids for i in own) > sum(i in self._control_ids for i in added):
                    found = ", ".join(sorted({self._spelling[ord(c)] for c in piece if ord(c) in self._spelling}))
                    what = f"the text holds {found}, which this tokenizer reads as a control token wherever it stands"
                    where = repr(text.translate(self._spelling))[:80]
                    raise DataError(what, where=where, do="take it out of the data")
                ids += own
        return ids

    def _tokenized(self, texts: Sequence[str], bos: bool, **options: Any) -> list[list[int]]:
        if not texts:
            return []
        options |= {"add_special_tokens": bos, "return_attention_mask": False, "verbose": False}
        try:
            rows = self.tokenizer(list(texts), **options)["input_ids"]
        except (TypeError, UnicodeEncodeError) as error:
            torn = next((text for text in texts if not is_text(text)), None)
            if torn is None:
                raise
            raise DataError("holds half of a surrogate pair, which is no text", where=repr(torn)[:80], do="repair the text") from error
        eos = self.tokenizer.eos_token_id
        return [row[:-1] if bos and len(row) > 1 and row[-1] == eos else list(row) for row in rows]

    def prompt_ids(self, content: PromptContent) -> list[int]:
        """Token ids of the prompt; a model that adds no BOS and an empty prompt give an empty list, which is an error."""
        return self.prompts_ids([content])[0]

    def prompts_ids(self, contents: Sequence[PromptContent]) -> list[list[int]]:
        rows = self._ids([self._rendered(c) for c in contents], self.template is None)
        for content, row in zip(contents, rows, strict=True):
            if not row:
                raise DataError("a prompt gives no token at all", where=repr(content)[:80], do="remove it from the data")
        return rows

    def completion_ids(self, content: PromptContent, completion: str) -> list[int]:
        return self.encode([content], [completion])[0].completion_ids

    def encode(self, contents: Sequence[PromptContent], completions: Sequence[str]) -> list[Encoded]:
        """One row for each prompt and completion. Prompt and completion are tokenized together, so that a completion's
        leading space is the same token here as in running text; where the two would share a token, each is taken alone.
        """
        check_pairs(contents, completions)
        keys = [prompt_identity(c) for c in contents]
        distinct = dict(zip(keys, contents, strict=True))
        texts = {k: self._rendered(c) for k, c in distinct.items()}
        prompts = dict(zip(distinct, self.prompts_ids(list(distinct.values())), strict=True))
        completions = [self._own(self._before_eos(y)) for y in completions]
        completions = [y if y[:1].isspace() else self.lead + y for y in completions]
        whole = self._ids([texts[k] + y for k, y in zip(keys, completions, strict=True)], self.template is None)
        eos = self.tokenizer.eos_token_id
        rows = []
        for key, completion, ids in zip(keys, completions, whole, strict=True):
            head = prompts[key]
            tail = ids[len(head) :] if ids[: len(head)] == head else self._ids([completion], False)[0]
            rows.append(Encoded(head, [*tail, eos]))
        return rows

    def decode_completion(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
        """The text of sampled `ids` after `prompt_ids`, special tokens left out; the inverse of `encode` on its own output."""
        return self.decode_completions([prompt_ids], [ids])[0]

    def decode_completions(self, prompts: Sequence[Sequence[int]], ids: Sequence[Sequence[int]]) -> list[str]:
        """Decoded after the last few prompt tokens, since many tokenizers drop a leading space at the start of a text."""
        heads = [list(p)[-8:] for p in prompts]
        before = self._decode([*heads])
        after = self._decode([h + list(i) for h, i in zip(heads, ids, strict=True)])
        texts = [a[len(b) :] if a.startswith(b) else self._decode([list(i)])[0] for a, b, i in zip(after, before, ids, strict=True)]
        return [text.removeprefix(self.lead) for text in texts]

    def _decode(self, rows: list[list[int]]) -> list[str]:
        if not rows:
            return []
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def check_pairs(contents: Sequence[PromptContent], completions: Sequence[str]) -> None:
    """Raises DataError where these are not as many prompts as answers, each of them in a list."""
    if isinstance(contents, str) or isinstance(completions, str):
        raise DataError("prompts and answers come as two lists, and this is one text", do='write ["a prompt"], ["an answer"]')
    if len(contents) != len(completions):
        raise DataError(f"{len(contents)} prompts and {len(completions)} answers", do="give one answer for each prompt")


def _resolve_template(name: str, tokenizer: Any) -> str | None:
    if name == "auto":
        return tokenizer.chat_template
    if name == "none":
        return None
    if name in TEMPLATES:
        bos = tokenizer.bos_token_id  # a model that reads BOS before every text reads it before a conversation too
        starts = bos is not None and tokenizer("")["input_ids"][:1] == [bos]
        return ("{{ bos_token }}" if starts else "") + TEMPLATES[name]
    return template_text(name)


def template_text(name: str) -> str:
    """A template's name as it is; the text of a Jinja file, or such a text itself. Raises ConfigError where it is none of these."""
    if name in ("auto", "none", *TEMPLATES) or _is_jinja(name):
        return name
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    if not _is_jinja(text):
        what = "this file is no Jinja template" if Path(name).is_file() else f"no chat template {name!r}"
        do = f"use one of auto, none, {', '.join(TEMPLATES)}, or the path of a Jinja file"
        raise ConfigError(what, where="data.chat_template", do=do)
    return text


def template_in_words(name: str) -> str:
    """A setting of `chat_template` as a card says it."""
    own = "its tokenizer's own chat template" + (" (plain text where it has none)" if name == "auto" else "")
    return own if name == "auto" or _is_jinja(name) else "plain text" if name == "none" else f"the chat template `{name}`"


def _is_jinja(text: str) -> bool:
    return "{{" in text or "{%" in text


def context_length(config: Any) -> int:
    """The most tokens a model reads: `max_position_embeddings` of the (text) configuration; 2,048 where a model states none."""
    text = config.get_text_config()
    return int(getattr(text, "max_position_embeddings", None) or 2048)


def pad(rows: Sequence[Sequence[int]], pad_id: int, side: str = "right") -> tuple["torch.Tensor", "torch.Tensor"]:
    """`input_ids_B_T` and `attention_mask_B_T` of rows of different lengths, padded on one side."""
    import torch

    width = max(len(r) for r in rows)
    ids_B_T = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask_B_T = torch.zeros((len(rows), width), dtype=torch.long)
    for b, row in enumerate(rows):
        span = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids_B_T[b, span] = torch.tensor(row, dtype=torch.long)
        mask_B_T[b, span] = 1
    return ids_B_T, mask_B_T


def blocks(count: int) -> Iterator[slice]:
    """So many answers as ranges of at most BLOCK: each is tokenized and sorted by length alone, so that memory does not grow with their
    number, and a block scored elsewhere gives the same numbers."""
    for first in range(0, count, BLOCK):
        yield slice(first, min(first + BLOCK, count))


def length_sorted_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first, each at most `token_budget` padded tokens (or one row)."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= token_budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
