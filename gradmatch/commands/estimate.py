"""`gradmatch estimate`: a model and its training data in, a curvature file out."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from gradmatch.commands.reading import add_reading, bars, check_reading, read_source, say
from gradmatch.estimators.errors import GradmatchError

METHODS = ("fisher", "empirical_fisher", "ggn", "hessian", "kfac", "gram")
TASKS = ("auto", "classification", "causal_lm")
EXAMPLES = """example:
  gradmatch estimate ./sst2-model --data sst2.csv --text-column sentence --limit 2000 -o sst2.curvature.safetensors
  gradmatch estimate ./sst2-model --adam ./sst2-model/checkpoint-500 --num-examples 67349 -o sst2.safetensors
  gradmatch estimate ./lm --adam ./lm/checkpoint-500 --data texts.jsonl --calibrate 64 -o lm.safetensors

N of the summed loss is the number of rows of the data, whatever --limit says: the mean over some rows stands for all.
Several processes share the work: torchrun --nproc-per-node=4 -m gradmatch.cli estimate ..."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gradmatch estimate`."""
    parser.add_argument(
        "model",
        help="folder or hub name of a transformers classifier or causal language model, an adapter of one, or MODEL+ADAPTER",
    )
    parser.add_argument("-o", "--out", required=True, help="the curvature file to write (.safetensors)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        help="csv, tsv, json, jsonl, parquet or txt file (.gz too), a folder of them, or a hub set: name, name:configuration, "
        "name@revision",
    )
    add_reading(
        data,
        examples=None,
        more=" (but for --reduction batch and --method hessian, which work on whole batches); with --adam: of the training's steps",
    )
    data.add_argument("--pair-column", help="second text, as a second --text-column")
    what = parser.add_argument_group("estimate")
    what.add_argument("--method", default="fisher", help=f"{', '.join(METHODS)} (default: fisher)")
    what.add_argument("--task", default="auto", choices=TASKS, help="default: by the model's architecture")
    what.add_argument("--num-examples", type=int, help="N of the summed loss (default: rows of the data)")
    what.add_argument("--samples", type=int, default=1, help="draws of labels per example (default: 1)")
    what.add_argument(
        "--reduction",
        default="example",
        choices=("example", "batch"),
        help="what is squared (default: example)",
    )
    what.add_argument("--gradient", action="store_true", help="also store the gradient at the true labels")
    what.add_argument(
        "--standard-error", action="store_true", help="also store every coordinate's standard error"
    )
    what.add_argument("--tolerance", type=float, help="stop at this relative error of the trace, e.g. 0.05")
    what.add_argument("--seed", type=int, default=0, help="of labels and of --limit (default: 0)")
    what.add_argument(
        "--adam", metavar="STATE", help="read the curvature off Adam's state (optimizer.pt) instead of data"
    )
    what.add_argument(
        "--calibrate",
        type=int,
        metavar="ROWS",
        help="with --adam and --data: scale it by the empirical Fisher of so many rows, where the run's files do not tell its units",
    )
    what.add_argument(
        "--on",
        choices=("weights", "factors"),
        default="weights",
        help="of an adapter: measure base and adapter as one model's weights, as a merge has them (default), or A and B alone",
    )
    what.add_argument("--device", help="default: cuda where there is one, else cpu")
    what.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Estimate, save, and print what was made."""
    check(args)
    started = time.monotonic()
    first = join_processes()
    curvature = from_state(args) if args.adam else from_data(args, first)
    if not first:
        return 0
    curvature.save(args.out)
    seconds = time.monotonic() - started
    seen = curvature.info.get("examples_seen")
    args.result = {
        "file": args.out, "model": args.model, "num_examples": curvature.num_examples, "tensors": len(curvature),
        "trace": curvature.trace(), "seconds": seconds, "info": dict(curvature.info),
    }  # fmt: skip
    print(
        f"{args.out}: {curvature.info['estimator']} of {args.model}, {len(curvature)} tensors, N = {curvature.num_examples:,}"
    )
    if seen is not None:
        print(
            f"  {int(seen):,} examples in {seconds:.0f} s; labels: {curvature.info['labels']}; likelihood: {curvature.info['likelihood']}"
        )
    if args.adam:
        print(f"  {curvature.info['assumed']}")
    if "relative_error" in curvature.info and args.quiet:  # else the log has told it
        error = float(curvature.info["relative_error"])
        print(
            f"  relative error of the trace: {100 * error:.2g} % ({3 * int(seen or 0):,} more examples would halve it)"
        )
    return 0


def check(args: argparse.Namespace) -> None:
    """What can be wrong before anything is loaded.

    Raises:
        ValueError: neither or both of --data and --adam, numbers or combinations that make no sense, an unknown method, an
            output of another kind.
        IsADirectoryError: the output is a folder.
        FileExistsError: the output is there already.
    """
    if args.calibrate is not None and not (args.adam and args.data):
        raise GradmatchError(
            "--calibrate needs both --adam, whose scale is asked for, and --data with labelled rows",
            "bad_arguments",
        )
    if args.calibrate is None and bool(args.data) == bool(args.adam):
        raise GradmatchError(
            "give either --data (to measure) or --adam (to read an optimizer's state); both with --calibrate ROWS",
            "bad_arguments",
        )
    if args.adam and args.num_examples is None and not args.data:
        raise GradmatchError("--adam needs --num-examples, the size of the training set", "bad_arguments")
    check_reading(args)
    for option in ("num_examples", "samples", "calibrate"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise GradmatchError(
                f"--{option.replace('_', '-')} must be at least 1, got {value}", "out_of_range"
            )
    if Path(args.out).suffix != ".safetensors":
        raise GradmatchError(
            f"-o {args.out}: curvature files are in the format safetensors and are known by their ending; name it "
            f"{Path(args.out).with_suffix('.safetensors')}",
            "bad_arguments",
            args.out,
        )
    if Path(args.out).is_dir():
        raise IsADirectoryError(f"-o {args.out} is a folder; name the file to write in it")
    if Path(args.out).exists() and not args.overwrite:
        raise FileExistsError(f"{args.out} exists; pass --overwrite to replace it")
    if not args.adam:
        from gradmatch.estimators.estimation import check_options
        from gradmatch.estimators.protocol import check_gives, find_estimator

        check_options(
            args.method, args.samples, args.reduction, args.tolerance, "auto", args.num_examples, args.seed
        )
        check_gives(
            args.method,
            find_estimator(args.method),
            standard_error=args.standard_error,
            gradient=args.gradient,
            tolerance=args.tolerance is not None,
        )


def join_processes() -> bool:
    """Join torchrun's process group where there is one; whether this process is the one that writes."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return distributed.get_rank() == 0


