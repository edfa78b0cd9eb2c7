"""Controlled experiments: real models and data, cached stages, JSON-line records. `python -m experiments --help`."""
