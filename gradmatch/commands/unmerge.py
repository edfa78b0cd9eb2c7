"""`gradmatch unmerge`: take a task out of a merged folder again."""

from __future__ import annotations

import argparse

from gradmatch.commands.sources import number_or_text, parse_task

EXAMPLES = """
examples:
  gradmatch merge recipe.yaml merged/ --posterior
  gradmatch unmerge merged/ --task a,curvature=a.safetensors --base base --base-curvature base.safetensors -o without-a/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gradmatch unmerge`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument("merged", help="the merged folder, made with --posterior")
    parser.add_argument(
        "--task",
        required=True,
        metavar="MODEL,curvature=FILE[,weight=W][,name=NAME]",
        help="as it was merged",
    )
    parser.add_argument("--posterior", metavar="FILE", help="of the merge (default: the one in its folder)")
    parser.add_argument("--base", help="what was merged on; fisher and mats with a delta0 of 0 need none")
    parser.add_argument("--base-curvature", help="as it was given to the merge: a file or a number")
    parser.add_argument(
        "-o", "--out", required=True, help="folder to write, with the posterior of what is left"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Take it out."""
    from gradmatch.posterior.unmerging import unmerge

    given = None if args.base_curvature is None else number_or_text(args.base_curvature)
    result = unmerge(
        args.merged, args.posterior, parse_task(args.task), base=args.base, base_curvature=given, out=args.out,
        overwrite=args.overwrite, progress=not args.quiet,
    )  # fmt: skip
    print(result.report.summary())
    print(f"written: {args.out}")
    args.result = {"out": args.out, "report": result.report.to_dict()}
    return 0
