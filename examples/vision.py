"""Images: convolutions and BatchNorm, whose statistics are measured anew on a few images after the merge."""

import copy

import torch
from torch import nn

from gradmatch import Task, estimate, merge

torch.manual_seed(0)
base = nn.Sequential(
    nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
).eval()
images, labels = torch.randn(32, 1, 8, 8), torch.randint(3, (32,))


def tuned(seed):  # stands for fine-tuning
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.05 * torch.randn_like(value))
        model.train()(images + seed)  # its BatchNorm has seen other images
    return model.eval()


tasks = [Task(model, estimate(model, [(images, labels)])) for model in (tuned(1), tuned(2))]
h0 = estimate(base, [(images, labels)])
merged = merge(base, tasks, base_curvature=h0, batchnorm="recalibrate", batches=[images])
print(merged.report.summary())
base.load_state_dict(merged)
print(
    "mean and spread behind BatchNorm:",
    [round(float(v), 2) for v in torch.std_mean(base[:2](images).detach())[::-1]],
)
