"""Adapters merged by their cores: the same as merging what they expand to, and an adapter again that peft loads."""

import json
import math
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from gradmatch import Rule, Task, merge, open_checkpoint
from gradmatch.cli import main
from gradmatch.merging import prepare
from gradmatch.plan.printed import describe
from tests.gradmatch.test_adapters import CASES, bert, gpt2, llama, make, resnet

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
PLAIN = {"target_modules": ["q_proj", "down_proj"], "r": 3, "lora_alpha": 6}
OTHER = {"target_modules": ["q_proj", "v_proj"], "r": 2, "lora_alpha": 5, "use_rslora": True}
PATTERN = {
    "target_modules": ["v_proj"],
    "r": 4,
    "rank_pattern": {"layers.1.*": 1},
    "alpha_pattern": {"layers.0.*": 3},
}
KINDS = {  # model, and the adapters' settings
    "ranks, targets and scales that differ": (llama, [PLAIN, OTHER, PATTERN]),
    "embeddings": (llama, [{"target_modules": ["embed_tokens", "q_proj"], "r": 3}, {"target_modules": ["embed_tokens"], "r": 2}]),
    "conv1d": (gpt2, [CASES["conv1d"][1], CASES["conv1d, square"][1]]),
    "convolutions": (resnet, [CASES["convolutions"][1], {**CASES["convolutions"][1], "r": 2}]),
}  # fmt: skip
METHODS = {
    "task_arithmetic": {"scale": 0.7},
    "averaging": {},
    "negation": {},
    "nuslerp": {},
    "model_stock": {},
    "tsv_m": {},
    "iso_c": {"scale": 1.3},
    "iso_cts": {"common": 0.5},
    "svc": {"method": "task_arithmetic", "after": "svc"},
    "lines": {"method": "averaging", "after": ["lines"]},
}
WEIGHTS = (1.0, 0.6, 0.3)


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """A base, its adapters, and what peft merges them to, in float64."""
    folder, (build, settings) = tmp_path_factory.mktemp("core"), KINDS[request.param]
    states = []
    for seed, one in enumerate(settings):
        make(folder, build, one, seed)
        model = type(build()).from_pretrained(folder / "base").double()
        wrapped = peft.PeftModel.from_pretrained(model, folder / f"adapter{seed}").double()
        states.append(wrapped.merge_and_unload().state_dict())
    base = type(build()).from_pretrained(folder / "base").double()
    return folder, build, {name: value.clone() for name, value in base.state_dict().items()}, states


@pytest.mark.parametrize("method", METHODS)
def test_cores_merge_as_what_they_expand_to(made, method, tmp_path):
    folder, _, base, states = made
    count = 2 if method == "nuslerp" else len(states)
    call = {"method": method, **METHODS[method]}
    adapters = [Task(folder / f"adapter{seed}", weight=WEIGHTS[seed]) for seed in range(count)]
    whole = [Task(state, weight=weight) for state, weight in zip(states[:count], WEIGHTS, strict=False)]
    names = {name for state in states for name in base if not torch.equal(state[name], base[name])}
    expected = merge(base, whole, **call)
    found = merge(folder / "base", adapters, space="core", dtype="float64", out=tmp_path / "out", **call)
    for name in found:
        wanted = expected[name] if name in names else base[name]
        torch.testing.assert_close(found[name].double(), wanted.double(), rtol=1e-6, atol=1e-7)


