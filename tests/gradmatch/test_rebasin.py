"""Alignment: symmetries are found and proved, scrambled models come back, curvature moves along, what cannot be is refused."""

import copy
import json
from itertools import pairwise

import pytest
import torch
import transformers as tf
from torch import nn

from gradmatch import Curvature, Task, estimate, merge, open_checkpoint
from gradmatch.measure.objective import Objective
from gradmatch.models.batchnorm import batchnorm_statistics
from gradmatch.rebasin import Symmetry, align, align_all, barrier, check, repair, rotate, zipit
from gradmatch.rebasin.activations import standardised
from gradmatch.rebasin.axes import Axis, cut, leaves, product, split, unify
from gradmatch.rebasin.matching import Pairs, assign, by_names, match, moved
from gradmatch.rebasin.path import figure
from gradmatch.rebasin.probing import calls_of, find_symmetry
from gradmatch.rebasin.repair import measured
from gradmatch.rebasin.transport import Hardened, sinkhorn
from gradmatch.rebasin.zipit import join
from tests.command import run
from tests.gradmatch import tiny

IDS = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
GROUPED = {
    **IDS,
    "num_key_value_heads": 2,
    "intermediate_size": 12,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def conv_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.GroupNorm(2, 8),
        nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 1, 1), nn.ReLU(), nn.Conv2d(1, 6, 3), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(6 * 12 * 12, 10), nn.Tanh(), nn.Linear(10, 3),
    )  # fmt: skip


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def mlp(*widths, seed=0):
    torch.manual_seed(seed)
    layers = [one for a, b in pairwise(widths) for one in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


# name -> (how it is made, a batch or None, units that must be free, of groups at the top and inside others)
FAMILIES = {
    "mlp": (lambda: mlp(3, 5, 4, 2), None, [5, 4], []),
    "bert": (lambda: tf.BertForSequenceClassification(tf.BertConfig(**IDS, intermediate_size=12)), None, [16, 4, 12, 16], [4, 4]),
    "bare bert": (lambda: tf.BertModel(tf.BertConfig(**IDS, intermediate_size=12)), None, [4, 12], [4, 4]),
    "roberta, tied": (lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**IDS, intermediate_size=12)), None, [16, 4, 12], [4, 4]),
    "gpt2, fused": (lambda: tiny.gpt2(n_layer=1), None, [16, 2, 64], [8, 8]),
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)), None, [16, 2, 12], [2, 4]),
    "qwen2": (lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**GROUPED)), None, [16, 2, 12], [2, 4]),
    "mistral": (lambda: tf.MistralForCausalLM(tf.MistralConfig(**GROUPED)), None, [16, 2, 12], [2, 4]),
    "vit": (lambda: tf.ViTForImageClassification(tf.ViTConfig(**IMAGES, intermediate_size=12)), None, [16, 4, 12], [4, 4]),
    "dinov2": (lambda: tf.Dinov2Model(tf.Dinov2Config(**IMAGES, mlp_ratio=2)), None, [4, 32], [4, 4]),
    "resnet": (
        lambda: tf.ResNetForImageClassification(tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[2, 1])),
        None, [8, 2, 2, 2, 2, 12, 3, 3], [],
    ),
    "convolutions in groups": (conv_net, torch.randn(2, 3, 32, 32), [2, 4, 6, 10], [4]),
    "torch's encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), torch.randn(2, 5, 8), [2, 12], [4]),
    "lstm": (Recurrent, torch.randn(2, 5, 4), [6], []),
}  # fmt: skip


@pytest.fixture(scope="module")
def built():
    """Name -> (module with noise everywhere, data)."""
    found = {}

    def build(name):
        if name not in found:
            make, batch, *_ = FAMILIES[name]
            torch.manual_seed(0)
            module = tiny.tuned(make(), 0, 0.2)
            for key, buffer in module.named_buffers():
                if "running" in key:
                    buffer.copy_(torch.rand_like(buffer) + 0.5)
            found[name] = module.eval(), None if batch is None else [batch]
        return found[name]

    return build


