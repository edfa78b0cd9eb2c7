"""A second scorer that does not look at words alone: a logistic regression on sentence embeddings of the packaged encoder.

Trained on pairs of toxic sentences and their neutral rewrites (a file with one column of each, as ParaDetox), so that topic tells
nothing; how often it is right on held-out pairs is printed with its numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from experiments import assets
from experiments.files import write_json

Array = NDArray[np.float64]
FILE = "judge.npz"


@torch.inference_mode()
def embedded(texts: Sequence[str], encoder: str = "encoder", batch_size: int = 32) -> Array:
    """(n, width) mean over tokens of the encoder's last layer, of norm 1."""
    from transformers import AutoModel, AutoTokenizer

    place = assets.folder(encoder) if encoder in assets.ASSETS else encoder
    tokenizer, model = AutoTokenizer.from_pretrained(place), AutoModel.from_pretrained(place).eval()
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    found: list[Array] = [np.zeros(0)] * len(texts)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        batch = tokenizer(
            [texts[index] or " " for index in chosen], padding=True, truncation=True, max_length=64, return_tensors="pt"
        )  # fmt: skip
        mask = batch["attention_mask"][..., None]
        mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        for index, row in zip(chosen, torch.nn.functional.normalize(mean, dim=-1), strict=True):
            found[index] = row.double().numpy()
    return np.stack(found)


def train(out: Path, *, source: str, toxic: str, neutral: str, pairs: int, encoder: str, seed: int) -> None:
    """Stage: fit on nine tenths of the pairs, judge the rest: `out/judge.npz`, `out/judge.json` (accuracy, counts)."""
    from sklearn.linear_model import LogisticRegression

    from gradmatch.measure.tables import Table

    rows = [(str(row[toxic] or ""), str(row[neutral] or "")) for row in Table(source)]
    rows = sorted({(bad, good) for bad, good in rows if bad.strip() and good.strip()})
    order = np.random.default_rng(seed).permutation(len(rows))[:pairs]
    chosen = [rows[index] for index in order]
    cut = max(1, len(chosen) // 10)
    x = embedded([text for pair in chosen for text in pair], encoder)
    y = np.tile([1, 0], len(chosen))
    model = LogisticRegression(C=10.0, max_iter=1000).fit(x[2 * cut :], y[2 * cut :])
    np.savez(out / FILE, weight=model.coef_[0], bias=model.intercept_)
    write_json(
        out / "judge.json",
        {
            "accuracy": float(model.score(x[: 2 * cut], y[: 2 * cut])),
            "held_out": 2 * cut,
            "trained_on": 2 * (len(chosen) - cut),
        },
    )


def score(texts: Sequence[str | None], judge: Path, encoder: str) -> Array:
    """(n,) probability of toxic; NaN for None, and for a text without words, of which it would say anything."""
    known: Any = np.load(judge / FILE)
    found = np.full(len(texts), np.nan)
    given = [index for index, text in enumerate(texts) if text and text.strip()]
    if given:
        x = embedded([str(texts[index]) for index in given], encoder)
        found[given] = 1 / (1 + np.exp(-(x @ known["weight"] + known["bias"])))
    return found
