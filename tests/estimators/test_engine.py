"""The engine: single precision, half precision, state restored, layouts, memory, and what its plan says."""

import pytest
import torch
import transformers as tf
from torch import nn

from gradmatch.estimators import estimate, products
from gradmatch.estimators.randomness import draw_index, uniforms
from tests import oracle
from tests.estimators.architectures import (
    CASES,
    ENCODER,
    B,
    T,
    as_batches,
    error,
    make,
    mlp,
    plain,
    plain_loss,
    squared,
)

SINGLE = ["mlp", "mlp on positions", "grouped cnn", "conv1d", "bert", "gpt2", "llama", "t5", "vit", "windows"]


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("onednn", [True, False])
def test_single_precision_is_exact_to_rounding(name, onednn, monkeypatch):
    if not onednn:
        monkeypatch.setattr(products, "_onednn", lambda: None)
    model, batch, loss = make(name)
    expected = squared(model, batch, loss)
    batch = {key: value.float() if value.is_floating_point() else value for key, value in batch.items()}
    found = estimate(model.float(), as_batches(batch, 3), method="empirical_fisher", progress=False)
    assert all(value.dtype == torch.float32 for value in found.values())
    assert oracle.relative_l1(found, expected) < 1e-5


@pytest.mark.parametrize(
    ("left", "right"),
    [((3, 40, 700), (3, 40, 1300)), ((3, 1, 700), (3, 1, 1300)), ((3, 2, 700), (3, 2, 1300))],
)
def test_large_matrices_are_squared_in_pieces(left, right):
    from gradmatch.estimators.gradients import Outer

    g, x = torch.randn(left), torch.randn(right)
    squares, spread = torch.zeros(700, 1300), torch.zeros(700, 1300)
    Outer(g, x).add_squares(squares, spread, products.Workspace())
    exact = torch.einsum("bto,bti->boi", g.double(), x.double())
    torch.testing.assert_close(squares.double(), (exact**2).sum(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(spread.double(), (exact**4).sum(0), rtol=1e-3, atol=1e-3)
    alone = torch.zeros(700, 1300)
    Outer(g, x).add_squares(alone, None, products.Workspace())
    torch.testing.assert_close(alone, squares, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_models_accumulate_in_single(autocast):
    model, batch, loss = make("bert")
    expected = squared(model, batch, loss)
    model = model.float() if autocast else model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = estimate(model, as_batches(batch), method="empirical_fisher", progress=False)
    assert all(value.dtype == torch.float32 for value in found.values())
    assert oracle.relative_l1(found, expected) < 0.1  # the forward itself has 8 bits


def test_the_model_is_given_back_as_it_was():
    model, batch, _ = make("llama")
    assert model.config.use_cache
    estimate(model, as_batches(batch), progress=False)
    assert model.config.use_cache
    model, batch, _ = make("bert with lora")
    model.train()
    model.base_model.model.bert.encoder.eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    required = [value.requires_grad for value in model.parameters()]
    estimate(model, as_batches(batch), gradient=True, progress=False)
    assert [module.training for module in model.modules()] == modes
    assert [value.requires_grad for value in model.parameters()] == required
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", ["fisher", "hessian"])
def test_callers_may_have_switched_gradients_off(context, method):
    model, batch, _ = make("mlp")
    expected = estimate(model, as_batches(batch), method=method, progress=False)
    pieces = list(as_batches(batch))
    with context():
        found = estimate(model, pieces, method=method, progress=False)
    assert oracle.relative_l1(found, expected) == 0


GENERAL = {
    "mlp": None,
    "bert": None,
    "gpt2": None,
    "vit": "vit.embeddings (",
    "nano gpt": "block.self_attn (",
    "lstm": "rnn (unrolled)",
    "own parameters": "whole model (vmap)",
    "t5": "encoder (one by one)",
    "deberta": "deberta.encoder (",
}


@pytest.mark.parametrize("name", GENERAL)
def test_info_says_which_modules_take_the_general_path(name):
    model, batch, _ = make(name)
    info = estimate(model, as_batches(batch), progress=False).info
    if GENERAL[name] is None:
        assert "general_path" not in info
    else:
        assert GENERAL[name] in info["general_path"]


def test_unused_parameters_have_curvature_zero_and_are_named():
    model, batch, _ = make("own parameters")
    found = estimate(model, as_batches(batch), progress=False)
    assert found.info["unused_parameters"] == "unused.bias, unused.weight"
    assert not found["unused.weight"].any()


class Compiled(nn.Module):
    """A parameter that only compiled code is given, and a compiled layer."""

    def __init__(self, whole):
        super().__init__()
        self.inner, self.scale = nn.Linear(4, 6), nn.Parameter(torch.rand(6) + 0.5)
        self.head = torch.jit.script(nn.Linear(6, 3)) if whole else nn.Linear(6, 3)
        self.spare = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.head(scaled(self.inner(x), self.scale))


@torch.jit.script
def scaled(h, scale):
    return torch.tanh(h) * scale


@pytest.mark.parametrize("whole", [False, True])
def test_parameters_used_by_compiled_code(whole):
    model, batch = Compiled(whole).double(), plain(4)
    found = estimate(model, as_batches(batch), method="empirical_fisher", progress=False)
    assert found.info["unused_parameters"] == "spare"
    assert oracle.relative_l1(found, squared(model, batch)) < 1e-9


def test_position_rows_that_no_example_reaches_are_zero_not_missing():
    model, batch, _ = make("bert")
    found = estimate(model, as_batches(batch), progress=False)["bert.embeddings.position_embeddings.weight"]
    assert float(found[:T].abs().min()) > 0
    assert float(found[T:].abs().max()) == 0


def test_a_first_batch_of_one_example_is_enough_to_begin_with():
    model, batch, loss = make("time first, as many steps as examples")
    rest = {key: value[1:] for key, value in batch.items()}
    pieces = [*as_batches(oracle.cut(batch, 0)), *as_batches(rest)]
    assert error(model, batch, loss, pieces) < 1e-9


class Gated(nn.Module):
    """Time first inside; the rows whose inputs are zero send no gradient to any layer."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        steps = x.transpose(0, 1)
        weights = torch.linspace(0.1, 1, len(steps), dtype=x.dtype)[:, None, None]
        h = torch.tanh(self.norm(self.inner(steps))) * weights
        return self.head(h.sum(0) * (x != 0).any(2).any(1)[:, None])


@pytest.mark.parametrize("silent", ["ignored labels", "no gradient"])
@pytest.mark.parametrize(("steps", "examples"), [(3, 8), (6, 6), (9, 5), (4, 4), (5, 5)])
def test_layouts_are_not_settled_by_rows_without_gradient(silent, steps, examples):
    torch.manual_seed(0)
    model = Gated().double()
    x = torch.randn(examples, steps, 4).double()
    y = torch.arange(examples) % 3
    if silent == "ignored labels":
        y[:3] = -100
    else:
        x[:3] = 0
    assert error(model, {"x": x, "labels": y}) < 1e-9


def test_only_one_example_at_all():
    model, batch, loss = make("gpt2")
    assert error(model, oracle.cut(batch, 1), loss) < 1e-9


class Outputs(nn.Module):
    """What a model may return."""

    def __init__(self, wrap):
        super().__init__()
        self.inner, self.wrap = nn.Linear(4, 3).double(), wrap

    def forward(self, x):
        return self.wrap(self.inner(x))


class Holder:
    def __init__(self, logits):
        self.logits = logits


WRAPPERS = {
    "tensor": lambda h: h,
    "dict": lambda h: {"loss": None, "logits": h},
    "tuple": lambda h: (h, h * 2),
    "output": lambda h: tf.modeling_outputs.SequenceClassifierOutput(logits=h),
    "object": Holder,
    "another name": lambda h: {"scores": h},
    "nested": lambda h: {"parts": [{"scores": h}], "count": 3},
}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize(
    "form", ["tuple", "list", "dict", "nested", "inputs in a tuple", "numpy", "numpy labels"]
)
def test_forms_of_outputs_and_batches(name, form):
    model, batch = Outputs(WRAPPERS[name]), plain(4)
    x, y = batch["x"], batch["labels"]
    given = {
        "tuple": (x, y), "list": [x, y], "dict": {"x": x, "labels": y}, "nested": ({"x": x}, y), "inputs in a tuple": ((x,), y),
        "numpy": {"x": x.numpy(), "labels": y.numpy()}, "numpy labels": (x, y.numpy()),
    }[form]  # fmt: skip
    inner = lambda m, row: plain_loss(m.inner, row)  # noqa: E731
    assert error(model, batch, inner, [given], likelihood="classification") < 1e-9


def test_inputs_without_labels_in_every_form():
    model, x = mlp().double(), plain(4)["x"]
    forms = (x, (x,), {"input": x}, {"anything": x})
    first, *others = (estimate(model, [given], seed=5, progress=False) for given in forms)
    assert [oracle.relative_l1(other, first) for other in others] == [0, 0, 0]


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.inner = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh())

    def forward(self, x):
        from torch.utils.checkpoint import checkpoint

        return self.head(checkpoint(self.inner, self.first(x), use_reentrant=False))


def test_gradient_checkpointing_works():
    model, batch = Checkpointed().double(), plain(4)
    assert error(model, batch) < 1e-9


def test_gradient_checkpointing_behind_a_frozen_layer():
    """The checkpointed part is given what needs no gradient, as with LoRA."""
    model, batch = Checkpointed().double(), plain(4)
    model.first.requires_grad_(False)
    logits = lambda m, row: m(row["x"])[0]  # noqa: E731
    expected = oracle.expected_squares(model, batch, logits, oracle.softmax_covariance)
    found = estimate(model, as_batches(batch), labels="exact", gradient=True, progress=False)
    assert oracle.relative_l1(found, expected) < 1e-9


class Product(nn.Module):
    """A layer that no handler knows."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 3) / 2)

    def forward(self, x):
        return x @ self.matrix


@pytest.mark.parametrize("options", [{}, {"gradient": True}, {"reduction": "batch"}], ids=str)
def test_the_general_path_runs_under_autocast(options):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), Product()), torch.randn(6, 4)
    options = {"labels": "sampled", "progress": False, **options}
    expected = estimate(model, [(x, torch.arange(6) % 3)], **options)
    with torch.autocast("cpu", torch.bfloat16):
        found = estimate(model, [(x, torch.arange(6) % 3)], **options)
    assert all(value.dtype == torch.float32 for value in found.values())
    assert oracle.relative_l1(found, expected) < 0.1


def test_hooks_of_others_are_respected():
    model, batch = mlp().double(), plain(4)
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    assert error(model, batch) < 1e-9


@pytest.mark.parametrize("method", ["fisher", "hessian"])
@pytest.mark.parametrize("seed", [-1, 2**63, 2**70])
def test_any_whole_number_is_a_seed(method, seed):
    model, batch, _ = make("mlp")
    found = estimate(model, as_batches(batch), method=method, seed=seed, progress=False)
    assert found.info["seed"] == str(seed)


def test_same_seed_same_bytes_and_another_seed_others():
    model, batch, _ = make("gpt2")
    model = model.float()
    one, two, other = (estimate(model, as_batches(batch, 2), seed=s, progress=False) for s in (1, 1, 2))
    assert dict(one.info) == dict(two.info)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["transformer.wte.weight"], other["transformer.wte.weight"])


