"""Publishing a model whole: weights, curvature, card and diagnosis in one commit of a repository on the hub."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.curvature import Curvature
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.published import FILE, address, check_repository
from gradmatch.models.curvatures import open_curvature
from gradmatch.models.opening import open_checkpoint

if TYPE_CHECKING:
    from gradmatch.diagnosis import Diagnosis
    from gradmatch.models.checkpoint import Checkpoint

PAGE, CARD = "diagnosis.html", "README.md"
# what a training leaves beside a model: pickles, states and logs, of no use to who loads it
LEFT_BEHIND = re.compile(
    r"\.|(optimizer|scheduler|scaler|training_args|pytorch_model.*)\.(pt|pth|bin)$|rng_state.*\.pth$|trainer_state\.json$"
    r"|events\.out|.*\.partial$"
)
LEFT_FOLDERS = re.compile(r"\.|checkpoint-\d+$|global_step\d+$|runs$|__pycache__$|journal$")
SECTION = "## Curvature"


@dataclass(frozen=True)
class Package:
    """What one commit holds.

    Attributes:
        files: name in the repository -> the local file or the content.
        left: names in the folder that are not sent.
        notes: what is to be said of it.
    """

    files: dict[str, Path | bytes]
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def sizes(self) -> dict[str, int]:
        """Name -> bytes."""
        return {
            name: len(held) if isinstance(held, bytes) else held.stat().st_size
            for name, held in self.files.items()
        }


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    curvature: Curvature | str | os.PathLike[str] | None = None,
    diagnosis: Diagnosis | str | os.PathLike[str] | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    allow_mismatch: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    token: Any = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Publish a model's folder on the hub: weights, curvature, card and diagnosis page in one commit.

    Whoever merges the model then needs no data: `Task("me/model", curvature="me/model")`. Optimizer states, pickles and
    logs of a training stay here.

    Args:
        folder: what `merge(..., out=folder)` or save_pretrained wrote, or an adapter's folder.
        repo_id: "owner/name"; made where it is not there.
        curvature: of these weights; it becomes `curvature.safetensors`. None: what the folder holds, if anything.
        diagnosis: `diagnose(...)` or the page that `gradmatch diagnose --html` wrote; it becomes `diagnosis.html`.
        license: for the card; None: what it says already.
        datasets: hub ids for the card.
        allow_mismatch: send a curvature that was taken at other weights.
        private: of a repository that is made.
        revision: branch to commit to.
        token: as huggingface_hub takes it.
        commit_message: of the commit.
        create_pr: open a pull request instead.

    Returns:
        The address of the commit or pull request.

    Raises:
        ValueError: no hub id, no model in the folder, a curvature of other weights.
        FileNotFoundError: no such folder, curvature or page.
        OSError: the hub refused, or cannot be reached.

    Example:
        >>> push("merged", "me/merged", curvature="merged.safetensors", license="apache-2.0")    # doctest: +SKIP
        'https://huggingface.co/me/merged/commit/4f2a...'
    """
    check_repository(repo_id)
    with tempfile.TemporaryDirectory() as own:
        ready = package(
            folder, Path(own), repo_id, curvature=curvature, diagnosis=diagnosis, license=license, datasets=datasets,
            allow_mismatch=allow_mismatch,
        )  # fmt: skip
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        operations = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=held if isinstance(held, bytes) else str(held))
            for name, held in ready.files.items()
        ]  # fmt: skip
        made = api.create_commit(
            repo_id, operations, commit_message=commit_message or f"gradmatch push: {Path(folder).name}",
            revision=revision, create_pr=create_pr,
        )  # fmt: skip
    return address(made)


