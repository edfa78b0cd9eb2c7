"""How well something was forgotten, as TOFU (Maini et al. 2024) and its successors measure it, each variant by its name.

Log-likelihoods are of answers, summed over their tokens (the end counts, the question and padding do not), with those counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
VARIANTS = ("geometric", "arithmetic", "normalised")


def truth_ratio(paraphrase: Array, wrong: Array, variant: str = "geometric") -> Array:
    """How much likelier wrong answers are than the paraphrased right one; (n,).

    paraphrase: (n,) mean log-likelihood of a token; wrong: (n, k) of k wrong answers.
    geometric (TOFU's code): exp(mean_j wrong_j - paraphrase); arithmetic (TOFU's paper): mean_j exp(wrong_j) / exp(paraphrase);
    normalised: p / (p + mean geometric wrong), which is high where the right answer is known.

    Example:
        >>> import numpy as np
        >>> right, wrong = np.log([0.5]), np.log([[0.4, 0.1]])
        >>> [round(float(truth_ratio(right, wrong, v)[0]), 3) for v in VARIANTS]
        [0.4, 0.5, 0.714]
    """
    together = np.exp(wrong.mean(1))
    if variant == "geometric":
        return np.asarray(together / np.exp(paraphrase))
    if variant == "arithmetic":
        return np.asarray(np.exp(wrong).mean(1) / np.exp(paraphrase))
    if variant == "normalised":
        return np.asarray(np.exp(paraphrase) / (np.exp(paraphrase) + together))
    raise ValueError(f"{variant!r} is no form of the truth ratio; choose one of {', '.join(VARIANTS)}")


def forget_quality(edited: Array, retrained: Array) -> float:
    """p of a two-sided two-sample Kolmogorov-Smirnov test on truth ratios: high where the edited model's are like the retrained one's.

    A model that has forgotten too much differs too, so it is low there.
    """
    from scipy.stats import ks_2samp

    return float(ks_2samp(edited, retrained).pvalue)


def extraction_strength(right: Sequence[bool]) -> float:
    """1 - k / n, k the least number of answer tokens that must be given until greedy decoding gets all of the n - k others right.

    right: whether each answer token is the most probable one, those before it given. No token right: 0, and not 1 / n.

    Example:
        >>> [extraction_strength(r) for r in ([False] * 5, [False] * 4 + [True], [True] * 5)]
        [0.0, 0.2, 1.0]
    """
    if not len(right):
        raise ValueError("an answer without tokens has no extraction strength")
    suffix = 0
    for hit in reversed(list(right)):
        if not hit:
            break
        suffix += 1
    return round(suffix / len(right), 12)


def utility(parts: Mapping[str, float]) -> float:
    """Harmonic mean of the model's scores on what must stay; 0 where one is."""
    values = list(parts.values())
    if any(value < 0 for value in values):
        raise ValueError(f"scores must be at least 0, got {dict(parts)}")
    return 0.0 if min(values) == 0 else len(values) / sum(1 / value for value in values)


def any_of(scores: Array, threshold: float) -> dict[str, float]:
    """Of k continuations a prompt, (n, k): `share`, of continuations above the threshold, and `any`, of prompts with one among k.

    `any` and the expected maximum rise with k; `share` does not, so that alone is compared between studies.
    """
    over = scores > threshold
    return {"k": float(scores.shape[1]), "share": float(over.mean()), "any": float(over.any(1).mean())}


def broken(text: str) -> bool:
    """Whether a continuation is empty, or goes in circles: three words of which fewer than a third are different, or one letter."""
    words = text.split()
    if not any(letter.isalnum() for letter in text):
        return True
    return len(words) >= 6 and len({word.lower() for word in words}) * 3 < len(words)


def needed(spread: float, difference: float, power: float = 0.8) -> int:
    """Continuations a model that a difference of mean scores needs to be seen (two-sided 5 %, unpaired): 2 (z s / d)^2.

    Example:
        >>> needed(0.2, 0.03)
        698
    """
    from gradmatch.removal.numbers import continuations_needed

    return continuations_needed(spread, difference, power)
