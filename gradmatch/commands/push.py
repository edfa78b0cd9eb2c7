"""`gradmatch push`: weights, curvature, card and diagnosis page in one commit of a repository on the hub."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from gradmatch.plan.printed import readable

EXAMPLES = """
examples:
  gradmatch push merged/ me/merged --license apache-2.0
  gradmatch push amazon/ me/amazon --curvature amazon.safetensors --dry-run
  gradmatch push merged/ me/merged --diagnosis why.html --private

Whoever merges it then needs no data: --task me/amazon,curvature=me/amazon. The hub's token is that of `hf auth login` or HF_TOKEN.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gradmatch push`."""
    parser.add_argument("folder", help="the model: what merge, save_pretrained or peft wrote")
    parser.add_argument(
        "repo_id", metavar="OWNER/NAME", help="repository of the hub, made where it is not there"
    )
    parser.add_argument(
        "--curvature", metavar="FILE", help="of these weights (default: what the folder holds)"
    )
    parser.add_argument("--diagnosis", metavar="PAGE", help="written by `gradmatch diagnose --html`")
    parser.add_argument("--license", metavar="ID", help="for the card, such as apache-2.0")
    parser.add_argument(
        "--dataset", action="append", default=[], metavar="ID", help="for the card; repeatable"
    )
    parser.add_argument("--allow-mismatch", action="store_true", help="send a curvature of other weights")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="to commit to")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and list the files; send nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Push, or list what would be sent."""
    from gradmatch.estimators.published import check_repository
    from gradmatch.sharing import package, push

    own: dict[str, Any] = {
        "curvature": args.curvature, "diagnosis": args.diagnosis, "license": args.license, "datasets": args.dataset,
        "allow_mismatch": args.allow_mismatch,
    }  # fmt: skip
    check_repository(args.repo_id)
    with tempfile.TemporaryDirectory() as folder:
        ready = package(args.folder, Path(folder), args.repo_id, **own)
        sizes = ready.sizes()
    for name, size in sizes.items():
        print(f"{readable(size):>10}  {name}")
    if ready.left:
        print(f"not sent: {', '.join(ready.left)}")
    for note in ready.notes:
        print(note)
    args.result = {"repository": args.repo_id, "files": sizes, "left": ready.left, "commit": None}
    if args.dry_run:
        return 0
    told = push(
        args.folder, args.repo_id, private=args.private or None, revision=args.revision, commit_message=args.message,
        create_pr=args.create_pr, **own,
    )  # fmt: skip
    print(f"pushed: {told}")
    args.result["commit"] = told
    return 0
