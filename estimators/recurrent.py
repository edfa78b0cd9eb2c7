"""Per-example gradients of torch's RNN, GRU and LSTM, by unrolling them into their matrix products.

A step takes two products, gi_t = W_ih x_t + b_ih and gh_t = W_hh h_{t-1} + b_hh. With the gradients that arrive at them,
dW_ih,n = sum_t dgi_nt x_nt', dW_hh,n = sum_t dgh_nt h_{n,t-1}', and the biases' are sum_t dgi_nt and sum_t dgh_nt: the same
outer products as a linear layer's. The module is run once more for it, step by step, for all examples together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradmatch.estimators.general import Recorded
from gradmatch.estimators.gradients import Dense, Gradients, Outer
from gradmatch.estimators.units import wide


@dataclass
class _Direction:
    """One direction of one layer: what goes into its products, (T, B, .), and the products, whose gradients are wanted."""

    suffix: str
    inputs: Tensor
    before: list[Tensor]
    from_input: Tensor
    from_state: list[Tensor]


def unrollable(call: Recorded) -> bool:
    """Whether a call is one of torch's own recurrent nets, as it stands, on a plain (T, B, I) or (B, T, I) input."""
    module, inputs = call.module, call.args
    return (
        type(module) in (nn.RNN, nn.GRU, nn.LSTM)
        and "forward" not in vars(module)
        and not module.proj_size
        and not call.kwargs
        and len(inputs) in (1, 2)
        and isinstance(inputs[0], Tensor)
        and inputs[0].dim() == 3
    )


def recurrent_gradients(call: Recorded, names: list[str]) -> dict[str, Gradients]:
    """Gradients of these parameters (by their names within the module) for all examples.

    Outputs in the order of the module's own: the sequence, then the last state (and cell).
    """
    module: nn.RNNBase = call.module  # type: ignore[assignment]
    with torch.enable_grad():
        outputs, directions = _unroll(module, *call.args)
        products = [value for each in directions for value in (each.from_input, *each.from_state)]
        used = [place for place in call.gradients if outputs[place].requires_grad]
        found = torch.autograd.grad(
            [outputs[place] for place in used],
            products,
            [call.gradients[place] for place in used],
            allow_unused=True,
        )
    wanted = iter(
        torch.zeros_like(value) if g is None else g for value, g in zip(products, found, strict=True)
    )
    gradients: dict[str, Gradients] = {}
    for each in directions:
        gradients |= _of_direction(each, wanted)
    return {name: gradients[name] for name in names}


def _of_direction(each: _Direction, wanted: Iterator[Tensor]) -> dict[str, Gradients]:
    at_input = wide(next(wanted)).transpose(0, 1)  # (B, T, G)
    at_state = wide(torch.stack([next(wanted) for _ in each.from_state], 1))
    before = wide(torch.stack([h.detach() for h in each.before], 1))
    return {
        "weight_ih" + each.suffix: Outer(at_input, wide(each.inputs.detach()).transpose(0, 1)),
        "weight_hh" + each.suffix: Outer(at_state, before),
        "bias_ih" + each.suffix: Dense(at_input.sum(1)),
        "bias_hh" + each.suffix: Dense(at_state.sum(1)),
    }


def _unroll(
    module: nn.RNNBase, given: Tensor, state: Tensor | tuple[Tensor, Tensor] | None = None
) -> tuple[list[Tensor], list[_Direction]]:
    """The module's outputs, flat, and everything that its gradients are made of."""
    sequence = given.transpose(0, 1) if module.batch_first else given  # (T, B, I)
    ways = 2 if module.bidirectional else 1
    lstm = isinstance(module, nn.LSTM)
    empty = sequence.new_zeros(module.num_layers * ways, sequence.shape[1], module.hidden_size)
    hidden, cells = (state if lstm else (state, empty)) if state is not None else (empty, empty)
    last: list[Tensor] = []
    last_cells: list[Tensor] = []
    directions: list[_Direction] = []
    for layer in range(module.num_layers):
        results = []
        for way in range(ways):
            place = layer * ways + way
            each, out, cell = _run(
                module, f"_l{layer}" + "_reverse" * way, sequence, hidden[place], cells[place], way == 1
            )
            directions.append(each)
            last.append(out[0 if way else -1])
            last_cells.append(cell)
            results.append(torch.stack(out))
        sequence = torch.cat(results, 2)
    output = sequence.transpose(0, 1) if module.batch_first else sequence
    outputs = [output, torch.stack(last)]
    return [*outputs, torch.stack(last_cells)] if lstm else outputs, directions


def _run(
    module: nn.RNNBase, suffix: str, sequence: Tensor, h: Tensor, c: Tensor, backwards: bool
) -> tuple[_Direction, list[Tensor], Tensor]:
    """One direction of one layer: its products, its outputs in the order of time, and its last cell."""
    weight = getattr(module, "weight_hh" + suffix)
    bias = getattr(module, "bias_hh" + suffix) if module.bias else None
    own = getattr(module, "bias_ih" + suffix) if module.bias else None
    from_input = nn.functional.linear(sequence, getattr(module, "weight_ih" + suffix), own)
    if not from_input.requires_grad:
        from_input.requires_grad_()
    steps = range(len(sequence))
    before: list[Tensor] = []
    from_state: list[Tensor] = []
    out: dict[int, Tensor] = {}
    arriving = from_input.unbind()
    for t in reversed(steps) if backwards else steps:
        before.append(h)
        product = nn.functional.linear(h, weight, bias)
        if not product.requires_grad:
            product.requires_grad_()
        from_state.append(product)
        h, c = _step(module, arriving[t], product, h, c)
        out[t] = h
    if backwards:  # as the inputs are, in the order of time
        before.reverse()
        from_state.reverse()
    return _Direction(suffix, sequence, before, from_input, from_state), [out[t] for t in steps], c


def _step(module: nn.RNNBase, gi: Tensor, gh: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the formulas in torch's documentation; (B, H) each."""
    if isinstance(module, nn.LSTM):
        i, f, g, o = (gi + gh).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c
    if isinstance(module, nn.GRU):
        (r, z, n), (hr, hz, hn) = gi.chunk(3, 1), gh.chunk(3, 1)
        z = torch.sigmoid(z + hz)
        return (1 - z) * torch.tanh(n + torch.sigmoid(r + hr) * hn) + z * h, c
    return (torch.tanh if module.nonlinearity == "tanh" else torch.relu)(gi + gh), c