def test_peft_loads_the_output(made, tmp_path):
    folder, build, base, states = made
    before = {path: path.read_bytes() for path in (folder / "base").iterdir()}
    adapters = [Task(folder / f"adapter{seed}") for seed in range(len(states))]
    found = merge(folder / "base", adapters, method="averaging", space="core", out=tmp_path / "out")
    assert before == {path: path.read_bytes() for path in (folder / "base").iterdir()}
    kind = type(build())
    torch.manual_seed(0)
    inputs = (
        {"pixel_values": torch.randn(2, 3, 16, 16)}
        if build is resnet
        else {"input_ids": torch.arange(6)[None], "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    )
    loaded = peft.PeftModel.from_pretrained(kind.from_pretrained(folder / "base"), tmp_path / "out").eval()
    merged = kind.from_pretrained(folder / "base").eval()
    merged.load_state_dict({name: sum(state[name] for state in states) / len(states) for name in base})
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, merged(**inputs).logits, rtol=1e-4, atol=1e-5)
    held = load_file(tmp_path / "out" / "adapter_model.safetensors")
    trained = {key.replace(".default", "") for key in loaded.state_dict() if "lora_" in key}
    assert set(held) == trained  # nothing is left at peft's own start
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert (tmp_path / "out" / "gradmatch.json").is_file()
    assert open_checkpoint(tmp_path / "out", base=folder / "base" and open_checkpoint(folder / "base"))
    assert found.report.formula == "mean_t theta_t"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    for seed, one in enumerate((PLAIN, OTHER)):
        make(folder, llama, one, seed)
    return folder


def tasks(folder, *weights):
    return [Task(folder / f"adapter{seed}", weight=weight) for seed, weight in enumerate(weights)]


def expanded(folder, result):
    """The update of every weight, from an adapter in memory."""
    held, scale = dict(result), {}
    for key in list(held):
        if "lora_A" in key:
            module = key.split(".lora_A")[0]
            rank = result.config["rank_pattern"].get(
                module.removeprefix("base_model.model."), result.config["r"]
            )
            assert rank == len(held[key])
            scale[module] = held[f"{module}.lora_B.weight"].double() @ held[key].double()
    return scale


def test_negative_weights_are_exact(plain):
    call = {"method": "task_arithmetic", "space": "core"}
    plus, minus = (expanded(plain, merge(plain / "base", tasks(plain, w), **call)) for w in (1.0, -1.0))
    taken = expanded(plain, merge(plain / "base", tasks(plain, 1.0), method="negation", space="core"))
    for name in plus:
        assert float(plus[name].norm()) > 0
        torch.testing.assert_close(minus[name], -plus[name], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(taken[name], -plus[name], rtol=1e-6, atol=1e-9)
    same = [Task(plain / "adapter0", weight=1.0, name="a"), Task(plain / "adapter0", weight=-1.0, name="b")]
    gone = merge(plain / "base", same, **call)
    assert all(float(value.abs().max()) < 1e-12 for value in expanded(plain, gone).values())
    assert {len(value) for key, value in gone.items() if "lora_A" in key} == {1}


@pytest.mark.parametrize("rank", [1, 4, 100])
def test_a_rank_tells_what_it_leaves_out(plain, rank):
    call = {"method": "task_arithmetic", "space": "core"}
    whole, cut = (
        merge(plain / "base", tasks(plain, 1.0, 0.5), **call, **more) for more in ({}, {"rank": rank})
    )
    full, part = expanded(plain, whole), expanded(plain, cut)
    assert max(len(value) for key, value in cut.items() if "lora_A" in key) == min(rank, 5)
    for name, value in full.items():
        lost = float((value - part[name]).norm() / value.norm())
        weight = name.removeprefix("base_model.model.") + ".weight"
        assert cut.report.cut.get(weight, 0.0) == pytest.approx(lost, abs=1e-6)
    total = math.sqrt(sum(float(v.square().sum()) for v in full.values()))
    lost = math.sqrt(sum(float((v - part[n]).square().sum()) for n, v in full.items())) / total
    said = [note for note in cut.report.notes if "leaves out" in note]
    assert bool(said) is (rank < 5)
    assert not said or f"rank {rank} leaves out {100 * lost:.2g} % of the update's norm" in said[0]


def test_what_rounding_loses_is_told(plain):
    call = {"method": "task_arithmetic", "space": "core"}
    full, rounded = (
        merge(plain / "base", tasks(plain, 1.0, 0.5), **call, dtype=d) for d in ("float64", "bfloat16")
    )
    exact, found = expanded(plain, full), expanded(plain, rounded)
    lost = sum(float((found[n] - v).square().sum()) for n, v in exact.items())
    kept = 1 - lost / sum(float(v.square().sum()) for v in exact.values())
    assert rounded.report.kept_update == pytest.approx(kept, abs=1e-9)
    assert kept < 1 - 1e-7
    assert full.report.kept_update is None


OWN = Rule("theta0", "mine", whole=lambda theta0, tau, alpha, options: theta0)
REFUSED = {
    "entry by entry": ({"method": "ties"}, "ties edits task vectors entry by entry"),
    "a transform": ({"transforms": ["dare"]}, "dare edits task vectors entry by entry"),
    "weights one by one": ({"method": "nearswap"}, "nearswap treats weights one by one"),
    "curvature": ({"method": "gradient_matching"}, "gradient_matching treats weights one by one"),
    "whole matrices": ({"method": "kronecker"}, "kronecker"),
    "rows": ({"method": "nuslerp", "along": "rows"}, "along rows treats single rows"),
    "single weights": ({"method": "sce"}, "sce edits task vectors entry by entry"),
    "a rule of one's own": (
        {"method": "tests.gradmatch.test_core:OWN"},
        "OWN looks at single weights or rows",
    ),
    "whole models": ({"method": "slerp"}, "slerp needs inner products of whole models"),
    "a scaled base": ({"method": "linear", "normalize": False}, r"scale the base itself, by 2"),
    "another space": ({"space": "cor"}, r"space is 'cor' \(did you mean 'core'\?\)"),
    "no rank": ({"rank": 0}, "rank is 0; it must be at least 1"),
    "a rank of weights": ({"space": "weights", "rank": 4}, "rank is 4; it is that of a merged adapter"),
    "no layers": ({"after": [3]}, "an edit of the merged update is a name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_core_is_refused_by_name(plain, case):
    call, text = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=text):
        merge(
            plain / "base", tasks(plain, 1.0, 1.0), **{"method": "task_arithmetic", "space": "core", **call}
        )


def test_tasks_that_are_no_plain_adapters_of_the_base_are_refused(plain, tmp_path):
    call = {"method": "task_arithmetic", "space": "core"}
    with pytest.raises(ValueError, match=r"adapter_config.json, or merge whole models"):
        merge(plain / "base", [Task(plain / "base", name="a")], **call)
    shutil.copytree(plain / "base", tmp_path / "base2")
    with pytest.raises(ValueError, match=r"a is an adapter on .*base, and the merge's base is .*base2"):
        merge(tmp_path / "base2", [Task(f"{plain / 'base'}+{plain / 'adapter0'}", name="a")], **call)
    make(tmp_path, bert, CASES["head"][1])
    with pytest.raises(ValueError, match=r"holds .*classifier.* beside its factors"):
        merge(tmp_path / "base", [Task(tmp_path / "adapter0")], **call)
    shutil.copytree(plain / "adapter0", tmp_path / "broken")
    held = load_file(tmp_path / "broken" / "adapter_model.safetensors")
    name = next(iter(held))
    held[name][0, 0] = math.nan
    save_file(held, tmp_path / "broken" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"holds 1 NaN or infinite values in broken"):
        merge(plain / "base", [Task(tmp_path / "broken")], **call, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_merges_adapters(plain, tmp_path, capsys):
    call = [
        "merge",
        "--base",
        str(plain / "base"),
        "--method",
        "tsv_m",
        "--space",
        "core",
        "--rank",
        "2",
        "--quiet",
    ]
    call += [part for seed in (0, 1) for part in ("--task", str(plain / f"adapter{seed}"))]
    out = tmp_path / "out"
    assert main([*call, "-o", str(out), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "ranks 3, 2" in said
    assert not out.exists()
    assert main([*call, "-o", str(out)]) == 0
    assert main([*call, "-o", str(out)]) == 2
    assert "exists; pass overwrite" in capsys.readouterr().err
    assert main([*call, "-o", str(out), "--overwrite"]) == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == 2
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "gradmatch.json",
    ]  # fmt: skip
    assert "library_name: peft" in (out / "README.md").read_text()
    assert not list(tmp_path.glob("out.*"))
    # an adapter again: of an adapter, the merge can be merged once more
    again = merge(plain / "base", [Task(out), Task(plain / "adapter0")], method="averaging", space="core")
    assert again.config["target_modules"] == config["target_modules"]


def test_a_plan_holds_factors_alone(plain):
    made = prepare(plain / "base", tasks(plain, 1.0, 1.0), method="averaging", space="core")
    weights = {step.name: step for step in made.steps}
    step = weights["model.layers.0.self_attn.q_proj.weight"]
    assert (step.rank, step.bytes_written, step.why) == (5, 4 * 5 * (16 + 16), "ranks 3, 2")
    assert made.bytes_written < 4 * sum(step.spec.numel for step in made.steps)
    assert any("q_proj" in line and "ranks 3, 2" in line for line in describe(made))
