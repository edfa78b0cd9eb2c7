"""Per-example gradients of the common layers, from a layer's input and the gradient at its output.

Each handler is one small function (layer, input, gradient) -> {local parameter name: gradients}, with the input as
(B, ..., features) and examples first. `HANDLERS` says which class has which; a class that is not listed, or whose
instance was altered (parametrised, patched), takes the general path of `general.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from gradmatch.estimators.gradients import Dense, Gradients, Outer, Patches, Rows

Handler = Callable[[Any, Tensor, Tensor], dict[str, Gradients]]


def linear(layer: nn.Linear, x: Tensor, g: Tensor) -> dict[str, Gradients]:
    """y = W x + b: dW_n = sum_t g_nt x_nt', db_n = sum_t g_nt. x (B, ..., I), g (B, ..., O)."""
    x, g = positions(x), positions(g)
    return {"weight": Outer(g, x), "bias": Dense(g.sum(1))}


def transposed_linear(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Gradients]:
    """y = W' x + b (transformers' Conv1D keeps its weight as (I, O)): dW_n = sum_t x_nt g_nt'."""
    x, g = positions(x), positions(g)
    return {"weight": Outer(x, g), "bias": Dense(g.sum(1))}


def embedding(layer: nn.Embedding, index: Tensor, g: Tensor) -> dict[str, Gradients]:
    """y_t = W[index_t]: dW_n adds g_nt to row index_nt; the padding row, by its definition, learns nothing."""
    index, g = index.flatten(1), positions(g)
    if layer.padding_idx is not None:
        g = g.masked_fill((index == layer.padding_idx)[..., None], 0)
    return {"weight": Rows(index, g, (layer.num_embeddings, layer.embedding_dim))}


def layer_norm(layer: nn.LayerNorm, x: Tensor, g: Tensor) -> dict[str, Gradients]:
    """y = w xhat + b with xhat = (x - mean) / sqrt(var + eps): dw_n = sum_t g_nt xhat_nt, db_n = sum_t g_nt."""
    shape = tuple(layer.normalized_shape)
    normal = nn.functional.layer_norm(x, shape, eps=layer.eps)
    return _scale_and_shift(normal, g, len(shape))


def rms_norm(layer: nn.RMSNorm, x: Tensor, g: Tensor) -> dict[str, Gradients]:
    """y = w x / sqrt(mean(x^2) + eps): dw_n = sum_t g_nt xhat_nt."""
    shape = tuple(layer.normalized_shape)
    return _scale_and_shift(nn.functional.rms_norm(x, shape, eps=layer.eps), g, len(shape))


def batch_norm(layer: Any, x: Tensor, g: Tensor) -> dict[str, Gradients]:
    """In eval mode y = w (x - m) / sqrt(v + eps) + b with fixed m, v: dw_n = sum_t g_nt xhat_nt. x, g (B, C, ...)."""
    scale = (layer.running_var.to(x.dtype) + layer.eps).rsqrt()
    over = tuple(range(2, x.dim()))
    along = (g * x).sum(over) if over else g * x
    shift = g.sum(over) if over else g
    weight = (along - shift * layer.running_mean.to(x.dtype)) * scale
    return {"weight": Dense(weight), "bias": Dense(shift)}


def convolution(layer: Any, x: Tensor, g: Tensor) -> dict[str, Gradients]:
    """dW_n = sum over places of g_n(place) patch_n(place)': a linear layer on patches. x (B, C, *), g (B, O, *)."""
    examples, weight = x.shape[0], layer.weight
    bias = Dense(g.flatten(2).sum(2))
    x, padding = _padded(layer, x)
    if layer.groups == 1:
        return {"weight": Patches(g.flatten(2), windows(layer, x, padding), weight.shape), "bias": bias}
    grad = _CONVOLUTION_WEIGHT[len(layer.kernel_size)]
    size = (layer.out_channels * examples, *weight.shape[1:])  # every example is a group of its own
    merged: Tensor = grad(  # type: ignore[no-untyped-call]
        x.reshape(1, -1, *x.shape[2:]), size, g.reshape(1, -1, *g.shape[2:]),
        stride=layer.stride, padding=padding, dilation=layer.dilation, groups=layer.groups * examples,
    )  # fmt: skip
    return {"weight": Dense(merged.view(examples, *weight.shape)), "bias": bias}


