"""Small models with known answers, shared by the tests of merging. The oracle here is slow and imports nothing of ours."""

import torch

from gradmatch.estimators import Curvature

SHAPES = {
    "embed.weight": (11, 4),
    "layers.0.w": (4, 6),
    "layers.1.w": (6, 4),
    "norm.bias": (4,),
    "temperature": (),
}


def state(seed, dtype=torch.float64, scale=1.0, shapes=SHAPES):
    """A random state dict."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
        for name, shape in shapes.items()
    }


def tuned(base, seed, scale=0.3):
    """A fine-tune of a base: base plus a random task vector, in the base's dtype."""
    tau = state(seed, shapes={name: tuple(value.shape) for name, value in base.items()})
    return {name: (value.double() + scale * tau[name]).to(value.dtype) for name, value in base.items()}


def curvature(model, seed, num_examples, gradient=False):
    """A positive random curvature of a model, in its dtype where that is float64, else float32."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def positive(value):
        drawn = torch.rand(value.shape, generator=generator, dtype=torch.float64) ** 3
        return drawn if value.dtype == torch.float64 else drawn.float()

    mean = {name: positive(value) for name, value in model.items()}
    measured = {name: positive(value) - 0.5 for name, value in model.items()} if gradient else None
    return Curvature.from_dict(mean, num_examples, gradient=measured)


def problem(count=3, dtype=torch.float64, gradient=True):
    """(base, base curvature, models, curvatures)."""
    base = state(0, dtype)
    shared = tuned(base, 77)  # the tasks have something in common, as fine-tunes do
    models = [tuned(shared, seed) for seed in range(1, count + 1)]
    curvatures = [curvature(m, seed, 10 * seed, gradient) for seed, m in enumerate(models, 1)]
    return base, curvature(base, 0, 50), models, curvatures


def scalars(tensors):
    """Every coordinate of a list of equally shaped tensors, as tuples of Python floats."""
    return zip(*(t.double().flatten().tolist() for t in tensors), strict=True)
