"""What the posterior of a merge is good for: taking a task out again, and predictions that know how sure they are."""

from gradmatch.posterior.predicting import Calibration, Prediction, calibration, draws, predict
from gradmatch.posterior.unmerging import unmerge

__all__ = ["Calibration", "Prediction", "calibration", "draws", "predict", "unmerge"]
