"""Curvature read off Adam, IVON and laplace-torch: values by hand, name mapping, and refusals."""

import math
import tempfile

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

from gradmatch.estimators import estimate, from_adam, from_ivon, from_laplace
from tests.estimators.architectures import ENCODER, mlp, text


def train(model, optimizer, steps=3, batch=4, seed=0):
    """A few steps with their mean gradients squared, as Adam sees them."""
    generator = torch.Generator().manual_seed(seed)
    squares = []
    for _ in range(steps):
        x, y = torch.randn(batch, 4, generator=generator), torch.randint(0, 3, (batch,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        squares.append({name: value.grad**2 for name, value in model.named_parameters()})
        optimizer.step()
    return squares


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("form", ["live", "dict", "file", "folder"])
def test_adam_by_hand(kind, form, tmp_path):
    model = mlp()
    optimizer = kind(model.parameters(), lr=1e-3, betas=(0.9, 0.9))
    squares = train(model, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    state = {
        "live": optimizer, "dict": optimizer.state_dict(), "file": str(tmp_path / "optimizer.pt"), "folder": tmp_path,
    }[form]  # fmt: skip
    found = from_adam(state, model, num_examples=100, batch_size=4)
    for name in squares[0]:
        v_hat = sum(0.1 * 0.9 ** (2 - t) * square[name] for t, square in enumerate(squares)) / (1 - 0.9**3)
        torch.testing.assert_close(found[name], 4 * v_hat)
        torch.testing.assert_close(found.total(name), 100 * 4 * v_hat)
    assert found.num_examples == 100


def test_adam_is_the_fisher_on_a_converged_net():
    """At the optimum of a well-specified model B E[g_B^2] = Var(g_n) + B gbar^2 with gbar = 0: the Fisher.

    200 batches at fixed weights, beta2 so close to 1 that v_hat is their plain mean: each coordinate's mean of 200
    squares of near-Gaussian numbers has a relative error of sqrt(2/200) = 0.1; the trace over 15 coordinates is held to
    5 times its own.
    """
    torch.manual_seed(0)
    model, batch, runs = nn.Linear(4, 3).double(), 64, 200
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, 1 - 1e-9))
    inputs = []
    for _ in range(runs):
        x = torch.randn(batch, 4).double()
        inputs.append(x)
        y = torch.distributions.Categorical(
            logits=model(x).detach()
        ).sample()  # the model is the truth: converged
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    found = from_adam(optimizer, model, num_examples=runs * batch, batch_size=batch)
    exact = estimate(model, inputs, method="ggn", progress=False)
    ratio = sum(float(found[key].sum()) for key in found) / sum(float(exact[key].sum()) for key in exact)
    assert abs(ratio - 1) < 5 * math.sqrt(2 / runs / 4)


def test_adam_of_the_trainer_has_decayed_parameters_first(tmp_path):
    model = tf.BertForSequenceClassification(tf.BertConfig(**ENCODER))
    forbidden = ("bias", "LayerNorm")
    decay = [v for n, v in model.named_parameters() if not any(f in n for f in forbidden)]
    rest = [v for n, v in model.named_parameters() if any(f in n for f in forbidden)]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    )
    batch = text()
    model(**batch).loss.backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    found = from_adam(tmp_path / "optimizer.pt", model, num_examples=10, batch_size=5)
    for name, value in model.named_parameters():
        torch.testing.assert_close(found[name], 5 * value.grad**2)


class Scaled(nn.Module):
    """Three parameters of which two have the same shape."""

    def __init__(self):
        super().__init__()
        self.linear, self.after = nn.Linear(4, 4), nn.Module()
        self.after.gamma = nn.Parameter(torch.rand(4))

    def forward(self, x):
        return self.linear(x) * self.after.gamma


def frozen(named):
    model = mlp()
    model[2].requires_grad_(False)
    return model, model.named_parameters() if named else model.parameters()


def of_layers(model, order):
    return model, [{"params": list(model[n].parameters()), "lr": 10.0**-n} for n in order]


def decayed_first(decay):
    model = Scaled()
    decayed = [model.linear.weight, model.after.gamma]
    return model, [
        {"params": decayed, "weight_decay": decay},
        {"params": [model.linear.bias], "weight_decay": 0.0},
    ]


def wrapped():
    model = mlp()
    return model, nn.DataParallel(model).named_parameters()


