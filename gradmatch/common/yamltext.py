"""YAML, read one way everywhere (recipes, mergekit's files, values on the command line): 1e-6 is a number, as in YAML 1.2."""

from __future__ import annotations

import re
from typing import Any

import yaml

from gradmatch.estimators.errors import GradmatchError

# PyYAML itself wants a point and a sign: 1.0e-6
FLOAT = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's floats, which refuses a key given twice (PyYAML takes the last)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A table.

        Raises:
            yaml.constructor.ConstructorError: a key twice.
        """
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen and key.value != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def load_yaml(text: str | bytes, where: str) -> Any:
    """The content of a YAML text; `where` names it in errors.

    Raises:
        GradmatchError: no YAML, a key given twice, an unknown tag, several documents, or no UTF-8.
    """
    try:
        documents = list(yaml.load_all(text, Loader))
        if len(documents) > 1:
            text = f"{where} holds {len(documents)} YAML documents (---), as recipes for mergekit-multi do"
            raise GradmatchError(text, "several_documents", where, "put each into a file of its own")
        return documents[0] if documents else None
    except GradmatchError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise GradmatchError(f"{where} is not YAML: {said}", "not_yaml", where) from error
