"""Repositories of the hub: what is fetched of them, and where it lies here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from gradmatch.estimators.names import first_line, nearest
from gradmatch.models.reference import split_revision

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
# configs and tokenizers
TEXT = ("*.json", "*.txt", "*.model", "*.jinja", "*.spm", "*.tiktoken", "*.codes", "*.bpe")
# What is fetched of a model: no pickles; code is carried along and never run.
WANTED = (*TEXT, "*.safetensors", "*.vocab", "*.merges", "*.py")


def from_hub(name: str, patterns: Sequence[str] = WANTED, local: bool = False) -> Path:
    """The local snapshot of a hub repository ("me/base", "me/base@revision"), of the files that match `patterns`.

    With `local`, only one that is here already.

    Raises:
        FileNotFoundError: neither a path nor a repository that can be reached.
    """
    name, revision = split_revision(name)
    folder = Path(name).expanduser().parent
    siblings = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    hint = nearest(Path(name).name, siblings)
    if not HUB_ID.match(name):
        raise FileNotFoundError(f"no file or folder {name}{hint}")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=list(patterns), local_files_only=local)
        )
    except Exception as error:  # the library's errors share no base class across versions
        raise FileNotFoundError(
            f"no file or folder {name}{hint}, and no hub repository of that name {f'at revision {revision} ' if revision else ''}could be fetched ({type(error).__name__}: {first_line(error)})"
        ) from error
