"""Which of many models to merge, with what weights, for what price.

looking     finding (models in folders)  pairs (one pass over all weights)  cards  alike (similarities)  families (what goes together)
searching   judge (candidates merged and scored)  journal (JSON lines)  forecasts (before anything is scored)  strategies, selecting (greedy)  soup
            scores (files of examples)  tasks (lm-eval's)  space and storage (of evolving)  search, evolving (CMA-ES, NSGA-II)
planning    planfile (ZOO.yaml, PLAN.yaml)  screening  planning (plan, run)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradmatch.zoo.alike import Similarity, similarity
    from gradmatch.zoo.cards import Card, Zoo, inspect
    from gradmatch.zoo.evolving import evolve
    from gradmatch.zoo.families import Families, cluster
    from gradmatch.zoo.planning import plan, run
    from gradmatch.zoo.search import Evolution
    from gradmatch.zoo.selecting import Selection, select

EXPORTS = {
    "Card": "gradmatch.zoo.cards",
    "Evolution": "gradmatch.zoo.search",
    "Families": "gradmatch.zoo.families",
    "Selection": "gradmatch.zoo.selecting",
    "Similarity": "gradmatch.zoo.alike",
    "Zoo": "gradmatch.zoo.cards",
    "cluster": "gradmatch.zoo.families",
    "evolve": "gradmatch.zoo.evolving",
    "inspect": "gradmatch.zoo.cards",
    "plan": "gradmatch.zoo.planning",
    "run": "gradmatch.zoo.planning",
    "select": "gradmatch.zoo.selecting",
    "similarity": "gradmatch.zoo.alike",
}
__all__ = [
    "Card",
    "Evolution",
    "Families",
    "Selection",
    "Similarity",
    "Zoo",
    "cluster",
    "evolve",
    "inspect",
    "plan",
    "run",
    "select",
    "similarity",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(EXPORTS[name]), name)