def scrambled(module, data=None, seed=1):
    """A copy with a random member of its group applied, and that member."""
    symmetry = find_symmetry(module, calls_of(data)[0] if data else None)
    member = symmetry.random(torch.Generator().manual_seed(seed))
    other, state = copy.deepcopy(module), module.state_dict()
    with torch.no_grad():
        for name, tensor in other.state_dict(keep_vars=True).items():
            tensor.copy_(moved(state[name], symmetry.index(member, name)))
    return other, symmetry, member


@pytest.mark.parametrize("name", FAMILIES)
def test_symmetries_are_found_proved_and_undone(built, name):
    module, data = built(name)
    proof = check(module, data)
    assert proof.difference < 1e-6  # RMSNorm of transformers rounds to float32
    groups = proof.symmetry.groups
    top, inner = ([g.size for g in groups.values() if bool(g.inside) == inside] for inside in (False, True))
    assert (sorted(top), sorted(inner)) == (sorted(FAMILIES[name][2]), sorted(FAMILIES[name][3]))
    other, symmetry, member = scrambled(module, data)
    view = align(other, module, data=data)
    state = module.state_dict()
    assert all(torch.equal(view[key], state[key]) for key in state)
    assert view.report.difference < 1e-6
    assert view.report.distance == 0 < view.report.unaligned
    both = symmetry.compose(member, symmetry.inverse(member))
    assert all(torch.equal(both[group], symmetry.identity()[group]) for group in groups)


def test_heads_of_one_group_of_queries_share_keys(built):
    """Four query and two key heads: queries 0, 1 read key 0. Inside a rotary head nothing moves but values with outputs (A10, A11, A12)."""
    symmetry = find_symmetry(built("llama")[0])
    layer = "model.layers.0.self_attn."
    (query,), (key,) = (symmetry.dims[f"{layer}{one}_proj.weight"][0] for one in "qk")
    (value,), (out,) = symmetry.dims[f"{layer}v_proj.weight"][0], symmetry.dims[f"{layer}o_proj.weight"][1]
    heads, within = query[0], query[1]
    assert (key, query[2]) == ((heads, 4), 4)
    assert value == (heads, value[1])
    assert out == (heads, within, value[1])
    assert symmetry.groups[within].inside == symmetry.groups[value[1]].inside == (heads,)


BATCHNORM = {
    "0.weight": ["h", None, None, None], "0.bias": ["h"], "1.weight": ["h"], "1.bias": ["h"], "1.running_mean": ["h"],
    "1.running_var": ["h"], "1.num_batches_tracked": [], "3.weight": [None, "h", None, None], "3.bias": [None],
}  # fmt: skip