def windows(layer: Any, x: Tensor, padding: tuple[int, ...]) -> Tensor:
    """What an ungrouped convolution multiplies its kernel with, as a strided view (B, C, k.., L..) of the padded input."""
    x = (
        nn.functional.pad(x, [side for p in reversed(padding) for side in (p, p)])
        if any(padding)
        else x.contiguous()
    )
    sizes, strides = [], []
    places = zip(x.shape[2:], layer.kernel_size, layer.dilation, layer.stride, x.stride()[2:], strict=True)
    for length, kernel, dilation, step, stride in places:
        sizes.append(((length - dilation * (kernel - 1) - 1) // step + 1, stride * step))
        strides.append((kernel, stride * dilation))
    shape = [*x.shape[:2], *(kernel for kernel, _ in strides), *(count for count, _ in sizes)]
    return x.as_strided(shape, [*x.stride()[:2], *(s for _, s in strides), *(s for _, s in sizes)])


def patches(layer: Any, x: Tensor) -> Tensor:
    """The patches of an ungrouped convolution as a matrix for each example, (B, places, C k..)."""
    x, padding = _padded(layer, x)
    view = windows(layer, x, padding)
    kernel = 2 + len(layer.kernel_size)
    return view.flatten(kernel).flatten(1, kernel - 1).transpose(1, 2)


def _padded(layer: Any, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input with whatever padding the convolution itself cannot express, and the padding that is left to it."""
    if layer.padding_mode != "zeros":
        x = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        return x, (0,) * len(layer.kernel_size)
    if layer.padding == "same":
        return nn.functional.pad(x, layer._reversed_padding_repeated_twice), (0,) * len(layer.kernel_size)
    if layer.padding == "valid":
        return x, (0,) * len(layer.kernel_size)
    return x, tuple(layer.padding)


def positions(values: Tensor) -> Tensor:
    """(B, ..., D) -> (B, T, D)."""
    return values.reshape(values.shape[0], -1, values.shape[-1])


def elementwise(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Gradients]:
    """y = c(x) + sum_p p s_p(x), each p one number a feature: dp_n = sum_t g_nt s_p(x_nt). x, g (B, ..., D).

    Whatever a model calls its RMSNorm (w xhat, (1 + w) xhat), its LayerNorm or its scales. c and s_p are what the layer
    gives with its parameters set to zero and to one; `is_elementwise` has seen that this is all there is to it.
    """
    _, slopes = _affine(layer, x)
    return {name: Dense(positions(slope.mul_(g)).sum(1)) for name, slope in slopes.items()}


def is_elementwise(layer: nn.Module, x: Tensor, output: Tensor) -> bool:
    """Whether `elementwise` holds for a layer: at its parameters, where it gave `output`, and at others drawn at random."""
    values = dict(layer.named_parameters(recurse=False))
    if x.shape != output.shape or {tuple(value.shape) for value in values.values()} != {x.shape[-1:]}:
        return False
    generator = torch.Generator().manual_seed(0)
    others = {n: torch.randn(v.shape, generator=generator).to(x) for n, v in values.items()}
    constant, slopes = _affine(layer, x)
    scale = 1e-3 if x.dtype == torch.float32 else 1e-8
    for at, expected in ((values, output), (others, functional_call(layer, others, (x,)))):
        found = constant + sum(value.to(x.dtype) * slopes[name] for name, value in at.items())
        if not torch.allclose(
            found, expected.to(x.dtype), rtol=scale, atol=scale * float(expected.abs().max())
        ):
            return False
    return True


def _affine(layer: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A layer's output with its own parameters at zero, and how much setting each of them to one adds to it."""
    zeros = {n: torch.zeros_like(v, dtype=x.dtype) for n, v in layer.named_parameters(recurse=False)}
    constant = functional_call(layer, zeros, (x,))
    slopes = {
        n: functional_call(layer, {**zeros, n: torch.ones_like(v)}, (x,)) - constant for n, v in zeros.items()
    }
    return constant, slopes


def _scale_and_shift(normal: Tensor, g: Tensor, trailing: int) -> dict[str, Gradients]:
    over = tuple(range(1, g.dim() - trailing))
    weight = normal.mul_(g)
    return {
        "weight": Dense(weight.sum(over) if over else weight),
        "bias": Dense(g.sum(over) if over else g),
    }


_CONVOLUTION_WEIGHT = {
    1: conv1d_weight,
    2: conv2d_weight,
    3: conv3d_weight,
}

HANDLERS: dict[type[nn.Module], Handler] = {
    nn.Linear: linear,
    nn.Embedding: embedding,
    nn.LayerNorm: layer_norm,
    nn.RMSNorm: rms_norm,
    nn.BatchNorm1d: batch_norm,
    nn.BatchNorm2d: batch_norm,
    nn.BatchNorm3d: batch_norm,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Conv3d: convolution,
}


def find_handler(layer: nn.Module) -> Handler | None:
    """The handler of a layer, or None where it must take the general path.

    A subclass counts as its parent while it inherits the parent's forward; parameters other than weight and bias, or a
    forward replaced on the instance, do not.
    """
    own = {name for name, value in layer._parameters.items() if value is not None}
    if not own <= {"weight", "bias"} or "weight" not in own:
        return None
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf") and "forward" not in vars(layer):
        return transposed_linear
    for kind, handler in HANDLERS.items():
        if isinstance(layer, kind) and type(layer).forward is kind.forward and "forward" not in vars(layer):
            if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.scale_grad_by_freq):
                return None
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is None:
                return None
            return handler
    return None
