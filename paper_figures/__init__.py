"""Figures and tables, each a file, each drawn from records (JSON lines) alone. `python -m paper_figures --help`."""