def test_a_specification_by_hand_is_proved_or_names_the_tensor():
    """BatchNorm left behind, tensors left out or named twice, a rotary head reordered, values without outputs (A1, A3, A11, A12)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3)).eval()
    net[1].running_mean.normal_(), net[1].running_var.uniform_(0.5, 2)
    assert check(net, spec=BATCHNORM).difference < 1e-12
    lacking = {name: dims for name, dims in BATCHNORM.items() if name != "1.bias"}
    cases = [
        ({**BATCHNORM, "1.running_mean": [None]}, "'1.running_mean' is not moved with them and must be"),
        (
            {**BATCHNORM, "3.bias": ["g"], "3.weight": ["g", "h", None, None]},
            "permuting the units of 'g' changes the outputs",
        ),
        (lacking, "does not name '1.bias' (1 of 9 tensors"),
        ([*BATCHNORM.items(), ("0.bias", ["h"])], "names '0.bias' twice"),
        ({**BATCHNORM, "2.weight": [None]}, "names '2.weight', which the model lacks"),
        ({**BATCHNORM, "0.bias": ["h", None]}, "2 dims for '0.bias' of shape [8]"),
        ({**BATCHNORM, "3.bias": ["h"]}, "'h' has 8 units, and '3.bias' has 5"),
    ]
    for spec, message in cases:
        with pytest.raises(ValueError, match=r".") as error:
            check(net, spec=spec)
        assert message in str(error.value)
    llama = tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED))
    layer, units = "model.layers.0.self_attn.", find_symmetry(llama)
    shapes = {name: value.shape for name, value in llama.state_dict().items()}
    still = {name: [None] * len(shape) for name, shape in shapes.items()}
    for wrong in ({f"{layer}q_proj.weight": ["x", None]}, {f"{layer}v_proj.weight": ["x", None]}):
        with pytest.raises(ValueError, match="changes the outputs"):
            check(llama, spec={**still, **wrong})
    assert units.holders("model.embed_tokens")[0] == "model.embed_tokens.weight"


@pytest.mark.parametrize(("make", "what"), [(Axis, (12,))])
def test_axes(make, what):
    whole = make(*what)
    one, other = cut(whole, 0, 6), cut(whole, 6, 12)
    unify(one, product([Axis(2), Axis(3)]))
    assert [leaf.size for leaf in leaves(whole)] == [2, 3, 6]
    unify(one, other)
    assert [leaf.size for leaf in leaves(other)] == [2, 3]
    assert all(
        axis.pinned for axis in split(one, [4, 3])
    )  # no such factors: nothing moves, which is always right
    assert all(leaf.pinned for leaf in leaves(other))
    with pytest.raises(ValueError, match="cannot be one"):
        unify(Axis(2), Axis(3))


@pytest.mark.parametrize("widths", [(3, 5, 2), (7, 4, 7), (4, 4, 4)])
def test_assignments_do_not_confuse_inputs_and_outputs(widths):
    """A6: other widths on every side; the matched order undoes the planted one."""
    net = mlp(*widths, seed=3)
    other, symmetry, member = scrambled(net)
    state = {name: value.detach() for name, value in net.named_parameters()}
    own = {name: value.detach() for name, value in other.named_parameters()}
    found = match(Pairs(symmetry, list(state), by_names(state, own))).member
    assert all(torch.equal(found[group], order) for group, order in symmetry.inverse(member).items())


def test_noise_is_survived_and_ends_are_told():
    net = mlp(6, 30, 30, 3)
    other, *_ = scrambled(tiny.tuned(net, 5, 0.02))
    view = align(other, net, restarts=3, seed=1)
    report = view.report.to_dict()
    assert report["distance"] < 0.2 < report["unaligned_distance"]
    assert len(report["restarts"]) == 3
    assert report["converged"]
    assert max(report["restarts"]) == report["cosine"] > report["unaligned_cosine"]
    assert "unaligned" in view.report.summary()
    same = align(net, net)
    assert same.report.moved == 0  # nothing found is nearer than what was there


@pytest.mark.parametrize("name", ["mlp", "bert", "llama", "resnet"])
def test_units_are_matched_by_what_they_say(built, name):
    module, _ = built(name)
    other, *_ = scrambled(module)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "mlp": lambda: torch.randn(64, 3),
        "resnet": lambda: {"pixel_values": torch.randn(8, 3, 32, 32)},
    }.get(name, lambda: {"input_ids": torch.randint(3, 40, (64, 9), generator=generator)})
    view = align(other, module, "activations", [inputs() for _ in range(3)])
    shown, state = view.report, module.state_dict()
    assert shown.distance < 0.02 if name != "mlp" else all(torch.equal(view[k], state[k]) for k in state)


def test_dead_units_are_told_and_data_too_few_warned_of():
    """A17: constant units have no correlation; they are listed, and the rest is matched as if they were not there."""
    net = mlp(3, 8, 2)
    with torch.no_grad():
        net[0].weight[:2] = 0
    other, *_ = scrambled(net)
    view = align(other, net, "activations", [torch.randn(50, 3)])
    assert view.report.dead["0"] == 2
    alive = net[0].weight[2:]
    assert torch.equal(view["0.weight"][2:], alive)
    with pytest.warns(UserWarning, match="5 positions of data are fewer than the 8 units"):
        align(other, net, "activations", [torch.randn(5, 3)])
    x = torch.randn(3, 4)
    kept = x.clone()
    standardised(x), assign(x @ x.T)
    assert torch.equal(x, kept)


def test_curvature_moves_along():
    """Fisher, gradient and Kronecker factors of the aligned view are those estimated on it; every rule merges it."""
    torch.manual_seed(0)
    net = mlp(3, 5, 2).double()
    other, *_ = scrambled(net)
    x, y = torch.randn(20, 3).double(), torch.randint(2, (20,))
    view = align(other, net)
    for method, options in (("gram", {}), ("kfac", {}), ("fisher", {"gradient": True})):
        own, target = (
            estimate(one, [(x, y)], method=method, progress=False, **options) for one in (other, net)
        )
        h0 = {"missing_curvature": "zero"} if method == "gram" else {"base_curvature": target}
        rule = {"fisher": "gradient_matching", "kfac": "kronecker", "gram": "regmean"}[method]
        far = tiny.tuned(net, 1)  # a second model, so that the curvature counts
        there = estimate(far, [(x, y)], method=method, progress=False)
        merged = [
            merge(net, [Task(one, curvature), Task(far, there)], method=rule, **h0)
            for one, curvature in ((view, own), (net, target))
        ]
        assert all(torch.allclose(merged[0][name], merged[1][name], atol=1e-7) for name in merged[0])
    blank = Curvature.from_dict({name: own.mean(name) for name in own}, 20)
    with pytest.warns(UserWarning, match="taken to be that of the model before its alignment"):
        merge(net, [Task(view, blank)], method="fisher")
    at_view = estimate(
        net, [(x, y)], progress=False
    )  # the view is that model: its own curvature stays as it is
    merge(net, [Task(view, at_view)], method="fisher")
    with pytest.raises(ValueError, match="taken at other weights"):
        merge(net, [Task(view, there)], method="fisher")


def test_statistics_of_a_merge_are_measured_again():
    """A4: cumulative statistics of what goes in, whatever the momentum; modes restored."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)
    ).eval()
    batches = [torch.randn(6, 1, 8, 8) + 2 for _ in range(3)]
    other, *_ = scrambled(tiny.tuned(net, 1), batches)
    merged = merge(
        net,
        [Task(net), Task(align(other, net, data=batches))],
        method="averaging",
        batchnorm="recalibrate",
        batches=batches,
    )
    inputs = nn.functional.conv2d(torch.cat(batches), merged["0.weight"], merged["0.bias"])
    assert torch.allclose(merged["1.running_mean"], inputs.mean((0, 2, 3)), atol=1e-5)
    assert not net.training
    assert batchnorm_statistics(net, {}, [((batches[0],), {})]).keys() == {
        "1.running_mean",
        "1.running_var",
    }


