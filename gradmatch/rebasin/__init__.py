"""Models of different beginnings: brought into one another's order of units before they are merged."""

from gradmatch.rebasin.aligning import Alignment, align
from gradmatch.rebasin.checking import Proof, check
from gradmatch.rebasin.path import Barrier, barrier
from gradmatch.rebasin.repair import repair
from gradmatch.rebasin.rotating import rotate
from gradmatch.rebasin.symmetry import Group, Symmetry
from gradmatch.rebasin.universe import align_all
from gradmatch.rebasin.zipit import Zipped, zipit

__all__ = [
    "Alignment",
    "Barrier",
    "Group",
    "Proof",
    "Symmetry",
    "Zipped",
    "align",
    "align_all",
    "barrier",
    "check",
    "repair",
    "rotate",
    "zipit",
]
