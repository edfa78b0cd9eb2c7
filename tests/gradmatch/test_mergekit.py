"""mergekit's recipes: translated here, and compared with mergekit itself where it is installed.

Set GRADMATCH_MERGEKIT to the `mergekit-yaml` command of another environment, or install mergekit beside this package.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from gradmatch import GradmatchError, merge, open_checkpoint
from gradmatch.recipes.mergekit.translation import translate
from gradmatch.recipes.recipe import load_recipe

MERGEKIT = os.environ.get("GRADMATCH_MERGEKIT") or shutil.which("mergekit-yaml")
LAYERS = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """base/ and three fine-tunes m0/ m1/ m2/ of a tiny Llama."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=60, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    shared = {
        name: 0.02 * torch.randn_like(value) for name, value in start.items()
    }  # task vectors with something in common
    model.save_pretrained(folder / "base")
    for number in range(3):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(start[name] + shared[name] + 0.02 * torch.randn_like(parameter))
        model.save_pretrained(folder / f"m{number}")
    return folder


def entries(folder, *parameters):
    given = parameters or ({}, {}, {})
    return [{"model": str(folder / f"m{i}"), **({"parameters": p} if p else {})} for i, p in enumerate(given)]


def recipes(folder):
    """name -> (recipe, largest relative difference to mergekit's result, in the 2-norm)."""
    base, first = str(folder / "base"), str(folder / "m0")

    def edit(method, *parameters, **shared):
        models = entries(folder, *parameters)
        return {"merge_method": method, "base_model": base, "models": models, "parameters": shared}

    def source(number, first_layer, last_layer, **parameters):
        layers = {"model": str(folder / f"m{number}"), "layer_range": [first_layer, last_layer]}
        return layers | ({"parameters": parameters} if parameters else {})

    by_part = [{"filter": "mlp", "value": 1.0}, {"value": [0.3, 0.6]}]
    weights = {"weight": 0.5}, {"weight": [0.1, 0.9]}, {"weight": by_part}
    exact = 1e-6
    return {
        "linear": ({"merge_method": "linear", "models": entries(folder, *weights)}, exact),
        "linear, not normalised": ({"merge_method": "linear", "models": entries(folder, *weights), "parameters": {"normalize": False}}, exact),
        "slerp": ({"merge_method": "slerp", "base_model": first, "models": entries(folder)[:2], "parameters": {"t": [{"filter": "mlp", "value": [0, 0.5, 1]}, {"value": 0.3}]}}, exact),
        "slerp of slices": ({"merge_method": "slerp", "base_model": first, "slices": [{"sources": [source(0, 0, LAYERS), source(1, 0, LAYERS)]}], "parameters": {"t": 0.4}}, exact),
        "nuslerp": ({"merge_method": "nuslerp", "base_model": base, "models": entries(folder, {"weight": 1.0}, {"weight": 0.5})}, exact),
        "nuslerp without a base": ({"merge_method": "nuslerp", "models": entries(folder, {"weight": 1.0}, {"weight": 0.5})}, 1e-3),
        "nuslerp of rows": ({"merge_method": "nuslerp", "base_model": base, "models": entries(folder, {"weight": 1.0}, {"weight": 0.5})[:2], "parameters": {"nuslerp_flatten": False}}, exact),
        "nuslerp of columns": ({"merge_method": "nuslerp", "base_model": base, "models": entries(folder, {"weight": 1.0}, {"weight": 0.5})[:2], "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True}}, exact),
        "nuslerp of rows without a base": ({"merge_method": "nuslerp", "models": entries(folder, {"weight": 1.0}, {"weight": 0.5})[:2], "parameters": {"nuslerp_flatten": False}}, 1e-3),
        "task_arithmetic": (edit("task_arithmetic", {"weight": 0.5}, {"weight": -0.2}, {"weight": 1.0}, **{"lambda": 0.7}), exact),
        "task_arithmetic, normalised": (edit("task_arithmetic", *weights, normalize=True), exact),
        "ties": (edit("ties", {"weight": 0.5, "density": 0.3}, {"weight": 0.7, "density": 0.5}, {"weight": 1.0, "density": 0.9}), 1e-3),
        "ties, not normalised": (edit("ties", density=0.4, weight=0.5, normalize=False), 1e-3),
        "breadcrumbs": (edit("breadcrumbs", density=0.6, gamma=0.02, weight=0.5), exact),
        "breadcrumbs_ties": (edit("breadcrumbs_ties", density=0.6, gamma=0.02, weight=0.5), exact),
        "model_stock": ({"merge_method": "model_stock", "base_model": base, "models": entries(folder)}, exact),
        "model_stock, filter-wise": ({"merge_method": "model_stock", "base_model": base, "models": entries(folder), "parameters": {"filter_wise": True}}, exact),
        "karcher": ({"merge_method": "karcher", "models": entries(folder)}, exact),
        "slerp, t by slice": ({"merge_method": "slerp", "base_model": first, "slices": [{"sources": [source(0, 0, 2), source(1, 0, 2)], "parameters": {"t": 0.3}}, {"sources": [source(1, 2, 4), source(0, 2, 4)], "parameters": {"t": [{"filter": "mlp", "value": [0.2, 0.8]}, {"value": 0.6}]}}]}, exact),
        "slerp, a gradient": ({"merge_method": "slerp", "base_model": first, "slices": [{"sources": [source(0, 0, LAYERS), source(1, 0, LAYERS)]}], "parameters": {"t": [{"value": [0.1, 0.3, 0.6, 0.9]}]}}, exact),
        "linear, weights by slice": ({"merge_method": "linear", "slices": [{"sources": [source(0, 0, 3, weight=0.7), source(1, 0, 3, weight=0.3)]}, {"sources": [source(0, 3, 4, weight=[0.2, 0.4]), source(1, 3, 4, weight=0.8)]}]}, exact),
        "task_arithmetic of slices": ({"merge_method": "task_arithmetic", "base_model": base, "slices": [{"sources": [{"model": base, "layer_range": [0, 2]}, source(0, 0, 2, weight=0.5)]}, {"sources": [source(1, 2, 4, weight=[0.3, 0.9]), {"model": base, "layer_range": [2, 4]}]}]}, exact),
        "modules": ({"merge_method": "linear", "modules": {"default": {"models": entries(folder, *weights), "parameters": {"normalize": False}}}}, exact),
        "ties, density 0 in a gradient": (edit("ties", {"weight": 0.5, "density": [0, 0.6]}, {"weight": 0.7, "density": 0.5}), 1e-3),
        "dare_ties, density 0 or 1": (edit("dare_ties", {"weight": 0.5, "density": [{"filter": "mlp", "value": 0}, {"value": 1}]}, {"weight": 0.7, "density": 1.0}), exact),
        "sce": (edit("sce", select_topk=0.5), 1e-5),
        "sce of all entries": (edit("sce"), 1e-5),
        "multislerp": (edit("multislerp", {"weight": 1.0}, {"weight": 0.3}, {"weight": 0.7}), 1e-5),
        "multislerp without a base": ({"merge_method": "multislerp", "models": entries(folder, {"weight": 1.0}, {"weight": 0.3})[:2]}, 1e-5),
        "nearswap": ({"merge_method": "nearswap", "base_model": base, "models": [{"model": base}, *entries(folder)[:1]], "parameters": {"t": [0.001, 0.02]}}, exact),
        "arcee_fusion": ({"merge_method": "arcee_fusion", "base_model": base, "models": [{"model": base}, *entries(folder)[:1]]}, 1e-3),
        "karcher with a base_model": ({"merge_method": "karcher", "base_model": base, "models": entries(folder)[:2]}, exact),
        "passthrough": ({"merge_method": "passthrough", "slices": [{"sources": [source(0, 0, 3)]}, {"sources": [source(1, 1, 4, scale=[{"filter": "o_proj", "value": 0.5}, {"value": 1.0}])]}]}, exact),
        "dare_linear, all kept": (edit("dare_linear", density=1.0, weight=0.5), exact),
        "dare_ties, all kept": (edit("dare_ties", density=1.0, weight=0.5), exact),
        "della, all kept": (edit("della", density=1.0, weight=0.5), exact),
        # random: the masks differ, so the mean over all coordinates is compared, not each
        "dare_linear": (edit("dare_linear", density=0.5, weight=0.5), None),
        "della_linear": (edit("della_linear", density=0.5, epsilon=0.2, weight=0.5), None),
    }  # fmt: skip


NAMES = list(recipes(Path("x")))


def ours(content, folder):
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump({**content, "dtype": "float32"}))
    return path, merge(**load_recipe(path), out=folder / "ours")


@pytest.mark.parametrize("name", NAMES)
def test_recipes_run_as_they_are_and_load(models, tmp_path, name):
    _, done = ours(recipes(models)[name][0], tmp_path)
    loaded, info = LlamaForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.config.num_hidden_layers == (6 if name == "passthrough" else LAYERS)
    if name in ("dare_linear", "della_linear"):
        assert "mergekit restores the tensor's L1 norm" in done.report.notes[0]


RUN = """
import sys, traceback
from mergekit.scripts.run_yaml import main
for recipe in sys.argv[1:]:
    try:
        main([recipe, recipe + ".out"], standalone_mode=False)
    except BaseException:
        open(recipe + ".failed", "w").write(traceback.format_exc())
"""


@pytest.fixture(scope="module")
def theirs(models):
    """name -> folder of mergekit's result; all recipes in one process, since most of its time is importing."""
    paths = {name: models / f"{number}.yml" for number, name in enumerate(NAMES)}
    for name, path in paths.items():
        path.write_text(yaml.safe_dump({**recipes(models)[name][0], "dtype": "float32"}))
    python = Path(MERGEKIT).resolve().parent / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [python, "-c", RUN, *map(str, paths.values())],
        capture_output=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )
    return {name: Path(f"{path}.out") for name, path in paths.items()}