def clip():
    """Its norms are called layer_norm1, which no pattern of the Trainer has; its class_embedding has one dimension and is decayed."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = tf.CLIPVisionModel(tf.CLIPVisionConfig(**sizes, image_size=4, patch_size=2))
    trainer = tf.Trainer(model, tf.TrainingArguments(tempfile.mkdtemp(), report_to=[], use_cpu=True))
    groups = trainer.create_optimizer().param_groups
    assert all(group["params"] for group in groups)
    return model, [{key: group[key] for key in ("params", "weight_decay")} for group in groups]


def after_a_step(model, given):
    optimizer = torch.optim.AdamW(given)
    for group in optimizer.param_groups:
        for value in group["params"]:
            value.grad = torch.randn_like(value) if value.requires_grad else None
    optimizer.step()
    return optimizer


ORDERS = {  # how the parameters were given to the optimizer -> (model, what it was given)
    "frozen, named": lambda: frozen(True),
    "frozen": lambda: frozen(False),
    "names backwards": lambda: (lambda model: (model, list(model.named_parameters())[::-1]))(mlp()),
    "the head first": lambda: of_layers(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), (1, 0)),
    "layers backwards": lambda: of_layers(
        nn.Sequential(*(nn.Linear(n, n + 1) for n in range(4, 9))), range(4, -1, -1)
    ),
    "groups before the model's order": lambda: decayed_first(0.1),
    "wrapped": wrapped,
    "the Trainer's, norms of any name": clip,
}


@pytest.mark.parametrize("name", ORDERS)
def test_stored_states_get_the_names_of_live_ones(name):
    model, given = ORDERS[name]()
    optimizer = after_a_step(model, given)
    live, stored = (
        from_adam(state, model, num_examples=5, batch_size=4) for state in (optimizer, optimizer.state_dict())
    )
    assert (
        list(live)
        == list(stored)
        == [name for name, value in model.named_parameters() if value.requires_grad]
    )
    assert all(torch.equal(live[name], stored[name]) for name in live)


def test_a_whole_state_of_fsdp_goes_by_names():
    model = mlp()
    optimizer = after_a_step(model, model.parameters())
    state = optimizer.state_dict()
    names = [name for name, _ in model.named_parameters()]
    named = {
        "state": {names[n]: entry for n, entry in state["state"].items()},
        "param_groups": [{**state["param_groups"][0], "params": names}],
    }
    one, other = (from_adam(each, model, num_examples=5, batch_size=4) for each in (state, named))
    assert all(torch.equal(one[name], other[name]) for name in names)


@pytest.mark.parametrize(
    "given",
    [lambda: decayed_first(0.0), lambda: of_layers(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), (0, 1))],
)
def test_adam_refuses_states_that_fit_in_two_ways(given):
    model, groups = given()
    state = after_a_step(model, groups).state_dict()
    for group in state["param_groups"]:
        group.pop("param_names", None)
    with pytest.raises(ValueError, match=r"two ways: the same state could be that of '\S+' or of '\S+'"):
        from_adam(state, model, num_examples=1, batch_size=1)


def test_adams_own_weight_decay_is_part_of_its_gradient():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.5)
    before = model[0].weight.detach().clone()
    train(model, optimizer, 1)
    found = from_adam(optimizer, model, num_examples=5, batch_size=4)
    torch.testing.assert_close(found["0.weight"], 4 * (model[0].weight.grad + 0.5 * before) ** 2)


def test_numbers_of_numpy_are_whole_numbers():
    model, optimizer = adam_state()
    found = from_adam(optimizer, model, num_examples=np.int64(10), batch_size=np.int32(4))
    assert type(found.num_examples) is int


def adam_state(**changes):
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), **changes)
    train(model, optimizer, 1)
    return model, optimizer


def edited(edit):
    model, optimizer = adam_state()
    state = optimizer.state_dict()
    edit(state)
    return model, state


def sgd():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    train(model, optimizer, 1)
    return model, optimizer


def untrained():
    model = mlp()
    return model, torch.optim.Adam(model.parameters())


def partly():
    model = mlp()
    optimizer = torch.optim.Adam(model[0].parameters())
    train(model, optimizer, 1)
    return model, optimizer


def other_model():
    layers = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6, bias=False), nn.Linear(6, 4)
    return nn.Sequential(*layers), adam_state()[1].state_dict()


def smaller_model():
    return nn.Linear(4, 6), adam_state()[1].state_dict()


def live_of_another_shape():
    model, optimizer = adam_state()
    optimizer.state[model[0].weight]["exp_avg_sq"] = torch.ones(2)
    return model, optimizer


def live_of_8_bits():
    model, optimizer = adam_state()
    optimizer.state[model[0].weight] = {"state1": torch.ones(2), "state2": torch.ones(2), "step": 1}
    return model, optimizer


def stored(given, form=lambda state: state):
    model, optimizer = given
    return model, form(optimizer.state_dict())


ADAM_ERRORS = {
    "amsgrad": (lambda: adam_state(amsgrad=True), "amsgrad keeps a running maximum"),
    "8 bit": (
        lambda: edited(lambda s: s["state"].update({0: {"state1": 1, "qmap2": 2}})),
        "parameter 0 is that of bitsandbytes, quantised to 8 bits",
    ),
    "8 bit, live": (live_of_8_bits, "the state of '0.weight' is that of bitsandbytes"),
    "nothing stored": (
        lambda: edited(lambda s: s["state"].clear()),
        "has no exp_avg_sq for any parameter .it holds nothing",
    ),
    "sgd stored": (lambda: stored(sgd()), "no exp_avg_sq for any parameter .it holds momentum_buffer"),
    "one without": (
        lambda: edited(lambda s: s["state"].pop(1)),
        "'0.bias' has no exp_avg_sq .it holds nothing",
    ),
    "a training state": (
        lambda: stored(adam_state(), lambda state: {"epoch": 1, "opt": state}),
        "no optimizer's state_dict: it lacks 'state' and 'param_groups'; its part 'opt' is one",
    ),
    "Lightning's list": (
        lambda: stored(adam_state(), lambda state: {"state_dict": {}, "optimizer_states": [state]}),
        r"its part 'optimizer_states\[0\]' is one",
    ),
    "a copy of the model": (lambda: (mlp(), adam_state()[1]), "5 parameters, none of them this model's"),
    "sgd": (sgd, "has no exp_avg_sq .it holds momentum_buffer"),
    "untrained": (untrained, "has no exp_avg_sq .it holds nothing"),
    "no step": (lambda: edited(lambda s: s["state"][0].update(step=0)), "has taken no step on '0.weight'"),
    "partly": (partly, "no state for '2.weight' .3 in all"),
    "another model": (
        other_model,
        r"its parameter 3 has shape \[3, 6\], the model's '3.weight' has \[4, 6\]\. If it is the model",
    ),
    "smaller model": (smaller_model, "the optimizer has 5 parameters, the model 2 trainable ones"),
    "shape": (live_of_another_shape, r"the state of '0.weight' has shape \[2\], the parameter \[6, 4\]"),
}


@pytest.mark.parametrize("name", ADAM_ERRORS)
def test_adam_refuses(name):
    build, message = ADAM_ERRORS[name]
    model, state = build()
    with pytest.raises(ValueError, match=message):
        from_adam(state, model, num_examples=10, batch_size=4)


def test_adam_refuses_files_and_numbers(tmp_path):
    model, optimizer = adam_state()
    torch.save(optimizer.state_dict(), tmp_path / "whole.pt")
    torch.save(optimizer, tmp_path / "pickle.pt")
    torch.save({"weights": 1}, tmp_path / "odd.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    contents = {"cut": (tmp_path / "whole.pt").read_bytes()[:900], "text": b"hello world", "empty": b""}
    for name, content in contents.items():
        (tmp_path / f"{name}.pt").write_bytes(content)
    for name in (*contents, "pickle"):
        with pytest.raises(ValueError, match=rf"{name}.pt cannot be read \(.+\): it is cut short") as caught:
            from_adam(tmp_path / f"{name}.pt", model, num_examples=10, batch_size=4)
        assert "weights_only" not in str(caught.value)  # nobody is told to unpickle
    for state, batch_size, error, said in (
        (tmp_path / "nothing.pt", 4, FileNotFoundError, "no optimizer state at"),
        (tmp_path / "odd.pt", 4, ValueError, "lacks 'state' and 'param_groups'"),
        (tmp_path / "list.pt", 4, ValueError, "holds a list, not an optimizer's state_dict"),
        (None, 4, TypeError, "must be an optimizer, its state_dict or a file, got NoneType"),
        (optimizer, 4.0, TypeError, "batch_size must be a whole number"),
        (optimizer, 0, ValueError, "batch_size must be at least 1"),
    ):
        with pytest.raises(error, match=said):
            from_adam(state, model, num_examples=10, batch_size=batch_size)


# IVON


def ivon_after(steps, **options):
    ivon = pytest.importorskip("ivon", reason="ivon-opt is optional")
    model = mlp()
    optimizer = ivon.IVON(model.parameters(), lr=0.1, ess=50.0, beta2=0.9, weight_decay=1e-2, **options)
    for _ in range(steps):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(8, 4)), torch.randint(0, 3, (8,))).backward()
        optimizer.step()
    return model, optimizer


def test_ivon_is_its_posterior_precision_without_the_prior():
    model, optimizer = ivon_after(3)
    found = from_ivon(optimizer, model)
    flat = torch.cat([found.total(name).flatten() for name in found])
    torch.testing.assert_close(flat, 50.0 * optimizer.param_groups[0]["hess"])
    assert list(found) == [name for name, _ in model.named_parameters()]
    assert found.num_examples == 50
    assert float(found.info["delta"]) == pytest.approx(0.5)


def test_ivon_tells_how_much_of_its_hessian_is_the_start(caplog):
    model, optimizer = ivon_after(3)
    with caplog.at_level("WARNING"):
        found = from_ivon(optimizer, torch.compile(model, backend="eager"))
    assert list(found) == [name for name, _ in model.named_parameters()]
    assert float(found.info["initial_share"]) == pytest.approx(0.9**3, rel=1e-3)
    assert "to 73 % still its initial value 1" in caplog.text
    caplog.clear()
    model, optimizer = ivon_after(30)
    from_ivon(optimizer, model)
    assert not caplog.records


def test_ivon_refuses():
    model, optimizer = ivon_after(0)
    with pytest.raises(ValueError, match=r"still at its initial value 1\.0"):
        from_ivon(optimizer, model)
    with pytest.raises(TypeError, match="Adam is no IVON optimizer"):
        from_ivon(torch.optim.Adam(model.parameters()), model)
    model, optimizer = ivon_after(1)
    with pytest.raises(ValueError, match="that the model does not have"):
        from_ivon(optimizer, mlp())
    with pytest.raises(ValueError, match=r"does not hold '1\.weight' \(2 in all\)"):
        from_ivon(optimizer, nn.Sequential(model, nn.Linear(3, 3)))
    optimizer.param_groups.append({**optimizer.param_groups[0], "ess": 7.0})
    with pytest.raises(ValueError, match="different effective sample sizes"):
        from_ivon(optimizer, model)


# laplace-torch, by the attributes of its fitted objects (its own package pins another torchvision)


class Diagonal:
    """What a fitted DiagLaplace offers."""

    def __init__(self, model, h, n_data=20, prior=2.0):
        self.model, self.n_data = model, n_data
        self.prior_precision_diag = torch.full_like(h, prior)
        self.posterior_precision = h + prior


def test_laplace_is_its_posterior_precision_without_the_prior():
    model = mlp()
    h = torch.rand(sum(value.numel() for value in model.parameters()))
    found = from_laplace(Diagonal(model, h))
    torch.testing.assert_close(torch.cat([found.total(name).flatten() for name in found]), h)
    assert found.num_examples == 20


def test_laplace_of_the_last_layer():
    inner = mlp()

    class Extractor(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.last_layer = inner, inner[4]

    h = torch.rand(21)
    found = from_laplace(Diagonal(Extractor(), h))
    assert list(found) == ["4.weight", "4.bias"]
    torch.testing.assert_close(found.total("4.bias"), h[18:])


def test_laplace_refuses():
    model = mlp()
    h = torch.rand(sum(value.numel() for value in model.parameters()))
    for fitted, said in (
        (Diagonal(model, h, n_data=0), "is not fitted"),
        (Diagonal(model, torch.eye(3)), "is neither diagonal nor in Kronecker factors"),
        (Diagonal(model, torch.rand(4)), "has 4 numbers, the model"),
        (Diagonal(model, torch.zeros_like(h)), "a curvature of exactly zero everywhere"),
    ):
        with pytest.raises(ValueError, match=said):
            from_laplace(fitted)
