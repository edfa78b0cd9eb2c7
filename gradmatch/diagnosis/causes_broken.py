"""Causes without which nothing else means anything: values that are broken, tensors that do not fit, a merge that is refused."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gradmatch.common.settings import FIRST, layer_of
from gradmatch.diagnosis.cause import BROKEN, Cause, cause, plural
from gradmatch.diagnosis.evidence import Saving
from gradmatch.models.tokenizers import EMBEDDINGS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gradmatch.diagnosis.evidence import Evidence

MOST = 0.5  # of the tensors: more that do not fit are no head and no vocabulary
USELESS = Saving(math.inf, 0.0)


def not_finite(evidence: Evidence) -> Iterator[Cause]:
    """NaN or infinite weights; the merge's own are told only where no input explains them."""
    found = evidence.scan.nonfinite
    for model in [model for model in found if model != "merged"] or found:
        tensor, count = max(found[model].items(), key=lambda item: item[1])
        total = sum(found[model].values())
        yield cause(
            "not_finite",
            model,
            f"{total} {plural(total, 'weight', 'weights')} of {model!r} {plural(total)} NaN or infinite, {count} of them in {tensor}",
            f"fetch or train {model!r} again; everything merged with these values is NaN as well"
            if model != "merged"
            else "merge again: the inputs are finite, so the rule or the output's dtype overflowed",
            BROKEN,
            USELESS,
            count=float(total),
            tensors=float(len(found[model])),
        )


def outputs_not_finite(evidence: Evidence) -> Iterator[Cause]:
    """Weights that are finite and outputs that are not: something overflows on the way."""
    for model, losses in evidence.losses.items():
        task = next((t for t, values in losses.items() if not bool(values.isfinite().all())), None)
        if task is not None and model not in evidence.scan.nonfinite:
            yield cause(
                "outputs_not_finite",
                model,
                f"the weights of {model!r} are finite, but on the data of {task!r} its outputs are not",
                "look for weights that are far too large (a wrong scale, a damaged layer), or compute in a wider dtype",
                BROKEN,
                USELESS,
            )


def shapes_differ(evidence: Evidence) -> Iterator[Cause]:
    """Tensors that a model lacks or has in another shape: another head, vocabulary or architecture."""
    for model in evidence.scan.shapes:
        shapes, missing = unmerged(evidence, model)
        if shapes:
            name, (ours, theirs) = next(iter(shapes.items()))
            what = f"{name} is {list(theirs)} in {model!r} and {list(ours)} in the base"
            what += " (it is transposed)" if theirs == ours[::-1] else ""
        elif missing:
            what = f"{model!r} lacks {missing[0]}"
        else:
            continue
        count = len(shapes) + len(missing)
        other = count > max(MOST * len(evidence.base), 2)  # more than a head and a vocabulary
        what += f"; {count} of {len(evidence.base)} tensors cannot be merged"
        if model == "merged":
            remedy = "check the path of the merged model: it is no merge of these models"
        elif other:
            remedy = f"give a fine-tune of this base in place of {model!r}: models of another size have no common weights"
        else:
            remedy = "carry such layers beside the trunk (a head or vocabulary policy of the merge), or take a fine-tune of this base"
        yield cause(
            "shapes_differ",
            model,
            what + (f": {model!r} is of another size or architecture" if other else ""),
            remedy,
            BROKEN,
            shapes=float(len(shapes)),
            missing=float(len(missing)),
        )


def unmerged(
    evidence: Evidence, model: str
) -> tuple[dict[str, tuple[tuple[int, ...], tuple[int, ...]]], list[str]]:
    """Shapes that differ and tensors that are missing, but for those that the recipe has a policy for."""

    def covered(name: str) -> bool:
        kind = "embeddings" if EMBEDDINGS.search(name) or FIRST.search(name) else "heads"
        inside = kind == "heads" and layer_of(name) is not None
        return not inside and evidence.policies.get(kind, "error") != "error"

    shapes = {name: found for name, found in evidence.scan.shapes[model].items() if not covered(name)}
    kept = evidence.policies.get("missing", "error") != "error"
    missing = [] if kept else [name for name in evidence.scan.missing[model] if not covered(name)]
    return shapes, missing


def refused(evidence: Evidence) -> Iterator[Cause]:
    """A merge that the rule itself refuses; a note where shapes or values that are told already explain it."""
    text = f"the merge itself was refused: {evidence.refusal}"
    if not evidence.refusal:
        return
    if evidence.scan.nonfinite or any(any(unmerged(evidence, model)) for model in evidence.scan.shapes):
        evidence.notes.append(text)
    else:
        yield cause("merge_refused", "merged", text, "do what the message says", BROKEN)
