"""Why a merge failed: mismatch, forecasts, causes, and a report."""
