"""Conversations as a model reads them: the turns of a row, written as one text by the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.names import first_line

TOLD = "conversations, written by the chat template of the tokenizer; every token of theirs counts"


def is_chat(value: Any) -> bool:
    """Whether a value is a list of turns."""
    return isinstance(value, list) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def written(turns: Any, tokenizer: Any, where: str) -> str:
    """One conversation as text, with the marks that the template sets between turns.

    Args:
        turns: a table each, with "role" and "content".
        tokenizer: of the model; None where there is none.
        where: data and row, for messages.

    Raises:
        GradmatchError: turns of another form, no chat template, or one that does not take them.
    """
    lacking = [turn for turn in turns if not {"role", "content"} <= set(turn)]
    if lacking:
        raise GradmatchError(
            f"{where} holds a conversation whose turns have {', '.join(map(str, lacking[0]))}", "not_text", where,
            "a turn has role and content; rename them",
        )  # fmt: skip
    if not getattr(tokenizer, "chat_template", None):
        raise GradmatchError(
            f"{where} holds a conversation, and the model's tokenizer has no chat template to write it by", "not_text", where,
            "save it with one (tokenizer.chat_template = ...), or give a column of texts",
        )  # fmt: skip
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # a template raises what it likes
        raise GradmatchError(
            f"{where}: the chat template does not take this conversation ({first_line(error)})", "not_text", where,
            "mend the row, or leave it out",
        ) from error  # fmt: skip
    return text