@pytest.mark.skipif(
    MERGEKIT is None, reason="mergekit is not installed (GRADMATCH_MERGEKIT names its mergekit-yaml)"
)
@pytest.mark.parametrize("name", NAMES)
def test_results_are_mergekits(models, theirs, tmp_path, name):
    content, tolerance = recipes(models)[name]
    done = ours(content, tmp_path)[1]
    failed = theirs[name].with_suffix(".failed")
    assert not failed.exists(), failed.read_text()
    theirs = load_file(theirs[name] / "model.safetensors")
    assert set(theirs) == set(done)
    both = [(done[n].double().flatten(), theirs[n].double().flatten()) for n in theirs]
    one, two = (torch.cat(parts) for parts in zip(*both, strict=True))
    if tolerance is not None:
        assert float((one - two).norm() / two.norm()) <= tolerance
        return
    base = open_checkpoint(models / "base")
    start = torch.cat([base[n].double().flatten() for n in theirs])
    # Both keep about half of each task vector and rescale it: the same size of update on average.
    sizes = [float((merged - start).abs().mean()) for merged in (one, two)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


ERRORS = [
    ({"merge_method": "tis", "models": []}, r"merge_method 'tis' is unknown here \(did you mean 'ties'"),
    ({"merge_method": "ties", "model": []}, r"unknown key 'model' \(did you mean 'models'"),
    ({"merge_method": "ties"}, "either models or slices"),
    ({"merge_method": "ties", "models": [{"model": "a", "parameters": {"densty": 1}}]}, r"unknown parameter of ties 'densty' \(did you mean 'density'"),
    ({"merge_method": "ties", "models": [{"model": "a", "paramters": {"weight": 0}}]}, r"unknown key of models 'paramters' \(did you mean 'parameters'"),
    ({"merge_method": "ties", "slices": [{"source": []}]}, r"unknown key of slices 'source' \(did you mean 'sources'"),
    ({"merge_method": "ties", "slices": [{"sources": [{"model": "a", "layers": [0, 2]}]}]}, r"unknown key of sources 'layers'"),
    ({"merge_method": "ties", "models": ["a"]}, r"models is \['a'\]; it must be a list of at least one table of model, parameters"),
    ({"merge_method": "ties", "models": []}, r"models is \[\]; it must be a list"),
    ({"merge_method": "ties", "models": [{"parameters": {}}]}, "an entry of models has no model"),
    ({"merge_method": "ties", "slices": [{}]}, "an entry of slices has no sources"),
    ({"merge_method": "ties", "slices": [{"sources": [{"model": "a"}]}]}, "an entry of sources has no layer_range"),
    ({"merge_method": "ties", "slices": [{"sources": [{"model": "a", "layer_range": [0]}]}]}, r"layer_range is \[0\]; it must be two whole numbers"),
    ({"merge_method": "ties", "models": [{"model": "a", "parameters": 3}]}, "parameters is 3; it must be a table"),
    ({"merge_method": "ties", "models": [{"model": "a"}], "parameters": {"weight": [{"filter": 3, "value": 1}]}}, "weight: the filter 3 is no text"),
    ({"merge_method": "ties", "models": [{"model": "a"}], "parameters": {"weight": [{"filter": "mlp"}]}}, "weight has a filter without a value"),
    ({"merge_method": "della", "models": [{"model": "a"}], "parameters": {"rescale": False}}, "della with rescale: false is not supported"),
    ({"merge_method": "ties", "models": [{"model": "a"}]}, "ties needs a base_model"),
    ({"merge_method": "slerp", "models": [{"model": "a"}, {"model": "b"}]}, "slerp takes two models, one of them the base_model"),
    ({"merge_method": "nuslerp", "models": [{"model": "a"}]}, "nuslerp takes two models beside the base, got 1"),

    ({"merge_method": "nuslerp", "models": [{"model": "a", "parameters": {"weight": [0, 1]}}, {"model": "b"}]}, "takes one number as each weight"),

    ({"merge_method": "passthrough", "models": [{"model": "a"}, {"model": "b"}]}, "passthrough takes one source a slice, got 2"),
    ({"merge_method": "linear", "models": [{"model": 3}]}, "a model is a path or a hub id, not 3"),
    ({"merge_method": "linear", "modules": {"a": {"models": []}, "b": {"models": []}}}, "modules holds 2 modules; one is supported"),
    ({"merge_method": "linear", "modules": {"a": {"parameters": {}}}}, "the module 'a' must hold either models or slices"),
    ({"merge_method": "linear", "modules": {"a": {"models": [{"model": "a"}], "weight": 1}}}, "unknown key of the module 'a' 'weight'"),
    ({"merge_method": "nearswap", "base_model": "b", "models": [{"model": "a"}]}, r"nearswap needs parameters: \{t"),
    ({"merge_method": "arcee_fusion", "base_model": "b", "models": [{"model": "a"}, {"model": "c"}]}, "takes one model beside the base_model, got 2"),
    ({"merge_method": "dare_linear", "base_model": "b", "models": [{"model": "a"}], "parameters": {"density": 0, "normalize": True}}, "normalize and a density of 0"),
    ({"merge_method": "linear", "models": [{"model": "a"}], "tokenizer": {"source": "base", "tokens": {}}}, r"only `source` is supported, not \['tokens'\]"),
    ({"merge_method": "linear", "models": [{"model": "a"}], "tokenizer_source": "b"}, "tokenizer source 'b' is none of the models"),
    ({"merge_method": "slerp", "base_model": "a", "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}]}, {"sources": [{"model": "a", "layer_range": [0, 2]}] * 2}]}, "must have the same number"),
    ({"merge_method": "slerp", "base_model": "a", "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 3]}]}]}, "must be of one length"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "text"), ERRORS, ids=[text[:40] for _, text in ERRORS])
def test_recipe_errors(tmp_path, content, text):
    with pytest.raises(GradmatchError, match=text) as error:
        translate(content, tmp_path, "recipe.yml")
    assert str(error.value).startswith("recipe.yml: ")
    assert error.value.code != "refused"


def test_a_seed_and_an_adapter_as_recipes_of_the_wild_have_them(models, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    tuned = get_peft_model(LlamaForCausalLM.from_pretrained(models / "m0"), config)
    tuned.save_pretrained(tmp_path / "adapter")
    lora = {"model": {"path": str(models / "m0")}, "lora": {"path": "adapter"}}
    found = []
    for model in (f"{models / 'm0'}+adapter", lora):
        content = {"merge_method": "linear", "models": [{"model": model}], "random_seed": 7}
        arguments = translate(content, tmp_path, "r")
        assert arguments["seed"] == 7
        found.append(merge(**arguments))
    expected = tuned.merge_and_unload().state_dict()
    assert all(torch.equal(one[name], expected[name]) for one in found for name in expected)


def test_dare_without_rescaling(models):
    content = {"merge_method": "dare_linear", "base_model": str(models / "base")}
    content["models"] = [{"model": str(models / "m0"), "parameters": {"density": 0.5}}]
    found = merge(**translate(content | {"parameters": {"rescale": False}}, models, "r"))
    base, tuned = open_checkpoint(models / "base"), open_checkpoint(models / "m0")
    for name in base:
        kept, dropped = ((found[name] - one[name]).abs() <= 1e-7 for one in (tuned, base))
        assert torch.all(kept | dropped)


@pytest.mark.parametrize(
    ("tokenizer", "policy"),
    [
        ({"tokenizer_source": "b"}, None),
        ({"tokenizer_source": "base"}, None),
        ({"tokenizer": {"source": {"model": "b"}}}, None),
        ({"tokenizer_source": "union"}, "union"),
        ({"tokenizer": {"source": "union"}}, "union"),
    ],
)
def test_tokenizer_sources(tmp_path, tokenizer, policy):
    content = {"merge_method": "task_arithmetic", "base_model": "b", "models": [{"model": "a"}]}
    assert translate(content | tokenizer, tmp_path, "r").get("embeddings") == policy


def test_slices_with_a_base_of_their_own(models, tmp_path):
    content = {"merge_method": "task_arithmetic", "base_model": str(models / "base")}
    sources = [{"model": str(models / f"m{i}"), "layer_range": [0, 2]} for i in (0, 1)]
    content |= {"slices": [{"sources": sources}], "parameters": {"weight": 0.5}}
    arguments = translate(content, tmp_path, "r")
    done = merge(**arguments)
    base, one, two = (open_checkpoint(models / name) for name in ("base", "m0", "m1"))
    name = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(done[name], base[name] + 0.5 * (one[name] + two[name] - 2 * base[name]))
    assert "model.layers.2.mlp.up_proj.weight" not in done
    assert json.dumps(sorted(done)) == json.dumps(sorted(arguments["base"]))
