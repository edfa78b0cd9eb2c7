"""Stages of the alignment study: scrambled models come back, barriers between networks from scratch, disjoint classes.

Each stage writes `out/result.json`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.files import write_json
from gradmatch import Task, estimate, merge
from gradmatch.measure.objective import Objective
from gradmatch.rebasin import align, barrier, zipit
from gradmatch.rebasin.checking import difference
from gradmatch.rebasin.learned import with_statistics
from gradmatch.rebasin.matching import moved
from gradmatch.rebasin.probing import answer, double, example, find_symmetry

Batches = list[tuple[Tensor, Tensor]]
NOISE = 1e-3  # of a tensor's size: a fine-tune's stand-in
METHODS = ("weights", "activations", "transport", "learned")


class Residual(nn.Module):
    """Two convolutions with BatchNorm beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers = [nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        self.inner = nn.Sequential(
            *layers, nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images to images."""
        return nn.functional.relu(x + self.inner(x))


def network(kind: str, seed: int, classes: int = 10) -> nn.Module:
    """A new network for grey images of 14 x 14: an MLP, a small ResNet or a small vision transformer."""
    torch.manual_seed(seed)
    if kind == "mlp":
        layers = [nn.Flatten(), nn.Linear(196, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(128, classes))
    if kind == "resnet":
        stem = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(
            *stem, Residual(16), Residual(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes)
        )
    import transformers as tf

    sizes = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
    shape = {"image_size": 14, "patch_size": 7, "num_channels": 1, "num_labels": classes}
    return _Logits(tf.ViTForImageClassification(tf.ViTConfig(**sizes, **shape)))


class _Logits(nn.Module):
    """A classifier of transformers as one that takes images and gives logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.model(pixel_values=x).logits
        return logits


def images(kept: Sequence[int] | None = None) -> tuple[Batches, Batches]:
    """Training and test batches of the packaged MNIST, 14 x 14; of some classes alone."""
    from experiments.vision.sets import read_mnist

    pixels, labels = read_mnist()
    x = nn.functional.avg_pool2d(torch.from_numpy(pixels).float()[:, None] / 255, 2)
    y = torch.from_numpy(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, test = order[:4000], order[4000:]
    if kept is not None:
        train = train[torch.isin(y[train], torch.tensor(kept))]
    return [(x[i], y[i]) for i in train.split(64)], [(x[i], y[i]) for i in test.split(250)]


def trained(kind: str, seed: int, batches: Batches, epochs: int) -> nn.Module:
    """A network from scratch: Adam, the rate falling to nothing; the seed draws its start and the order of batches."""
    module = network(kind, seed).train()
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs * len(batches))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(len(batches), generator=generator).tolist():
            x, y = batches[index]
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()
            schedule.step()
    return module.eval()


def barriers(out: Path, *, kind: str, seed: int, epochs: int, points: int) -> None:
    """Two networks of other beginnings: the barrier between them, unaligned and by each method, in nats per test example.

    BatchNorm statistics are measured again at every point. Fisher of the aligned view beside the aligned Fisher (c).
    """
    train, test = images()
    one, other = (trained(kind, 100 * seed + k, train, epochs) for k in (1, 2))
    loss = judge(one, train[:4], test)
    found: dict[str, Any] = {"unaligned": barrier(one, other, loss, points).to_dict()}
    labelled = train[:8]
    for method in METHODS:
        start = time.perf_counter()
        view = align(other, one, method, None if method == "weights" else labelled)
        seconds = time.perf_counter() - start
        told = view.report.to_dict()
        found[method] = {**barrier(one, view, loss, points).to_dict(), "seconds": seconds}
        found[method] |= {key: told[key] for key in ("difference", "distance", "unaligned_distance", "notes")}
    accuracy = {
        name: Objective(one, test).accuracy(dict(m.state_dict()))
        for name, m in (("one", one), ("other", other))
    }
    write_json(
        out / "result.json",
        {"barriers": found, "ends": accuracy, "fisher": fisher_gap(one, other, train[:1])},
    )


def judge(module: nn.Module, calibration: Batches, test: Batches) -> Callable[[Mapping[str, Tensor]], float]:
    """Nats per test example of weights, their BatchNorm statistics measured on calibration data."""
    objective = Objective(module, test)
    return lambda weights: (
        objective.loss(with_statistics(module, weights, calibration)) / objective.num_examples
    )


def fisher_gap(one: nn.Module, other: nn.Module, batches: Batches) -> float:
    """The largest difference of the moved Fisher from that of the view, as a share of the largest entry of its tensor."""
    from gradmatch.models.curvatures import moved_curvature

    other, one = double(other), double(one)
    data = [(x.double(), y) for x, y in batches]
    view = align(other, one)
    at_view = copy.deepcopy(other)
    at_view.load_state_dict(dict(view))
    options: dict[str, Any] = {"method": "empirical_fisher", "progress": False}
    there = moved_curvature(view, estimate(other, data, **options), "the aligned model")
    here = estimate(at_view, data, **options)
    return max(
        float((there.mean(n) - here.mean(n)).abs().max() / here.mean(n).max().clamp(min=1e-30)) for n in here
    )


def disjoint(out: Path, *, kind: str, seed: int, epochs: int) -> None:
    """Claim 24: two networks on classes 0 to 4 and 5 to 9, merged: accuracy over all ten classes of the test images."""
    parts = [images(range(5)), images(range(5, 10))]
    test = parts[0][1]
    one, other = (trained(kind, 100 * seed + k, train, epochs) for k, (train, _) in enumerate(parts, 1))
    calibration = [parts[k][0][b] for b in range(4) for k in (0, 1)]
    objective = Objective(one, test)
    found: dict[str, float] = {}
    for name, module in (("first alone", one), ("second alone", other)):
        found[name] = float(objective.accuracy(dict(module.state_dict())) or 0)
    for name in ("unaligned", "weights", "activations"):
        data = calibration if name == "activations" else None
        model = other if name == "unaligned" else align(other, one, name, data)
        weights = merge(
            one, [Task(one, name="a"), Task(model, name="b")], method="averaging", batchnorm="average"
        )
        found[name] = float(objective.accuracy(with_statistics(one, dict(weights), calibration)) or 0)
    for until in (1, None):  # each model answers for its own classes, with its own tail
        zipped = zipit(one, other, [x for x, _ in calibration], until)
        both = [with_statistics(one, weights, calibration) for weights in (zipped.first, zipped.second)]
        found["zipped" if until is None else "zipped, first layer"] = _joint_accuracy(one, both, test)
    write_json(out / "result.json", {"accuracy": found})


def _joint_accuracy(module: nn.Module, both: Sequence[Mapping[str, Tensor]], test: Batches) -> float:
    """Of two models over ten classes, the first answering for 0 to 4 and the second for 5 to 9."""
    right = count = 0
    with torch.no_grad():
        for x, y in test:
            first, second = (torch.func.functional_call(module, dict(weights), (x,)) for weights in both)
            right += int((torch.cat([first[:, :5], second[:, 5:]], 1).argmax(1) == y).sum())
            count += len(y)
    return right / count


def exactness(out: Path, *, model: str, trials: int) -> None:
    """A model scrambled by random members of its group: the function, the weights, and the merge that come back."""
    module = pretrained(model)
    rows = []
    for trial in range(trials):
        rows.append(_returned(module, trial))
    write_json(
        out / "result.json", {"trials": rows, "parameters": sum(p.numel() for p in module.parameters())}
    )


def _returned(module: nn.Module, trial: int) -> dict[str, float]:
    """One trial: a fine-tune's stand-in (the model with a little noise), scrambled, aligned to the model, merged with it."""
    generator = torch.Generator().manual_seed(trial)
    tuned = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in tuned.parameters():
            size = float(parameter.std()) if parameter.numel() > 1 else 0.0
            parameter.add_(NOISE * size * torch.randn(parameter.shape, generator=generator))
    symmetry, call = find_symmetry(module), example(module)
    member = symmetry.random(generator)
    scrambled, state = copy.deepcopy(tuned), tuned.state_dict()
    with torch.no_grad():
        for name, tensor in scrambled.state_dict(keep_vars=True).items():
            tensor.copy_(moved(state[name], symmetry.index(member, name)))
    kept = difference(answer(scrambled, call, "scrambled"), answer(tuned, call, "tuned"))
    start = time.perf_counter()
    view = align(scrambled, module, verify=False)
    seconds = time.perf_counter() - start
    recovered = max(float((view[name].float() - state[name].float()).abs().max()) for name in view)
    merged = [
        merge(module, [Task(module), Task(one)], method="averaging", batchnorm="average")
        for one in (view, tuned)
    ]
    gap = max(float((merged[0][name].float() - merged[1][name].float()).abs().max()) for name in merged[0])
    return {"function": kept, "weights": recovered, "merge": gap, "seconds": seconds}


def pretrained(model: str) -> nn.Module:
    """A real model from packages, or the small ResNet trained here."""
    from experiments import assets

    if model == "minilm":
        from transformers import AutoModel

        return AutoModel.from_pretrained(assets.folder("encoder")).eval()
    if model == "dinov2":
        from experiments.vision.packages import dinov2

        return dinov2(98, 10).eval()
    if model == "smollm2":
        from transformers import AutoModelForCausalLM

        place = assets.folder("smollm2")
        file = next(place.glob("*.gguf")).name
        return AutoModelForCausalLM.from_pretrained(place, gguf_file=file, dtype=torch.float32).eval()
    return trained("resnet", 1, images()[0][:30], 1)
