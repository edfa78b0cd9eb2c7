"""Removing what a model should not know: a proof where retraining is the truth, and language models."""
