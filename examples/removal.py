"""Removal on ridge regression: Eq. 13 takes a task out, to what retraining without its data gives."""

import torch

from gradmatch import Curvature, Task, subtract

generator = torch.Generator().manual_seed(0)
features = 5


def problem(rows=40):  # one feature a row: every curvature is diagonal, and the formula exact
    x = torch.zeros(rows, features, dtype=torch.float64)
    x[torch.arange(rows), torch.arange(rows) % features] = 1 + torch.rand(
        rows, generator=generator, dtype=torch.float64
    )
    return x, torch.randn(rows, generator=generator, dtype=torch.float64)


def ridge(problems, start, h0):  # argmin of the summed losses plus 1/2 |theta - start|^2 in the metric h0
    h = h0 + sum((x**2).sum(0) for x, _ in problems)
    return (h0 * start + sum(x.T @ y for x, y in problems)) / h, h


keep, go = problem(), problem()
prior, zero = torch.full((features,), 0.5, dtype=torch.float64), torch.zeros(features, dtype=torch.float64)
wanted, _ = ridge([keep], zero, prior)
both, h_both = ridge([keep, go], zero, prior)
tuned, _ = ridge([go], both, h_both)  # the model, fine-tuned on what must go
task = Task({"w": tuned}, Curvature.from_dict({"w": (go[0] ** 2).mean(0)}, len(go[0])))
h0 = Curvature.from_dict({"w": h_both}, 1)
for method in ("removal", "negation"):
    result = subtract({"w": both}, task, base_curvature=h0, method=method, keep=1e-6, delta0=0.0)["w"]
    print(
        f"{method:<9} is {float((result - wanted).norm() / (both - wanted).norm()):.1e} of the way from retraining"
    )
