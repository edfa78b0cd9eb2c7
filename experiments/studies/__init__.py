"""Experiments: each module turns a config into stages, records and a printed report."""