def from_state(args: argparse.Namespace) -> Any:
    """Curvature from Adam's state, its scale from the run's files or by a few rows of data."""
    from gradmatch.estimators import from_adam

    steps = args.batch_size
    if not args.data:
        model, _, _ = load(args, "auto")
        return from_adam(args.adam, model, num_examples=args.num_examples, batch_size=steps)
    args.examples, args.batch_size = args.calibrate, None
    model, batches = open_data(args)
    known = args.num_examples or batches.rows
    return from_adam(args.adam, model, num_examples=known, batch_size=steps, calibrate=batches)


def from_data(args: argparse.Namespace, first: bool) -> Any:
    """Curvature measured on data."""
    from gradmatch.estimators import estimate

    model, batches = open_data(args)
    if args.quiet and first:
        say(batches, sys.stdout)  # columns belong to what an estimate is of
    return estimate(
        model, batches, method=args.method, num_examples=args.num_examples or batches.rows, samples=args.samples,
        reduction=args.reduction, seed=args.seed, gradient=args.gradient, standard_error=args.standard_error,
        tolerance=args.tolerance, progress=not args.quiet, checkpoint=f"{args.out}.partial",
    )  # fmt: skip


def open_data(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model and its batches of the data."""
    from gradmatch.measure.tables import check_source

    check_source(args.data)  # before the model is loaded
    if args.pair_column:
        args.text_column = [*(args.text_column or [""]), args.pair_column]
    model, tokenizer, task = load(args, args.task)
    return model, read_source(args, args.data, model, tokenizer=tokenizer, task=task)


def load(args: argparse.Namespace, task: str) -> tuple[Any, Any, str]:
    """Model (float32, on its device), tokenizer and task; an adapter with its update in the weights, or as it is trained.

    Raises:
        ValueError: a file, or an architecture that is neither a classifier nor a causal language model.
        FileNotFoundError: neither a folder nor a hub repository.
    """
    if Path(args.model).expanduser().is_file():
        raise GradmatchError(
            f"{args.model} is a file; name the folder that save_pretrained wrote, with config and tokenizer",
            "bad_arguments",
            args.model,
        )
    from gradmatch.models.loading import load as load_module
    from gradmatch.models.named import config_folder, config_of, is_adapter
    from gradmatch.models.opening import open_checkpoint

    if args.on == "factors" and not is_adapter(args.model):
        raise GradmatchError(
            f"--on factors: {args.model} is no adapter, whose factors could be measured; leave --on out",
            "bad_arguments",
            args.model,
        )
    if is_adapter(args.model) and args.on == "weights":
        print(
            f"{args.model} is an adapter: it is measured with its base, as one model's weights (--on factors: A and B alone)",
            file=sys.stderr,
        )
    config = config_of(args.model)
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    task = task_of(config, args.model) if task == "auto" else task
    auto = AutoModelForCausalLM if task == "causal_lm" else AutoModelForSequenceClassification
    with torch.device("meta"):
        kind = type(auto.from_config(config, trust_remote_code=False))
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    opened = None if args.on == "factors" else open_checkpoint(args.model)
    with bars(not args.quiet):
        model = load_module(opened, kind) if opened else _with_factors(args.model, kind)
    tokenizer = None
    if args.data:
        folder = opened.tokenizer if opened else config_folder(args.model)
        if folder is None:
            raise GradmatchError(
                f"{args.model} has embeddings for tokens of its own, and no tokenizer beside them; save its tokenizer there",
                "vocabulary",
                args.model,
            )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return model.to(device), tokenizer, task


def _with_factors(name: str, kind: Any) -> Any:
    """The base with an adapter's A and B beside its weights, which alone are trained."""
    try:
        from peft import PeftModel
    except ModuleNotFoundError as error:
        raise GradmatchError(
            "--on factors needs peft, which is not installed: pip install peft", "bad_arguments"
        ) from error
    from gradmatch.models.adapter_config import named_base
    from gradmatch.models.loading import load as load_module
    from gradmatch.models.opening import adapter_folder, open_checkpoint
    from gradmatch.models.reference import split_adapter

    model, adapter = split_adapter(name)
    folder = adapter_folder(adapter or name, name)
    base = load_module(open_checkpoint(model if adapter else named_base(folder)), kind)
    return PeftModel.from_pretrained(base, folder, is_trainable=True)


def task_of(config: Any, model: str) -> str:
    """By the architecture that the model was saved as.

    Raises:
        ValueError: neither a classifier nor a causal language model.
    """
    from gradmatch.measure.data import LANGUAGE_MODELS

    architectures = getattr(config, "architectures", None) or []
    for name in architectures:
        if name.endswith("ForSequenceClassification"):
            return "classification"
        if name.endswith(LANGUAGE_MODELS):
            return "causal_lm"
    raise GradmatchError(
        f"{model} is saved as {', '.join(architectures) or 'no architecture'}: pass --task classification or causal_lm, or use "
        "gradmatch.estimators.estimate from Python, which takes any module",
        "bad_arguments",
    )
