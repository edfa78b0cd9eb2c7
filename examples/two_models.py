"""Two fine-tunes of one small network, merged by their uncertainty: twenty lines from a loop of one's own to the merge."""

import copy

import torch
from torch import nn

from gradmatch import Task, estimate, merge

torch.manual_seed(0)


def tuned(model, x, y):  # stands for your own training loop
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def domain(shift):  # one rule, seen in different places
    x = torch.randn(300, 4) + torch.tensor([shift, 0, 0, 0])
    return x, (x[:, 0] * x[:, 1] > x[:, 2] + x[:, 3]).long()


data = {"base": domain(0.0), "left": domain(-2.0), "right": domain(2.0)}
base = tuned(nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2)), *data["base"])
models = {name: tuned(base, *data[name]) for name in ("left", "right")}
tasks = [Task(model, estimate(model, [data[name]]), name=name) for name, model in models.items()]
for method in ("task_arithmetic", "gradient_matching"):
    merged = merge(base, tasks, method=method, base_curvature=estimate(base, [data["base"]]))
    for name, (x, y) in data.items():
        right = torch.func.functional_call(base, dict(merged), x).argmax(1) == y
        print(f"{method:<18} {name:<6} {right.float().mean():.3f}")
