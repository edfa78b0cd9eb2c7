"""Data sets as tasks: reading, cleaning, splitting without leakage."""
