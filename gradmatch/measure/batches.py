"""Batches of tokenised texts: dicts of padded tensors with "labels".

No number depends on how the rows are batched: padding is on the right, where it moves no position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gradmatch.common.warning import warn

if TYPE_CHECKING:
    from torch import Tensor

LONGEST_BY_DEFAULT = 512  # tokens, where neither the tokenizer nor the model sets a limit
IGNORED = -100


class Batches:
    """Batches of examples, tokenised as they are asked for; they can be gone through any number of times.

    Args:
        texts: one or two texts an example.
        labels: (examples,) numbers, or None.
        tokenizer: of the model.
        predicts_text: the tokens are the labels, and two texts are read as one.
        batch_size: examples a batch.
        max_length: tokens; longer texts are cut, which is warned of.
        padding_side: "right", but for models that read the last position.
        marked: the texts hold the tokenizer's special tokens already, as conversations do.
        rows: of the source that hold an example, whatever part of them was drawn.
        notes: what is to be told of the reading: columns, and rows that were left out.

    >>> for batch in read("cook.txt", "HuggingFaceTB/SmolLM2-135M"):         # doctest: +SKIP
    ...     model(**batch).loss
    """

    def __init__(
        self,
        texts: Sequence[tuple[str, ...]],
        labels: Tensor | None,
        tokenizer: Any,
        *,
        predicts_text: bool,
        batch_size: int = 8,
        max_length: int = LONGEST_BY_DEFAULT,
        padding_side: str = "right",
        marked: bool = False,
        rows: int | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.dataset = self.texts = texts  # `dataset`: its length is what a progress bar counts to
        self.labels, self.tokenizer, self.predicts_text = labels, tokenizer, predicts_text
        self.batch_size, self.max_length, self.padding_side = batch_size, max_length, padding_side
        self.marked = marked
        self.rows, self.notes, self._warned = len(texts) if rows is None else rows, tuple(notes), False
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.texts) // self.batch_size)

    def __repr__(self) -> str:
        return f"Batches({'; '.join([f'{len(self.texts)} of {self.rows} examples', *self.notes])})"

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        cut = 0
        for first in range(0, len(self.texts), self.batch_size):
            batch = self._batch(slice(first, first + self.batch_size))
            cut += int((batch["attention_mask"].sum(1) >= self.max_length).sum())
            yield batch
        if cut and not self._warned:
            self._warned = True
            warn(
                f"{cut} of {len(self.texts)} texts were as long as {self.max_length} tokens or longer, and cut"
            )

    def _batch(self, rows: slice) -> dict[str, Tensor]:
        texts = self.texts[rows]
        columns = [list(map(_joined, texts))] if self.predicts_text else list(map(list, zip(*texts)))  # noqa: B905
        batch: dict[str, Tensor] = dict(
            self.tokenizer(
                *columns,
                truncation=True,
                max_length=self.max_length,
                padding=len(texts) > 1,
                padding_side=self.padding_side,
                return_attention_mask=True,
                add_special_tokens=not self.marked,
                return_tensors="pt",
            )
        )
        if self.predicts_text:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        elif self.labels is not None:
            batch["labels"] = self.labels[rows]
        return batch


def _joined(texts: tuple[str, ...]) -> str:
    """A pair as a language model reads it: one text after the other, a space between them where neither brings one."""
    space = len(texts) == 2 and not (texts[0][-1:].isspace() or texts[1][:1].isspace())
    return (" " if space else "").join(texts)


def longest_input(tokenizer: Any, config: Any, asked: int | None = None) -> int:
    """Tokens an example may have: what was asked for (else at most 512), within what tokenizer and model take.

    >>> from types import SimpleNamespace
    >>> longest_input(SimpleNamespace(model_max_length=512), SimpleNamespace(max_position_embeddings=128))
    128
    """
    known = [getattr(tokenizer, "model_max_length", None), getattr(config, "max_position_embeddings", None)]
    if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert") and known[1]:
        known[1] -= 2  # their positions start at 2
    limits = [int(limit) for limit in known if limit is not None and 0 < limit < 10**6]
    return min([*limits, asked or LONGEST_BY_DEFAULT])
