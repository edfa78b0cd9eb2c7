"""Stages: two sanity tests of task vectors (how much can be dropped, how orthogonal they are), and analogies between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from experiments.evaluate import measure, predict
from experiments.files import write_json
from experiments.models import load_classifier
from experiments.rows import Images, Views, load_split
from gradmatch import analogy
from gradmatch.measure.redundancy import redundancy_curve
from gradmatch.measure.similarity import cosines

Weights = Mapping[str, Tensor]
PHOTOGRAPHS = " on photographs"


def weights_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a trained stage's model."""
    return load_file(folder / "model" / "model.safetensors")


def task_vector(base: Weights, tuned: Weights) -> dict[str, Tensor]:
    """tau_t = theta_t - theta0, of floating-point tensors."""
    return {name: tuned[name] - value for name, value in base.items() if value.is_floating_point()}


def compare_vectors(out: Path, *, base: Path, tasks: Mapping[str, Path]) -> None:
    """cos(tau_s, tau_t) of whole models and ||tau_t||, in `out/cosines.json`."""
    theta0 = weights_of(base)
    vectors = [task_vector(theta0, weights_of(folder)) for folder in tasks.values()]
    total = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for name in vectors[0]:
        rows = torch.stack([vector[name].flatten() for vector in vectors]).double()
        total += rows @ rows.T
    norms = dict(zip(tasks, total.diagonal().sqrt().tolist(), strict=True))
    card = {"tasks": list(tasks), "cosines": cosines(total).tolist(), "norms": norms}
    write_json(out / "cosines.json", card)


def drop(
    out: Path, *, base: Path, model: Path, data: Views, domain: str, shares: Sequence[float], seed: int
) -> None:
    """Test accuracy of a fine-tune on its own task after dropping shares of its task vector: `out/curve.json`."""
    score = scorer(base, data, domain)
    theta0 = weights_of(base)
    progress = tqdm(total=2 * len(shares), desc=f"dropping {domain}")

    def counted(weights: Weights) -> float:
        progress.update()
        return score({**theta0, **weights})

    curve = redundancy_curve(theta0, task_vector(theta0, weights_of(model)), counted, shares, seed=seed)
    progress.close()
    points = [{"dropped": point.dropped, "plain": point.plain, "rescaled": point.rescaled} for point in curve]
    write_json(out / "curve.json", points)


def compare_analogy(
    out: Path, *, base: Path, a: Path, b: Path, c: Path, data: Views, target: str, weights: Sequence[float]
) -> None:
    """Test accuracy on `target` of the base, of a, b and c alone, and of c + weight (b - a): `out/analogy.json`."""
    score = scorer(base, data, target)
    found = {"base": score(weights_of(base))}
    found |= {name: score(weights_of(folder)) for name, folder in (("a", a), ("b", b), ("c", c))}
    points = []
    for weight in weights:
        made = analogy(*(str(folder / "model") for folder in (base, a, b, c)), weight=weight)
        points.append({"weight": weight, "accuracy": score(dict(made))})
    write_json(out / "analogy.json", {"alone": found, "points": points})


def scorer(base: Path, data: Views, domain: str) -> Callable[[Weights], float]:
    """Test accuracy on a domain as a function of the weights; an image set's name may end in ' on photographs'."""
    name = domain.removesuffix(PHOTOGRAPHS)
    rows, model = load_split(data, name, "test"), load_classifier(base / "model")
    if name != domain:
        rows = Images(on_photographs(rows.images), rows.labels, rows.classes)

    def score(weights: Weights) -> float:
        model.load_state_dict(dict(weights))
        return measure(*predict(model, rows))["accuracy"]

    return score


def on_photographs(images: Tensor, seed: int = 1) -> Tensor:
    """|patch of a grey photograph - image|, as the set `photos` is made. (n, 1, P, P) bytes -> the same."""
    from sklearn.datasets import load_sample_images

    photos = [photo.mean(-1) for photo in load_sample_images().images]
    generator = np.random.default_rng(seed)
    side = images.shape[-1]
    made = []
    for image in images[:, 0].numpy():
        photo = photos[generator.integers(len(photos))]
        top, left = (generator.integers(0, extent - side) for extent in photo.shape)
        made.append(np.abs(photo[top : top + side, left : left + side] - image))
    return torch.tensor(np.stack(made).astype(np.uint8))[:, None]
