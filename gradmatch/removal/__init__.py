"""Removing a task safely: what an alpha will cost before it is used, the largest alpha within a budget, and a report.

Eq. 13 removes more as alpha grows. What goes is *forgetting*, the rise of the loss on what is removed; what suffers is
*collateral*, the rise of the loss on what must stay. Both are nats per example, relative to the base. Diagonal curvature
ranks coordinates but underestimates how far a loss rises, often by orders of magnitude; so forecasts use exact GGN
products wherever data is given, and every point says what it used.

    from gradmatch.removal import Problem, alpha_path, budget, path_table, removal_report
"""

from gradmatch.removal.comparing import Choice, choose, compared, comparison_table
from gradmatch.removal.continuing import continuations
from gradmatch.removal.forecast import AlphaPath, Point, alpha_path, path_table
from gradmatch.removal.limits import Budget, budget
from gradmatch.removal.numbers import Loss, continuations_needed
from gradmatch.removal.problem import Problem
from gradmatch.removal.report import removal_report, report_table

__all__ = [
    "AlphaPath", "Budget", "Choice", "Loss", "Point", "Problem", "alpha_path", "budget", "choose", "compared", "comparison_table",
    "continuations", "continuations_needed", "path_table", "removal_report", "report_table",
]  # fmt: skip
