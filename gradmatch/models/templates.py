"""Chat templates of model folders, and the one that an output is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradmatch.estimators.files import read_json
from gradmatch.estimators.names import choose

FILE, SETTINGS = "chat_template.jinja", "tokenizer_config.json"
KNOWN = {
    "chatml": "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
}


def template_of(folder: Path | None) -> str:
    """The chat template of a model's folder, the default one of several; "" where it has none."""
    if folder is None:
        return ""
    if (folder / FILE).is_file():
        return (folder / FILE).read_text(encoding="utf-8")
    found: Any = read_json(folder / SETTINGS).get("chat_template") if (folder / SETTINGS).is_file() else ""
    if isinstance(found, list):
        found = next((one.get("template") for one in found if one.get("name") == "default"), "")
    return found if isinstance(found, str) else ""


def chosen_template(wanted: str, folders: Sequence[Path | None]) -> str:
    """The template that was asked for: "auto" (that of most models), a known name, or its own text.

    Raises:
        ValueError: a name that is not known, or "auto" where no model has one.
    """
    if wanted == "auto":
        held = Counter(text.strip() for folder in folders if (text := template_of(folder)))
        return held.most_common(1)[0][0] if held else ""
    if "{" in wanted:
        return wanted
    choose("chat_template", wanted, ("auto", *KNOWN, "the template itself"))
    return KNOWN[wanted]
