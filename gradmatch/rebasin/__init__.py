"""Models of different beginnings: brought into one another's order of units before they are merged."""

from gradmatch.rebasin.aligning import Alignment, align
from gradmatch.rebasin.checking import Proof, check
from gradmatch.rebasin.path import Barrier, barrier
from gradmatch.rebasin.symmetry import Group, Symmetry

__all__ = ["Alignment", "Barrier", "Group", "Proof", "Symmetry", "align", "barrier", "check"]
