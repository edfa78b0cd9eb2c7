"""Texts for language models, a corpus a domain: files, folders or hub sets, each text once, tokenised, to be split by `tasks.views`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.files import CARD, write_json
from experiments.tasks.texts import Source, Text, read, without

TEXTS = "texts"  # what the one class of such data is called where rows are counted


def read_all(sources: Mapping[str, Source]) -> tuple[dict[str, list[Text]], list[str]]:
    """The texts of each domain, each once over all of them, and what was left out."""
    found: dict[str, list[Text]] = {}
    notes: list[str] = []
    earlier: list[Text] = []
    for domain, source in sources.items():
        texts = read(source)
        marks = {(text.context, text.text) for text in earlier}
        found[domain] = [text for text in without(texts, ()) if (text.context, text.text) not in marks]
        earlier += found[domain]
        if len(found[domain]) < len(texts):
            notes.append(
                f"{domain}: {len(texts) - len(found[domain])} texts that stand elsewhere too are left out"
            )
    return found, notes


def prepare(
    out: Path, *, sources: Mapping[str, Mapping[str, Any]], tokenizer: str, max_length: int, split_seed: int
) -> None:
    """Stage: `out/<domain>` as `datasets` on disk (tokens, document), and `out/data.json`. A context is not predicted.

    Raises:
        ValueError: a text of which no token is left to predict.
    """
    from datasets import Dataset, disable_progress_bars

    from experiments.models import load_tokenizer, locate
    from experiments.removal.language import encode

    disable_progress_bars()
    loaded = load_tokenizer(locate(tokenizer))
    found, notes = read_all({domain: Source.model_validate(own) for domain, own in sources.items()})
    domains: dict[str, Any] = {}
    for domain, texts in found.items():
        tokens = [encode(text, loaded, max_length) for text in texts]
        used = [row for row, (ids, context) in enumerate(tokens) if len(ids) > max(context, 1)]
        if len(used) < len(texts):
            notes.append(
                f"{domain}: {len(texts) - len(used)} texts have no token to predict within {max_length}, and are left out"
            )
        cut = sum(len(tokens[row][0]) >= max_length for row in used)
        if cut:
            notes.append(
                f"{domain}: {cut} of {len(used)} texts have {max_length} tokens or more, and are cut"
            )
        columns = {
            "input_ids": [tokens[row][0] for row in used],
            "attention_mask": [[1] * len(tokens[row][0]) for row in used],
            "context": [tokens[row][1] for row in used],
            "text": [texts[row].text for row in used],
            "document": [texts[row].document for row in used],
            "split": ["train"] * len(used),
            "labels": [0] * len(used),
        }
        Dataset.from_dict(columns).save_to_disk(out / domain)
        domains[domain] = {"first": 0, "classes": [TEXTS], "packaged": False}
    card = {"domains": domains, "pad": loaded.pad_token_id or 0, "notes": notes, "language": True}
    write_json(out / CARD, card)
