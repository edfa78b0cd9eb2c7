"""`stack`: layers of models in depth; what is added starts as the identity, so that the stack begins as the first model."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmatch.common.settings import LAYER, layer_of
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.fingerprint import fingerprint
from gradmatch.estimators.names import choose
from gradmatch.mixture.building import stack_of
from gradmatch.mixture.sources import Noisy, named_kind
from gradmatch.mixture.told import Made, readme
from gradmatch.models.opening import open_checkpoint
from gradmatch.models.slices import LAYER_COUNTS, Slice
from gradmatch.models.slices import stack as stack_slices
from gradmatch.models.stores import Renamed
from gradmatch.models.structure import architecture, build
from gradmatch.models.views import as_module, like
from gradmatch.output.folder import write_folder
from gradmatch.output.publishing import check_absent, place
from gradmatch.plan.request import DTYPES

if TYPE_CHECKING:
    from gradmatch.mixture.training import Trained
    from gradmatch.models.checkpoint import Checkpoint
    from gradmatch.models.task import Model

BLOCKS = "blocks.safetensors"  # the shard of the added layers, which light fine-tuning writes anew
# projections of a block whose output is added to the residual stream, as transformers calls them
OUTPUTS = re.compile(
    r"\.(?:o_proj|down_proj|c_proj|out_proj|dense_4h_to_h|fc2|attention\.dense|self_attention\.dense|attention\.output\.dense|output\.dense"
    r"|w2|wo)\.(?:weight|bias)$"
)


def stack(
    models: Sequence[Model],
    layers: Sequence[tuple[int, int]],
    out: str | os.PathLike[str] | None = None,
    *,
    identity: bool = True,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Any:
    """Stack layer ranges of models of one architecture, with embeddings, final norm and head of the first.

    With `identity` the output projections of every block after the first entry's are zero, weights and biases, so that each of them
    passes on what it gets and the stack computes what the first entry does (LLaMA Pro, Wu et al. 2024). Their other weights are the
    models', so that the first step of a training moves the zeros and the second all of them: `train_blocks`.

    Args:
        models: one an entry of `layers`; the same may come twice.
        layers: half-open ranges, (first, one after the last); leaving out middle layers drops them.
        out: the folder; None: nothing is kept and the loaded module is returned.
        identity: start the added blocks as the identity; without it they are the models', as mergekit's passthrough has them.
        dtype: of the output; None: the models'.
        overwrite: replace an output that is there.
        progress: show a bar.

    Returns:
        The opened folder, with `.report`; without `out` the module.

    Raises:
        GradmatchError: ranges that a model does not have, models of other sizes, blocks that zeros do not make the identity
            (such as BERT's, whose norm stands behind the sum).
        FileExistsError: `out` is there.

    >>> stack(["cook", "cook"], [(0, 12), (6, 12)], out="deeper")                # doctest: +SKIP
    >>> stack(["cook", "cook"], [(0, 4), (8, 12)], out="shorter", identity=False)  # doctest: +SKIP
    """
    if isinstance(models, (str, os.PathLike, Mapping)) or len(models) != len(layers) or not layers:
        counts = f"{1 if isinstance(models, (str, os.PathLike, Mapping)) else len(models)} models and {len(layers)} ranges"
        raise GradmatchError(
            f"{counts}: give one half-open range of layers an entry of models", "bad_arguments", "layers"
        )
    if dtype is not None:
        dtype = str(dtype).removeprefix("torch.")
        choose("dtype", dtype, DTYPES)
    for pair in layers:
        if len(pair) != 2 or any(type(number) is not int for number in pair):
            raise GradmatchError(
                f"a range of layers is {pair!r}; give (first, one after the last)", "bad_arguments", "layers"
            )
    if out is None:
        import tempfile

        from gradmatch.mixture.loading import load

        with tempfile.TemporaryDirectory(prefix="gradmatch-") as folder:
            stack(models, layers, Path(folder) / "stack", identity=identity, dtype=dtype)
            return load(Path(folder) / "stack")
    check_absent(place(out), overwrite)
    first = named_kind(as_module(open_checkpoint(models[0])))
    opened = [first, *(like(open_checkpoint(one, base=first), first) for one in models[1:])]
    store, config, added, notes = stacked(opened, layers, identity)
    made = Made(
        f"a stack of {sum(b - a for a, b in layers)} layers", str((config.get("architectures") or ["transformers"])[0]),
        settings={"layers": [list(pair) for pair in layers], "identity": identity, "added": sorted({layer_of(n) for n in added} - {None})},
        weights={
            "output": sum(store.spec(name).numel for name in store),
            "base": sum(first.spec(name).numel for name in first.store if name not in first.aliases),
        },
        notes=notes,
    )  # fmt: skip
    prints = {f"entry {number}": fingerprint(list(one), one.sample) for number, one in enumerate(opened)}
    write_folder(
        out, store, {**config, **({"dtype": dtype} if dtype else {})}, {"stack": made.to_dict(), "inputs": prints},
        beside_of=first.folder, reads=[one.original for one in opened], apart={BLOCKS: added}, dtype=dtype, overwrite=overwrite,
        progress=progress, texts={"README.md": readme(made, "+".join(first.names), [])},
    )  # fmt: skip
    checkpoint = open_checkpoint(place(out))
    checkpoint.report = made
    return checkpoint


def stacked(
    opened: Sequence[Checkpoint], layers: Sequence[tuple[int, int]], identity: bool
) -> tuple[Renamed, dict[str, Any], list[str], list[str]]:
    """The tensors, the config, the names of what is added, and notes."""
    slices = [Slice(one, *pair) for one, pair in zip(opened, layers, strict=True)]
    whole = stack_slices(slices)
    if whole.config is None:
        raise GradmatchError(
            f"{opened[0].where} has no config.json, and a stack's layers stand in it; give the model as a folder",
            "bad_model",
            opened[0].where,
        )
    begin = layers[0][1] - layers[0][0]
    table = {name: (whole.store, name) for name in whole.store if layer_of(name) is not None}
    outside = [name for name in opened[0].store if layer_of(name) is None and name not in opened[0].aliases]
    first = {name: (opened[0].store, name) for name in outside}
    added = [name for name in table if (layer_of(name) or 0) >= begin]
    notes = [f"layers {pair[0]} to {pair[1] - 1} of entry {n}" for n, pair in enumerate(layers)]
    if identity and added:
        zeros = {name: 0.0 for name in added if OUTPUTS.search(name)}
        check_identity(whole.config, zeros, opened[0].where)
        zeroed = Noisy(whole.store, zeros, 0.0, 0)
        table |= {name: (zeroed, name) for name in zeros}
        notes.append(
            f"the {sum(b - a for a, b in layers[1:])} blocks after the first entry's start as the identity: {len(zeros)} tensors are zero"
        )
    return Renamed({**first, **table}), dict(whole.config), added, notes


def check_identity(config: Mapping[str, Any], zeros: Iterable[str], where: str) -> None:
    """Refuse blocks that do not pass on what they get where these tensors are zero; tried on one block with random weights.

    Raises:
        GradmatchError: such blocks.
    """
    import torch

    kind = architecture(config)
    short = {
        key: (1 if key in LAYER_COUNTS else value[:1] if key == "layer_types" else value)
        for key, value in config.items()
    }
    short["mlp_only_layers"] = [] if "mlp_only_layers" in config else None
    module: Any = (
        build(kind, {key: value for key, value in short.items() if value is not None}).float().eval()
        if kind
        else None
    )
    if module is None:
        raise GradmatchError(
            f"{where}: its config names no architecture of transformers, so that nothing tells which zeros make a block the identity; stack "
            "with identity=False",
            "bad_model",
            where,
        )
    tails = {name[found.end(1) :] for name in zeros if (found := LAYER.search(name))}
    block = module.get_submodule(f"{stack_of(module, where)}.0")
    with torch.no_grad():
        for name, value in block.named_parameters():
            value.normal_(generator=torch.Generator().manual_seed(0)) if value.dim() < 2 else None
            if f".{name}" in tails:
                value.zero_()
    seen: list[Any] = []

    def keep(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.extend(
            [args[0] if args else kwargs["hidden_states"], output[0] if isinstance(output, tuple) else output]
        )

    block.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        module(**_inputs(module))
    if not tails or not torch.equal(seen[0], seen[1]):
        raise GradmatchError(
            f"zeros in {', '.join(sorted(tails)) or 'no known projection'} do not make a block of {where} ({type(block).__name__}) the identity, since it "
            "norms behind the sum or adds otherwise; stack with identity=False, and train it",
            "bad_model",
            where,
        )


def _inputs(module: Any) -> dict[str, Any]:
    import torch

    config = module.config
    if hasattr(config, "vocab_size"):
        return {"input_ids": torch.arange(4)[None] % config.vocab_size}
    return {"pixel_values": torch.zeros(1, config.num_channels, config.image_size, config.image_size)}


def train_blocks(
    folder: str | os.PathLike[str],
    batches: Any,
    steps: int = 100,
    *,
    rate: float = 1e-4,
    resume: bool = False,
    reading: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Trained:
    """Light fine-tuning of a stack: its added blocks alone are trained, by the model's loss, in place and atomically.

    Args:
        folder: of `stack`.
        batches: inputs with labels; or a file of examples.
        steps: of AdamW in all, those of an interrupted run included.
        rate: of learning.
        resume: go on where an interrupted (or shorter) training ended.
        reading: options of `gradmatch.measure.data.read`, for files.
        progress: show a bar.

    Raises:
        GradmatchError: no stack, or what `train_router` refuses.

    >>> train_blocks("deeper", "texts.txt", steps=200)                       # doctest: +SKIP
    """
    from gradmatch.estimators.files import read_json
    from gradmatch.mixture.training import train
    from gradmatch.output.card import CARD

    path = place(folder)
    told = read_json(path / CARD).get("stack") if (path / CARD).is_file() else None
    if not told or not told["settings"]["added"]:
        raise GradmatchError(
            f"{path} is no stack with added blocks; make one with stack (gradmatch stack)", "bad_model", path
        )
    added = set(told["settings"]["added"])
    return train(
        path,
        batches,
        steps,
        lambda name: layer_of(name) in added,
        "added blocks",
        rate=rate,
        resume=resume,
        reading=reading,
        progress=progress,
    )