def test_barrier_before_and_after(tmp_path):
    """A18: both ends, the unaligned line and the aligned one on the same data."""
    net = mlp(2, 16, 2)
    with torch.no_grad():
        net[2].weight.mul_(20)
    other, *_ = scrambled(net)
    x = torch.randn(40, 2)
    loss = Objective(net, [(x, net(x).argmax(1))]).loss
    before, after = barrier(net, other, loss), barrier(net, align(other, net), loss, points=5)
    assert before.height > 0
    assert abs(after.height) < 1e-4
    assert len(before.losses) == 11
    assert float(before) == before.height
    assert before.losses[0] == pytest.approx(after.losses[0])
    assert before.losses[-1] == pytest.approx(after.losses[-1])
    figure({"unaligned": before, "aligned": after}, tmp_path / "path.png")
    assert (tmp_path / "path.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="at least 2"):
        barrier(net, other, loss, points=1)
    with pytest.raises(ValueError, match=r"'0.weight' has shape \[16, 2\]"):
        barrier(net, mlp(2, 8, 2), loss)


def test_soft_plans_are_made_hard_and_do_not_overflow():
    """A16: what the plan's rows lack is told; near-equal scores, and scores times 100."""
    score = torch.eye(6) * 1e-3 + torch.randn(6, 6) * 1e-4
    for factor in (1, 100, 1e6):
        found = sinkhorn(score * factor)
        assert found.plan.isfinite().all()
        assert max(found.row_error, found.column_error) < 0.01
    assert torch.equal(Hardened()(score), torch.arange(6))
    assert sinkhorn(torch.zeros(2, 3)).plan.allclose(torch.full((2, 3), 1 / 6).double())
    net = mlp(3, 6, 2)
    other, *_ = scrambled(net)
    view = align(other, net, "transport")
    assert torch.equal(view["0.weight"], net[0].weight)
    assert "soft plans' rows sum to their share within" in view.report.summary()


def test_other_widths_are_carried_over():
    """Units that are split keep the function; that units are averaged is told by what it costs."""
    net, wide = mlp(3, 4, 4, 2), mlp(3, 8, 8, 2, seed=1)
    view = align(net, wide, "transport")
    assert {name: view.spec(name).shape for name in view} == {
        n: tuple(v.shape) for n, v in wide.state_dict().items()
    }
    assert view.report.difference < 1e-6
    assert json.dumps(view.report.to_dict(), allow_nan=False)
    assert merge(wide, [Task(wide), Task(view)], method="averaging")["2.weight"].shape == (8, 8)
    back = align(wide, net, "transport")
    assert back.report.difference > 1e-3
    assert "function NOT kept" in back.report.summary()
    own = estimate(net, [(torch.randn(4, 3), torch.zeros(4).long())], progress=False)
    with pytest.raises(ValueError, match="moved into another basis, where it is not diagonal"):
        merge(wide, [Task(view, own)], method="fisher")
    small = tf.BertModel(tf.BertConfig(**{**IDS, "num_attention_heads": 2}, intermediate_size=12))
    with pytest.raises(ValueError, match="heads of one number and size alone"):
        align(small, tf.BertModel(tf.BertConfig(**IDS, intermediate_size=12)))


def test_learned_matching_never_ends_above_where_it_began():
    torch.manual_seed(0)
    x = torch.randn(60, 2)
    batches = [(x[i::3], (x[i::3, 0] * x[i::3, 1] > 0).long()) for i in range(3)]
    view = align(mlp(2, 8, 2, seed=1), mlp(2, 8, 2), "learned", batches)
    first, last = (
        float(word)
        for word in view.report.notes[-1].replace(",", "").split()
        if word.replace(".", "").isdigit()
    )
    assert last <= first
    assert view.report.difference < 1e-9


def test_several_models_share_one_universe():
    """Going from one to another and on to a third is going there directly; planted orders come back."""
    net = mlp(4, 12, 12, 3)
    others = [scrambled(tiny.tuned(net, k, 0.02), seed=k)[0] for k in (1, 2)]
    views = align_all([net, *others])
    assert all(torch.equal(views[0][name], value) for name, value in net.state_dict().items())
    assert all((view["0.weight"] - net[0].weight).abs().max() < 0.2 for view in views)
    x = torch.randn(5, 4)
    for view, own in zip(views, [net, *others], strict=True):
        assert torch.allclose(torch.func.functional_call(net, dict(view), (x,)), own(x), atol=1e-5)
    with pytest.raises(ValueError, match="at least two"):
        align_all([net])
    with pytest.raises(ValueError, match="other widths"):
        align_all([net, mlp(4, 10, 12, 3)])


def test_repair_gives_units_the_spread_of_the_ends():
    one, other = mlp(3, 16, 16, 2), mlp(3, 16, 16, 2, seed=1)
    ends = one.state_dict(), other.state_dict()
    middle = {name: (value + ends[1][name]) / 2 for name, value in ends[0].items()}
    data = [torch.randn(200, 3)]
    fixed = repair(one, middle, ends, data)
    calls = calls_of(data)
    here, first, second = (measured(one, weights, calls) for weights in (fixed, *ends))
    for layer in ("0", "2"):
        for k in (0, 1):
            assert torch.allclose(here[layer][k], (first[layer][k] + second[layer][k]) / 2, atol=1e-4)
    assert torch.equal(fixed["4.weight"], middle["4.weight"])


def test_units_are_joined_by_their_correlation():
    """A17: planted pairs of correlation .9 beside two dead units; the score is .9, the dead ones apart, the input untouched."""
    x = torch.zeros(8, 8)
    for i, j in ((0, 4), (1, 6), (2, 5)):
        x[i, j] = x[j, i] = 0.9
    for i in (0, 1, 2, 4, 5, 6):
        x[i, i] = 1
    kept = x.clone()
    found = join(x)
    assert torch.equal(x, kept)
    assert (found.score, found.dead, found.within) == (pytest.approx(0.9), 2, 0)
    assert torch.equal(found.unmerge @ torch.ones(4, 1), torch.ones(8, 1))
    assert found.merge.sum(1).allclose(torch.ones(4))
    twins = torch.eye(4)
    twins[0, 1] = twins[1, 0] = 0.9  # within the first model; the other pair must be joined across
    assert join(twins, b=1).within == 1
    assert join(twins, b=0).within == 0
    assert twins[0, 1] > 0


def test_zipping_keeps_a_tail_for_each():
    net = mlp(3, 8, 8, 2)
    other, *_ = scrambled(net)
    x = torch.randn(100, 3)
    found = zipit(net, other, [x])
    run_with = torch.func.functional_call
    for weights, own in ((found.first, net), (found.second, other)):
        assert torch.allclose(
            run_with(net, weights, (x,)), own(x), atol=1e-5
        )  # the same units: nothing is lost
    part = zipit(net, mlp(3, 8, 8, 4, seed=2), [x], until=1)  # another number of classes
    assert part.shared == ("0.weight", "0.bias")
    assert part.second["4.weight"].shape == (4, 8)
    assert torch.equal(part.first["4.weight"], net[4].weight)
    assert "1 groups" in part.summary()
    bert = tf.BertModel(tf.BertConfig(**IDS, intermediate_size=12))
    for wrong, message in (
        (lambda: zipit(net, other, [x], until=9), "until is 9; the models have 2 groups"),
        (lambda: zipit(net, mlp(3, 6, 8, 2), [x]), "zipping joins models of one width"),
        (
            lambda: zipit(bert, bert, [{"input_ids": torch.randint(3, 40, (2, 5))}]),
            "are heads, with units inside",
        ),
    ):
        with pytest.raises(ValueError, match=r".") as error:
            wrong()
        assert message in str(error.value)


def test_the_stream_of_rmsnorm_nets_is_turned():
    """A13: gains folded, functions kept, a planted rotation undone; tied embeddings with gains refused, and LayerNorm."""
    torch.manual_seed(0)
    free = {**GROUPED, "tie_word_embeddings": False}
    net = tiny.tuned(tf.LlamaForCausalLM(tf.LlamaConfig(**free)), 0, 0.2)
    other, *_ = scrambled(net)
    turned, target = rotate(other, net)
    layer = "model.layers.0.input_layernorm.weight"
    assert torch.allclose(target[layer], torch.ones(16), atol=1e-6)
    # planted: the same network in another basis of its stream
    basis = torch.linalg.qr(torch.randn(16, 16))[0]
    moved_on = copy.deepcopy(net)
    moved_on.load_state_dict(dict(target))
    with torch.no_grad():
        for name, tensor in moved_on.named_parameters():
            if name.endswith(
                (
                    "embed_tokens.weight",
                    "q_proj.weight",
                    "k_proj.weight",
                    "v_proj.weight",
                    "gate_proj.weight",
                    "up_proj.weight",
                    "lm_head.weight",
                )
            ):
                tensor.copy_(tensor @ basis.T)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                tensor.copy_(basis @ tensor)
    back, folded = rotate(moved_on, net)
    for views in ((turned, target), (back, folded)):
        assert all(torch.allclose(views[0][name], views[1][name], atol=1e-4) for name in views[1])
    merged = merge(folded, [Task(folded), Task(back)], method="averaging")
    ids = torch.randint(3, 40, (2, 6))
    shown = torch.func.functional_call(net, dict(merged), (ids,)).logits
    assert torch.allclose(shown, net(ids).logits, atol=1e-3)
    tied = tiny.tuned(tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)), 0, 0.2)
    with pytest.raises(ValueError, match="would be folded into both; untie them"):
        rotate(tied, tied)
    bert = tf.BertForSequenceClassification(tf.BertConfig(**IDS, intermediate_size=12))
    with pytest.raises(ValueError, match="networks with LayerNorm, which centres"):
        rotate(bert, bert)


