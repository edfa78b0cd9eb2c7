"""Failures built on purpose, to see whether `gradmatch.diagnose` names the right cause."""
