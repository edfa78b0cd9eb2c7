"""Curvature that lies beside the weights: in a model's folder, or in its repository on the hub."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.names import first_line, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

Own = TypeVar("Own", bound="Published")
FILE = "curvature.safetensors"  # what a model's curvature is called beside its weights
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")


def repository(name: str) -> tuple[str, str | None] | None:
    """("me/model", "v2") of "me/model@v2", None as the revision where there is none; None for what can be no repository.

    >>> repository("me/model@v2"), repository("curvature.safetensors"), repository("folder/curvature.safetensors")
    (('me/model', 'v2'), None, None)
    """
    found = HUB_ID.fullmatch(name)
    return None if found is None or name.endswith(".safetensors") else (found[1], found[2])


def curvature_file(
    name: str | os.PathLike[str], filename: str = FILE, revision: str | None = None, token: Any = None
) -> Path:
    """The local path of a curvature: a file, a file in a model's folder, or one in a repository, which is fetched.

    Raises:
        FileNotFoundError: none of these; what is there instead is named.
        ValueError: a revision of something local, or two revisions.
    """
    path = Path(name).expanduser()
    if path.exists():
        if revision is not None:
            raise GradmatchError(
                f"revision {revision!r} of {name}, which is a local path and has none; leave revision= out",
                "bad_arguments",
                name,
            )
        if path.is_dir():
            beside = sorted(one.name for one in path.glob("*.safetensors"))
            if filename not in beside:
                held = f"it holds {', '.join(beside)}" if beside else "it holds no .safetensors file"
                raise FileNotFoundError(
                    f"no curvature file {path / filename}; {held}; name another with filename="
                )
            path = path / filename
        return path
    found = repository(str(name))
    if found is None:
        known = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FileNotFoundError(
            f"no curvature file {path}{nearest(path.name, known)}; give a file, a model's folder with {FILE} in it, or a hub id "
            "such as 'me/model'"
        )
    identifier, named = found
    if named and revision and named != revision:
        raise GradmatchError(
            f"{name} names revision {named!r}, revision= says {revision!r}; give one of them",
            "bad_arguments",
            name,
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(identifier, filename, revision=named or revision, token=token))
    except Exception as error:  # the library's errors share no base class across versions
        raise FileNotFoundError(
            f"no curvature file {path}, and {filename} of a hub repository {identifier} could not be fetched "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def check_repository(repo_id: str) -> None:
    """Refuse what is no id of a repository, before anything is sent.

    Raises:
        ValueError: such a name.
    """
    found = repository(repo_id)
    if found is None or found[1]:
        raise GradmatchError(
            f"{repo_id!r} is no hub id; write owner/name, and a branch as revision=", "bad_arguments", repo_id
        )


class Published:
    """What a curvature file has of the hub: `from_pretrained` and `push_to_hub`, as models have them."""

    path: Path | None

    @classmethod
    def load(
        cls: type[Own],
        path: str | os.PathLike[str],
        *,
        model: nn.Module | Mapping[str, Tensor] | None = None,
        allow_mismatch: bool = False,
    ) -> Own:
        """Open a file; the class that this is part of says how."""
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls: type[Own],
        name: str | os.PathLike[str],
        *,
        filename: str = FILE,
        revision: str | None = None,
        token: Any = None,
        model: nn.Module | Mapping[str, Tensor] | None = None,
        allow_mismatch: bool = False,
    ) -> Own:
        """Open the curvature that is published beside a model's weights.

        Args:
            name: a model's folder, a hub id ("me/model", "me/model@revision"), or a curvature file.
            filename: the file in the folder or repository.
            revision: of the repository: a branch, tag or commit.
            token: for a private repository, as huggingface_hub takes it.
            model: where given, the weights that the curvature must have been taken at.
            allow_mismatch: accept a curvature of other weights all the same.

        Raises:
            FileNotFoundError: no such file, folder or repository, or no curvature in it.
            ValueError: as `load`.

        Example:
            >>> from gradmatch import Curvature
            >>> Curvature.from_pretrained("me/sentiment-amazon")                # doctest: +SKIP
            Curvature(fisher, 60 tensors, N = 3600, examples seen = 512)
        """
        file = curvature_file(name, filename, revision, token)
        return cls.load(file, model=model, allow_mismatch=allow_mismatch)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        filename: str = FILE,
        revision: str | None = None,
        token: Any = None,
        private: bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Publish this curvature in a repository of the hub, beside the weights it was taken at.

        Args:
            repo_id: "owner/name"; made where it is not there.
            filename: the file's name there, by which `from_pretrained` finds it.
            revision: branch to commit to.
            token: as huggingface_hub takes it.
            private: of a repository that is made.
            commit_message: of the commit.
            create_pr: open a pull request instead.

        Returns:
            The address of the commit or pull request.

        Raises:
            ValueError: no hub id, or a name without .safetensors.
            OSError: the hub refused, or cannot be reached.

        Example:
            >>> estimate(model, batches).push_to_hub("me/sentiment-amazon")     # doctest: +SKIP
        """
        check_repository(repo_id)
        if Path(filename).suffix != ".safetensors":
            raise GradmatchError(
                f"filename is {filename!r}; curvature files are known by their ending; name it {Path(filename).with_suffix('.safetensors')}",
                "bad_arguments",
                filename,
            )
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            file = self.path or Path(folder) / FILE  # as it lies on disk, or written for this
            if self.path is None:
                self.save(file)
            made = api.upload_file(
                path_or_fileobj=str(file), path_in_repo=filename, repo_id=repo_id, revision=revision,
                commit_message=commit_message or f"{self!r}", create_pr=create_pr,
            )  # fmt: skip
        return address(made)


def address(made: Any) -> str:
    """Where a commit of the hub can be seen."""
    return str(getattr(made, "pr_url", None) or getattr(made, "commit_url", None) or made)