WRONG = [
    (lambda net: align(net, mlp(3, 5, 5, 2)), "models of different depths"),
    (lambda net: align(net, mlp(3, 6, 2)), "take method='transport'"),
    (lambda net: align(net, net, "activations"), "pass data=[batches]"),
    (lambda net: align(net, net, "weight"), "did you mean 'weights'?"),
    (lambda net: align(net, net, restarts=0), "restarts is 0"),
    (lambda net: align(net, net, data=[]), "data holds no batches"),
    (lambda net: align(net, net, "activations", [torch.randn(4, 7)]), "cannot be run on the example"),
    (lambda net: align(net.state_dict(), net.state_dict()), "is weights alone"),
    (lambda net: check(nn.Identity()), "pass data=[batch]"),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=r".") as error:
        call(mlp(3, 5, 2))
    assert message in str(error.value)


def test_one_batch_is_no_data():
    with pytest.raises(TypeError, match=r"\[batch\] for a single one"):
        align(mlp(3, 5, 2), mlp(3, 5, 2), "activations", torch.randn(4, 3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("align")
    tiny.save_classifier(place / "base")
    base = tiny.tuned(tf.AutoModelForSequenceClassification.from_pretrained(place / "base"), 0, 0.3)
    other, *_ = scrambled(tiny.tuned(base, 1, 0.05))
    for name, module in (("base", base), ("other", other)):
        module.save_pretrained(place / name)
        tiny.tokenizer().save_pretrained(place / name)
    rows = "\n".join(
        f"the film was {word},{label}" for word, label in (("good", 1), ("bad", 0), ("fine", 1), ("dull", 0))
    )
    (place / "texts.csv").write_text(f"text,label\n{rows}\n")
    (place / "recipe.yaml").write_text(
        "base: base\nmethod: averaging\nalign: weights\ntasks: [base, other]\n"
    )
    return place


def test_from_the_shell(folders, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    assert run("align other --check --json") == 0
    proof = json.loads(capsys.readouterr().out)
    assert proof["difference"] < 1e-9
    assert proof["groups"]["bert.pooler.dense"]["units"] == 8
    assert run("align other --to base --data texts.csv --figure path.png --json -o aligned --quiet") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["barriers"]["aligned"]["height"] < told["barriers"]["unaligned"]["height"]
    assert run("merge recipe.yaml merged --quiet") == 0
    assert "other: aligned by weights" in capsys.readouterr().out
    again = merge("base", [Task("base"), Task("aligned")], method="averaging")
    written = open_checkpoint("merged")
    assert all(torch.equal(again[name], written[name]) for name in written)
    tf.AutoModelForSequenceClassification.from_pretrained("aligned")
    assert run("merge recipe.yaml --dry-run") == 0
    assert "aligned by weights" in capsys.readouterr().out
    assert run("diagnose --base base --task other --quick --quiet") == 0
    assert "gradmatch align other --to base -o ALIGNED" in capsys.readouterr().out.replace("\n", " ")
    assert run("align other --to base -o aligned") == 2  # it is there
    assert (
        run("align other")
        == run("align other --to base --check")
        == run("align other --to base --figure x.png")
        == 2
    )
    assert "nothing to align with" in capsys.readouterr().err


def test_a_table_of_ones_own():
    net = mlp(3, 5, 2)
    spec = {"0.weight": ["h", None], "0.bias": ["h"], "2.weight": [None, "h"], "2.bias": [None]}
    known = Symmetry.from_table(spec, {name: value.shape for name, value in net.state_dict().items()})
    other, *_ = scrambled(net)
    view = align(other, net, spec=known)
    assert torch.equal(view["0.weight"], net[0].weight)
    weights = align(other.state_dict(), net.state_dict(), spec=known, verify=False)
    assert torch.equal(weights["2.weight"], net[2].weight)
