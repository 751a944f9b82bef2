"""Prompt and answer as the two sides of an encoder's text pair, in the tokenizer's own frame: `[CLS] prompt [SEP] answer [SEP]`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from irlign.data.chat import Encoded, check_pairs
from irlign.records import PromptContent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAIR = "pair"  # stands for this form where a reward names its chat template


def plain_text(content: PromptContent) -> str:
    """A conversation as its turns, a blank line between."""
    return content if isinstance(content, str) else "\n\n".join(m["content"] for m in content)


class PairFormat:
    """`data/chat.py`'s Format for an encoder. A pair past `limit` tokens loses the end of its longer side. No segment ids: both sides are
    told apart by the separator alone, and the tokenizer is saved so that other tools do the same."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", limit: int):
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        self.tokenizer, self.limit, self.chat_template = tokenizer, min(limit, tokenizer.model_max_length), PAIR

    def encode(self, contents: Sequence[PromptContent], completions: Sequence[str]) -> list[Encoded]:
        """One row for each prompt and answer; the whole pair stands as its completion."""
        check_pairs(contents, completions)
        texts = [plain_text(content) for content in contents]
        rows = self.tokenizer(texts, list(completions), truncation="longest_first", max_length=self.limit)["input_ids"] if texts else []
        return [Encoded([], list(row)) for row in rows]
