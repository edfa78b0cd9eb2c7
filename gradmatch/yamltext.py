"""YAML, read one way everywhere (recipes, mergekit's files, values on the command line): 1e-6 is a number, as in YAML 1.2."""

from __future__ import annotations

import re
from typing import Any

import yaml

FLOAT = re.compile(
    r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"
)  # PyYAML itself wants a point and a sign: 1.0e-6


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's floats."""


Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def load_yaml(text: str | bytes, where: str) -> Any:
    """The content of a YAML text; `where` names it in errors.

    Raises:
        ValueError: no YAML, or no UTF-8.
    """
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} is not YAML: {error}") from error
