"""`mix`: the experts' weights and a router, written as a folder that transformers or `gradmatch.mixture.load` reads."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmatch.common.warning import warn
from gradmatch.mixture.lost import config_notes, losses, told_losses
from gradmatch.mixture.request import ROUTER, Request
from gradmatch.mixture.sources import Sources, merged_outside, open_sources
from gradmatch.mixture.told import Made, readme
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.opening import open_checkpoint
from gradmatch.models.stores import SAFETENSORS_NAME, Renamed
from gradmatch.output.folder import write_folder
from gradmatch.output.publishing import check_absent, place

if TYPE_CHECKING:
    from gradmatch.models.task import Model, Task


def mix(
    base: Model | Checkpoint,
    experts: Sequence[Model | Task],
    level: str = "ffn",
    routing: str = "",
    router: str = "linear",
    top_k: int | None = None,
    dense_layers: int | Sequence[int] = 0,
    prompts: Sequence[Any] | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    method: str = "averaging",
    gate_mode: str = "seen",
    form: str = "auto",
    rank: int | None = None,
    gate_rank: int = 8,
    shared: Model | None = None,
    changes: Sequence[Mapping[str, float]] | None = None,
    seed: int = 0,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
    **options: Any,
) -> Any:
    """Let fine-tunes work side by side: their weights stay as they are, and a router decides who answers.

    What is not mixed (attention, norms, embeddings, head at level="ffn") is merged by `method`; the report says what each expert loses
    by that. A mixture of ffns of Llama, Mistral, Qwen2 and Qwen3 models with a linear router is written as a Mixtral, Qwen2-MoE or
    Qwen3-MoE that transformers loads by itself, where that holds all of their weights; every other one for `gradmatch.mixture.load`.

    Args:
        base: the model that the experts were fine-tuned from: path, hub id or module of transformers.
        experts: fine-tuned models, adapters too; a Task brings its own weight, curvature and name.
        level: what an expert is: the "ffn" of a layer, a whole "block", or a whole "model" (also of another architecture with the same
            vocabulary and labels).
        routing: a choice for every "token", or one for the whole "sample" (default: by token of ffns and low-rank experts, else by sample).
        router: "linear", "mlp", or "spectral", which needs no data: it compares how far an input reaches into the leading right
            singular vectors of each task vector.
        top_k: experts that take part in an answer (default: 2 of ffns, else 1).
        dense_layers: merge the first so many layers (or the listed ones) and mix the rest.
        prompts: one entry an expert: a list of texts (or of batches of inputs), or {"positive": [...], "negative": [...]}. Without any
            a linear or MLP router starts at random and has to be trained.
        out: the folder; None: nothing is kept and the loaded module is returned.
        method: the rule of what is merged, or "base": the base's.
        gate_mode: how prompts become a router; see `gradmatch.mixture.request.Request`.
        form: "auto", "mixtral", "qwen2_moe", "qwen3_moe" or "own".
        rank: of router="spectral": experts are the merged weights and low-rank differences from them, so that the mixture is little
            larger than one model.
        gate_rank: directions of each task vector that a spectral router looks along.
        shared: a model whose ffns take part in every answer, as Qwen2-MoE has it.
        changes: of each expert, as mergekit-moe has them: {"noise_scale": s, "residual_scale": r}.
        seed: of routers that start at random, and of noise.
        dtype: of the output; None: the base's.
        overwrite: replace an output that is there.
        progress: show a bar.
        **options: of the merge by `method`: see `gradmatch.merge`.

    Returns:
        The opened folder, with `.report`; without `out` the module.

    Raises:
        GradmatchError: what does not fit together; the message names it and says what to do.
        FileExistsError: `out` is there.

    >>> mix("base", ["maths", "prose"], prompts=[["2 + 2 ="], ["Once upon a time"]], out="mixture")    # doctest: +SKIP
    >>> AutoModelForCausalLM.from_pretrained("mixture")                                               # doctest: +SKIP
    """
    request = Request(
        level, routing, router, top_k, dense_layers, gate_mode, form, rank, gate_rank, seed, dtype
    )
    if out is None:
        from gradmatch.mixture.loading import load

        with tempfile.TemporaryDirectory(prefix="gradmatch-") as folder:
            sources = _opened(base, experts, prompts, request, shared, changes)
            _write(
                sources,
                request,
                Path(folder) / "mixture",
                method,
                options,
                overwrite=False,
                progress=progress,
            )
            return load(Path(folder) / "mixture")
    check_absent(place(out), overwrite)
    sources = _opened(base, experts, prompts, request, shared, changes)
    made = _write(sources, request, place(out), method, options, overwrite=overwrite, progress=progress)
    checkpoint = open_checkpoint(place(out))
    checkpoint.report = made
    return checkpoint


def _opened(
    base: Any,
    experts: Sequence[Any],
    prompts: Sequence[Any] | None,
    request: Request,
    shared: Any,
    changes: Sequence[Mapping[str, float]] | None,
) -> Sources:
    alike = request.level != "model" or bool(request.dense_layers)
    sources = open_sources(base, experts, prompts, alike=alike, settings=changes, shared=shared)
    request.experts_at_once(len(sources.experts))
    return sources


def _write(
    sources: Sources,
    request: Request,
    out: Path,
    method: str,
    options: Mapping[str, Any],
    *,
    overwrite: bool,
    progress: bool,
) -> Made:
    """Choose the form, and write it."""
    from gradmatch.mixture.native import NativeForm, native_target

    target, why = native_target(sources, request)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".gradmatch-", dir=out.parent) as meanwhile:
        form: Any
        if target:
            form = NativeForm(sources, request, target)
        else:
            from gradmatch.mixture.own import OwnForm

            form = OwnForm(sources, request)
            if why:
                form.notes.append(f"{why}: it is written for gradmatch.mixture.load")
        merged = merged_outside(sources, form.merged, method, Path(meanwhile), **options)
        tensors, routers = form.store(merged)
        lost = losses(sources, merged, form.outside, form.inside)
        notes = [*sources.notes, *config_notes(sources), *form.notes, *told_losses(lost, request.level)]
        store = Renamed({name: (one, name) for one in (tensors, routers) for name in one})
        count, level = len(sources.experts), request.level
        made = Made(
            f"a mixture of {count} experts at the {level} level",
            target or "own",
            sources.names,
            {**form.settings, "method": method, **options},
            form.sizes(store),
            lost,
            list(dict.fromkeys(notes)),
        )
        dtype = request.dtype or _common_dtype(sources, form.inside, made)
        config = {**form.config, **({"dtype": dtype} if dtype else {})}
        reads = [sources.base.original, *(one.model.original for one in sources.experts)]
        write_folder(
            out, store, config, {"mixture": {**made.to_dict(), "digest": sources.digest}, "inputs": sources.prints},
            beside_of=sources.base.folder, reads=reads, apart={ROUTER: list(routers)},
            metadata={"experts": sources.digest}, dtype=dtype, overwrite=overwrite, progress=progress,
            texts={"README.md": readme(made, "+".join(sources.base.names), ["+".join(e.model.names) for e in sources.experts])},
        )  # fmt: skip
    return made


def _common_dtype(sources: Sources, inside: Sequence[str], made: Made) -> str | None:
    """The base's dtype where an expert is stored in another one: tensors of experts are stacked when they are loaded."""
    base = sources.base
    name = next((name for name in inside if name in base), next(iter(base.store)))
    others = {one.model.spec(name).dtype for one in sources.experts if name in one.model} - {
        base.spec(name).dtype
    }
    if not others:
        return None
    torch_name = next(key for key, value in SAFETENSORS_NAME.items() if value == base.spec(name).dtype)
    made.notes.append(
        f"experts in {', '.join(sorted(others))} are written in the base's {base.spec(name).dtype}"
    )
    warn(made.notes[-1])
    return torch_name