def package(
    folder: str | os.PathLike[str],
    own: Path,
    repo_id: str = "",
    *,
    curvature: Curvature | str | os.PathLike[str] | None = None,
    diagnosis: Diagnosis | str | os.PathLike[str] | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    allow_mismatch: bool = False,
) -> Package:
    """Everything that is sent, checked; `own` is a folder for what has to be written. Arguments and errors as in `push`."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        what = "a file; name the folder that it lies in" if folder.exists() else "not there"
        raise FileNotFoundError(f"the folder to push, {folder}, is {what}")
    checkpoint = open_checkpoint(folder)
    files, left = gathered(folder)
    known = held = None
    if curvature is not None:
        known = held = open_curvature(curvature)
    elif FILE in files:
        known = Curvature.load(folder / FILE)
    if known is not None and not allow_mismatch:
        check_owner(known, checkpoint, folder)
    if held is not None:
        files[FILE] = held.path or own / FILE
        if held.path is None:
            held.save(own / FILE)
    page = read_page(diagnosis)
    if page is not None:
        files[PAGE] = page
    written = files.get(CARD)
    text = (
        written.read_text(encoding="utf-8") if isinstance(written, Path) else f"# {folder.resolve().name}\n"
    )
    files[CARD] = card(text, known, repo_id, page=PAGE in files, license=license, datasets=datasets).encode()
    notes = [] if known is not None else [f"no curvature goes along: whoever merges it needs data ({FILE})"]
    return Package(dict(sorted(files.items())), left, notes)


def gathered(folder: Path) -> tuple[dict[str, Path | bytes], list[str]]:
    """Name -> file of everything in a folder that is part of the model, and the names of the rest."""
    files: dict[str, Path | bytes] = {}
    left = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(LEFT_FOLDERS.match(part) for part in name.parts[:-1]):
            continue
        if path.is_dir():
            left += [f"{name}/"] if LEFT_FOLDERS.match(path.name) else []
        elif LEFT_BEHIND.match(path.name):
            left.append(str(name))
        elif path.is_file():
            files[name.as_posix()] = path
    return files, left


def check_owner(curvature: Curvature, checkpoint: Checkpoint, folder: Path) -> None:
    """Refuse a curvature of other weights than the folder's, under the names of the files or of the module that loads them."""
    from gradmatch.models.views import as_module

    named = checkpoint if all(name in checkpoint for name in curvature) else as_module(checkpoint)
    curvature.check_model(named.sample, f"the model in {folder}")


def read_page(diagnosis: Diagnosis | str | os.PathLike[str] | None) -> bytes | None:
    """The page of a diagnosis.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no page.
    """
    if diagnosis is None:
        return None
    if not isinstance(diagnosis, (str, os.PathLike)):
        return diagnosis.to_html().encode()
    path = Path(diagnosis).expanduser()
    if path.suffix not in (".html", ".htm"):
        raise GradmatchError(
            f"{path} is no page; write one with `gradmatch diagnose ... --html {PAGE}`", "bad_arguments", path
        )
    return path.read_bytes()


def card(
    text: str,
    curvature: Curvature | None,
    repo_id: str = "",
    *,
    page: bool = False,
    license: str | None = None,
    datasets: Sequence[str] = (),
) -> str:
    """The README with what the hub wants in its head, and a section that says how the curvature is used."""
    from huggingface_hub import ModelCard

    made = ModelCard(text)
    tags = list(made.data.get("tags") or [])
    made.data["tags"] = [*tags, *(["gradmatch"] if "gradmatch" not in tags else [])]
    if license:
        made.data["license"] = license
    if datasets:
        made.data["datasets"] = list(dict.fromkeys([*(made.data.get("datasets") or []), *datasets]))
    body = made.text.partition(f"\n{SECTION}\n")[0].rstrip()
    told = []
    if curvature is not None:
        info = curvature.info
        seen = f", of {info['examples_seen']} examples seen" if info.get("examples_seen") else ""
        told += [
            SECTION, "",
            f"`{FILE}` is this model's curvature ({info.get('estimator', 'given')}{seen}; its loss sums over N = "
            f"{curvature.num_examples} examples), with which it merges by its uncertainty and without data:", "",
            "```sh", f"gradmatch merge --base BASE --task {repo_id or 'MODEL'},curvature={repo_id or 'MODEL'} -o merged", "```",
        ]  # fmt: skip
    if page:
        told += ["", f"What was looked at in this model, and what was found: [{PAGE}]({PAGE})."]
    made.text = "\n".join([body, "", *told, ""]) if told else body + "\n"
    return f"---\n{made.data.to_yaml().strip()}\n---\n{made.text}"