# Labels drawn


@pytest.mark.parametrize("classes", [1, 2, 3, 10, 17, 1000])
def test_draws_follow_the_weights(classes):
    weights = torch.rand(classes) ** 3
    weights[classes // 2] = 0 if classes > 2 else weights[classes // 2]
    draws = 20000
    drawn = draw_index(weights.expand(draws, classes), uniforms(0, 0, 0, draws, 1)[:, 0])
    counts = torch.bincount(drawn, minlength=classes)
    p = weights / weights.sum()
    deviation = (counts - draws * p) / (draws * p * (1 - p) + 1e-9).sqrt().clamp(min=1e-3)
    assert float(deviation[p > 0].abs().max()) < 5.5  # about 1 in 10,000 for 1,000 classes
    assert int(counts[p == 0].sum()) == 0


def test_draws_never_leave_the_classes():
    weights = torch.full((4, 50257), 1 / 50257)
    weights[1, -1], weights[2, 1:] = 0, 0
    edge = torch.tensor([1 - 2.0**-53, 1 - 2.0**-53, 1 - 2.0**-53, 0.0], dtype=torch.float64)
    assert draw_index(weights, edge).tolist() == [50256, 50255, 0, 0]


def test_uniforms_depend_on_the_example_alone():
    whole = uniforms(7, 1, 0, 10, 5)
    assert torch.equal(uniforms(7, 1, 4, 3, 5), whole[4:7])
    assert torch.equal(uniforms(7, 1, 1, 3, 5, 3), whole[1::3])
    assert torch.equal(uniforms(7, 1, 0, 10, 3), whole[:, :3])
    assert float((whole - uniforms(7, 2, 0, 10, 5)).abs().min()) > 0
    many = uniforms(-3, 0, 0, 1000, 100)
    assert float(many.min()) >= 0
    assert float(many.max()) < 1
    assert abs(float(many.mean()) - 0.5) < 5 * (1 / 12 / 1e5) ** 0.5


def test_every_case_of_the_table_has_rows_of_unequal_length_or_is_plain():
    """The table of architectures keeps exercising padding."""
    padded = [name for name in CASES if "attention_mask" in CASES[name][1]()]
    assert len(padded) > 15
    assert all(int(CASES[name][1]()["attention_mask"].sum()) < B * T for name in padded)
    assert ENCODER["pad_token_id"] == 1


class Scaled(nn.Module):
    """One parameter a feature, used in some way."""

    def __init__(self, how, shape=(6,)):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(shape) + 0.5), nn.Parameter(torch.randn(shape))
        self.how = how

    def forward(self, x):
        normal = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.how(normal, self.scale, self.shift)


