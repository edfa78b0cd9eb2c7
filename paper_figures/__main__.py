"""Draw every figure whose records are there: `python -m paper_figures [results/demo.jsonl ...] [--out FOLDER]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.records import read_records

COMMITTED = Path("experiments") / "results"
SENTIMENT = ("table_sentiment", "fig_mismatch", "fig_alpha")
FIGURES = {  # experiment -> what is drawn of it
    "adding": ("fig_adding",),
    "assumption": ("fig_assumption",),
    "claims": ("table_claims",),
    "curvature": ("fig_curvature",),
    "forecast": ("fig_forecast",),
    "rebasin": ("fig_barriers",),
    "redundancy": ("fig_redundancy", "fig_cosines"),
    "removal": ("fig_removal",),
    "removal-proof": ("fig_proof",),
    "search": ("fig_search",),
    "sentiment": SENTIMENT,
    "texts": SENTIMENT,
    "vision": SENTIMENT,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m paper_figures", description=__doc__)
    parser.add_argument(
        "records",
        nargs="*",
        type=Path,
        help="JSON-line files (default: the committed ones, and those of results/ in place of older ones of that name)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results") / "figures", help="folder (default: results/figures)"
    )
    options = parser.parse_args(arguments)
    files = options.records or newest(Path("results"), COMMITTED)
    if not files:
        print("error: no records in results/: run `python -m experiments demo` first", file=sys.stderr)
        return 2
    failed = False
    for file in files:
        try:
            drawn = draw_file(file, options.out / file.stem)
        except (ValueError, OSError) as error:  # the others are drawn all the same
            print(f"error: {file}: {error}", file=sys.stderr)
            failed = True
        except (KeyError, TypeError) as error:
            print(
                f"error: {file}: a record lacks {error}, or holds something else there: run its config again",
                file=sys.stderr,
            )
            failed = True
        else:
            print(f"{file}: " + (", ".join(map(str, drawn)) if drawn else "no figure for these records"))
    return 2 if failed else 0


def newest(*folders: Path) -> list[Path]:
    """One file of records per name: the latest of the folders'."""
    found: dict[str, Path] = {}
    for file in (file for folder in folders for file in sorted(folder.glob("*.jsonl"))):
        other = found.get(file.name)
        if other is None or file.stat().st_mtime > other.stat().st_mtime:
            found[file.name] = file
    return [found[name] for name in sorted(found)]


def draw_file(file: Path, out: Path) -> list[Path]:
    """Every figure for the experiments of one file of records."""
    from importlib import import_module  # matplotlib is loaded where there is something to draw

    records = read_records(file)
    drawn: list[Path] = []
    for experiment in dict.fromkeys(record.get("experiment", "") for record in records):
        own = [record for record in records if record.get("experiment") == experiment]
        for figure in FIGURES.get(experiment, ()):
            drawn += import_module(f"paper_figures.{figure}").draw(own, out)
    return drawn


if __name__ == "__main__":
    sys.exit(main())
