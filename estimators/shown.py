"""Tables as pandas has them, and as a notebook shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

MOST = 12  # rows that a notebook shows


def frame(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> Any:
    """Rows as a pandas DataFrame.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        import pandas as pd  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ImportError("to_frame needs pandas: pip install pandas; to_dict works without it") from error
    return pd.DataFrame(list(rows), columns=list(columns) if columns else None)


def html(title: str, rows: Sequence[Mapping[str, Any]], note: str = "") -> str:
    """A title, a table of the first rows, and a note, for `_repr_html_`.

    >>> html("A & B", [{"task": "a", "loss": 0.25}])
    '<b>A &amp; B</b><table><tr><th>task</th><th>loss</th></tr><tr><td>a</td><td>0.25</td></tr></table>'
    """
    parts = [f"<b>{escape(title)}</b>"]
    if rows:
        head = "".join(f"<th>{escape(str(name))}</th>" for name in rows[0])
        body = "".join(
            f"<tr>{''.join(f'<td>{escape(spelt(value))}</td>' for value in row.values())}</tr>"
            for row in rows[:MOST]
        )
        parts.append(f"<table><tr>{head}</tr>{body}</table>")
        if len(rows) > MOST:
            parts.append(f"<p>and {len(rows) - MOST} more; to_frame() has all</p>")
    if note:
        parts.append(f"<pre>{escape(note)}</pre>")
    return "".join(parts)


def spelt(value: Any) -> str:
    """A cell: four figures of a number, nothing for None."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