class Pooled(nn.Module):
    """The mean over positions."""

    def forward(self, x):
        return x.flatten(1, -2).mean(1) if x.dim() > 2 else x


SCALES = {  # how -> whether it is read off at zero and one
    "rms norm with a shift": (lambda h, w, b: w * h + b, True),
    "one more than the weight": (lambda h, w, b: (1 + w) * h + b * h.square(), True),
    "two shifts": (lambda h, w, b: h + w - b, True),
    "squared": (lambda h, w, b: w**2 * h + b, False),
    "squared, and one of them at one": (lambda h, w, b: (w * 0 + 1) * h * b.abs() + w, False),
    "product": (lambda h, w, b: w * b * h, False),
    "mixed": (lambda h, w, b: h * w.sum() + b, False),
    "reversed": (lambda h, w, b: h * w.flip(0) + b, False),
}


@pytest.mark.parametrize("positions", [(), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", SCALES)
def test_scales_of_any_name_are_found_by_what_they_do(name, positions):
    torch.manual_seed(0)
    how, simple = SCALES[name]
    model = nn.Sequential(nn.Linear(5, 6), Scaled(how), nn.Tanh(), nn.Linear(6, 3)).double()
    pooled = nn.Sequential(model, Pooled())
    batch = {"x": torch.randn(B, *positions, 5).double(), "labels": torch.arange(B) % 3}
    found = estimate(pooled, as_batches(batch), method="empirical_fisher", progress=False)
    assert ("general_path" not in found.info) == simple
    assert oracle.relative_l1(found, squared(pooled, batch)) < 1e-9


@pytest.mark.parametrize("name", ["llama", "gemma", "qwen2", "mistral"])
def test_norms_of_language_models_need_no_general_path(name):
    model, batch, _ = make(name)
    info = estimate(model.float(), as_batches(batch), progress=False).info
    assert "norm" not in info.get("general_path", "")


def swapped(left, right, *rest):
    return right @ left.t()


def refusing(*given):
    raise RuntimeError("its signature changed")


@pytest.mark.parametrize(
    "operator",
    [None, swapped, refusing, lambda *given: given],
    ids=["absent", "swapped", "refusing", "another type"],
)
def test_a_private_operator_that_changed_is_not_used(operator, monkeypatch):
    monkeypatch.setattr(products, "_private_operator", lambda: operator)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    products._onednn.cache_clear()
    try:
        assert products._onednn() is None
        left, right = torch.randn(7, 5).t(), torch.randn(7, 3).t()
        assert torch.equal(products.product(left, right, products.Workspace()), left @ right.t())
    finally:
        products._onednn.cache_clear()


def test_an_operator_that_multiplies_is_recognised():
    assert products._multiplies(lambda left, right, *rest: left @ right.t())
