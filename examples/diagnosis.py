"""Diagnosis: a merge at three times the weight, what it costs, and the one change that helps most."""

import copy

import torch
from torch import nn

from gradmatch import Task, diagnose, estimate, merge

torch.manual_seed(0)
base = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 3))
data, models = {}, {}
for name in ("a", "b"):
    x = torch.randn(200, 6)
    data[name] = [(x, (x @ torch.randn(6, 3)).argmax(1))]
    models[name] = copy.deepcopy(base)
    optimizer = torch.optim.Adam(models[name].parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(models[name](x), data[name][0][1]).backward()
        optimizer.step()
tasks = [Task(model, estimate(model, data[name]), 3.0, name) for name, model in models.items()]
merged = merge(base, tasks, method="task_arithmetic")
found = diagnose(base, tasks, merged, method="task_arithmetic", data=data)
print(found)
print(found.to_frame()[["name", "subject", "cost"]])
