"""Curvature without data: what fine-tuning did to a layer tells the second moments of its inputs.

A linear layer W (out, in) moves along sums of outer products g x' of gradients and inputs, so that tau'tau = sum (g'g) x x' of the
task vector tau is in the place of the inputs' moments sum x x' (WUDI, Cheng et al. 2025; ACTMat, Hameed, Tam & Raffel 2026).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.curvature import Curvature
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.files import read_json
from gradmatch.estimators.fingerprint import fingerprint, model_sampler
from gradmatch.estimators.tensorfile import TensorFile

if TYPE_CHECKING:
    from torch import Tensor, nn

    Weights = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]

CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$")
LARGEST = 16384  # inputs: a larger factor takes more than 1 GiB, and the diagonal stands in its place


def from_task_vectors(
    base: Weights,
    model: Weights,
    *,
    normalize: bool = True,
    centre: bool = False,
    conv1d: Collection[str] | None = None,
) -> Curvature:
    """A Kronecker curvature I (x) A of every matrix of a fine-tuned model, with A = tau'tau and tau = model - base. Needs no data.

    Args:
        base: what the model was fine-tuned from: a module, a mapping of tensors (`gradmatch.open_checkpoint` gives one of anything
            that is a model), or the path of safetensors files.
        model: the fine-tuned model, in any of these forms.
        normalize: divide A by its trace norm(tau)^2, so that every task weighs alike.
        centre: take the mean of tau's rows away first, as ACE-Merging does.
        conv1d: names of the weights that are stored [in, out], as GPT-2's Conv1D layers are. Modules and configs tell by themselves.

    Returns:
        A Curvature of N = 1: `factor_a` (in, in) of every tensor of two or more axes (a convolution's kernels as rows), no `factor_b`
        (the identity), and in `mean` the diagonals. Vectors, which have no such moments, have the same curvature in every entry: that
        of a task vector spread evenly. Its units are no nats: use it for all tasks of a merge or for none, and no base's curvature
        beside it but `base_curvature=0.0`.

    Raises:
        ValueError: parameters that one of the two lacks or has in another shape, and layers that may be stored either way.
        FileNotFoundError: no safetensors files at a path.

    Example:
        >>> import torch
        >>> base, model = {"w": torch.zeros(2, 2)}, {"w": torch.tensor([[3.0, 0.0], [0.0, 1.0]])}
        >>> from_task_vectors(base, model).factor_a("w")
        tensor([[0.9000, 0.0000],
                [0.0000, 0.1000]])
    """
    import torch

    before, after = (_tensors(one) for one in (base, model))
    turned = _transposed(model, after, conv1d)
    mean: dict[str, Tensor] = {}
    factors: dict[str, Tensor] = {}
    for name, theta in after.items():
        if not theta.is_floating_point():
            continue
        theta0 = before.get(name)
        if theta0 is None or theta0.shape != theta.shape:
            found = "none" if theta0 is None else str(list(theta0.shape))
            raise GradmatchError(
                f"{name!r} has shape {list(theta.shape)} in the model and {found} in the base; a task vector is of two models of one "
                "architecture",
                "shape_mismatch",
                name,
            )
        wide = torch.float64 if theta.dtype == torch.float64 else torch.float32
        tau = theta.detach().double() - theta0.detach().double()
        size = float(tau.square().sum())
        scale = 1 / (size or 1.0) if normalize else 1.0
        if tau.dim() < 2:
            mean[name] = torch.full_like(tau, scale * size / max(1, tau.numel()), dtype=wide)
            continue
        rows = tau.T if name in turned else tau.flatten(1)
        if centre:
            rows = rows - rows.mean(0, keepdim=True)
            scale = 1 / (float(rows.square().sum()) or 1.0) if normalize else 1.0
        diagonal = (scale * rows.square().sum(0)).to(wide).expand(rows.shape)
        mean[name] = (diagonal.T if name in turned else diagonal).reshape(tau.shape).contiguous()
        if rows.shape[1] <= LARGEST:
            factors[name] = (scale * (rows.T @ rows)).to(wide)
    if not mean:
        raise GradmatchError("the model has no floating-point parameters", "bad_model")
    info = {
        "estimator": "task_vectors",
        "units": "second moments of the task vector"
        + (", each tensor's over its own trace" if normalize else ""),
        "labels": "none",
        "centred": str(centre).lower(),
        "fingerprint": fingerprint(mean, model_sampler(after)),
        "torch": torch.__version__,
    }
    return Curvature.from_dict(mean, 1, info, factor_a=factors)


def _tensors(given: Any) -> Mapping[str, Tensor]:
    """The weights of a model by name, tied ones once."""
    if hasattr(given, "named_parameters"):
        return dict(given.named_parameters())
    if isinstance(given, Mapping):
        aliases = getattr(given, "aliases", {})
        return {name: given[name] for name in given if name not in aliases}
    path = Path(given).expanduser()
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise FileNotFoundError(
            f"no safetensors files at {path}; give what gradmatch.open_checkpoint makes of other models"
        )
    return {name: file.read(name) for file in map(TensorFile, files) for name in file}


def _transposed(given: Any, tensors: Mapping[str, Tensor], told: Collection[str] | None) -> frozenset[str]:
    """Which weights are stored [in, out].

    Raises:
        ValueError: named like Conv1D layers, and neither a module nor a config tells.
    """
    if told is not None:
        if unknown := sorted(set(told) - set(tensors)):
            raise GradmatchError(
                f"conv1d names {unknown[0]!r}, which the model lacks", "unknown_name", unknown[0]
            )
        return frozenset(told)
    find: Callable[[], Any] | None = getattr(getattr(given, "module", given), "named_modules", None)
    if find is not None:
        return frozenset(f"{name}.weight" for name, layer in find() if type(layer).__name__ == "Conv1D")
    named = [name for name in tensors if CONV1D.search(name) and tensors[name].dim() == 2]
    config = getattr(given, "config", None)
    if isinstance(given, (str, os.PathLike)) and (Path(given).expanduser() / "config.json").is_file():
        config = read_json(Path(given).expanduser() / "config.json")
    if named and not config:
        raise GradmatchError(
            f"{named[0]!r} is stored [in, out] in GPT-2's Conv1D layers and [out, in] in nn.Linear, and a mapping of tensors does not "
            "tell which; pass the module or its folder, or conv1d=[names], empty for none",
            "bad_setting",
            named[0],
        )
    return frozenset(named) if config and dict(config).get("model_type") in CONV1D_MODELS else frozenset()
