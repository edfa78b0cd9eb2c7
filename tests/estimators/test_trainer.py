"""Units of Adam's moments from real Trainer runs: told by the run's files, given by a few examples, or refused by name."""

import collections
import json
import shutil

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from experiments.adam_units import EXAMPLES, VARIANTS, batches, make, train
from gradmatch.estimators import from_adam
from gradmatch.estimators.steps import usual_batch
from gradmatch.estimators.trainer import read_run

tf.logging.set_verbosity_error()
TOLD = {  # variant -> words of info["assumed"]
    "not clipped": "gradients not clipped",
    "clipped hard, logged": "undone by",
    "four passes": "summed, not averaged, over 4 passes",
    "weight decay, bf16": "4 examples a step",
    "bf16 moments": "4 examples a step",
    "regression": "mean of squared errors over 1 outputs",
    "yes/no": "a mean over 4 yes/no outputs",
}
REFUSED = {
    "defaults": r"clipped \(max_grad_norm 1\), and 0 of the last 30 norms were logged",
    "clipped hard, every third logged": r"the 10 logged norms of 30 tell by how much only to \d+ %",
    "llama": "LlamaForCausalLM is a mean over predicted tokens.*gradients are clipped",
    "adafactor": "is that of Adafactor",
}


def variant(name, folder):
    kind, arguments = VARIANTS[name]
    return kind, train(kind, folder, **arguments)


@pytest.mark.parametrize("name", TOLD)
def test_what_the_files_tell_is_the_fisher_of_the_same_steps(name, tmp_path):
    _, run = variant(name, tmp_path)
    found = from_adam(run.folder, run.model, num_examples=EXAMPLES)
    assert found.trace() == pytest.approx(run.reference(), rel=0.05)
    assert TOLD[name] in found.info["assumed"]
    assert found.info["reduction"] == "batch"
    assert found.info["units"].startswith("nats per example")
    assert "tensors are those of the model in checkpoint-30" in found.info["beside"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_they_do_not_tell_is_refused_or_calibrated(name, tmp_path):
    kind, run = variant(name, tmp_path)
    with pytest.raises(ValueError, match=REFUSED[name]):
        from_adam(run.folder, run.model, num_examples=EXAMPLES)
    if name == "adafactor":
        return
    found = from_adam(run.folder, run.model, num_examples=EXAMPLES, calibrate=batches(kind, 32))
    whole = from_adam(run.folder, run.model, num_examples=EXAMPLES, calibrate=list(batches(kind, EXAMPLES)))
    assert found.trace() == pytest.approx(whole.trace(), rel=0.25)
    assert "to the trace of the empirical Fisher of 32 examples, known to" in found.info["assumed"]
    assert 0 < float(found.info["scale_error"]) < 0.5


def test_norms_of_some_steps_do_where_none_was_clipped_or_all_alike(tmp_path):
    run = train("classes", tmp_path, steps=40, max_grad_norm=50.0, logging_steps=4)
    found = from_adam(run.folder, run.model, num_examples=EXAMPLES)
    assert "undone by 1, from 10 of the last 40 norms, of which 0 were above" in found.info["assumed"]
    assert found.trace() == pytest.approx(run.reference(), rel=0.05)


SHORT = [(64, 4, False, 4), (10, 8, False, 2 / (1 / 8 + 1 / 2)), (10, 8, True, 8)]
SHORT += [(3, 8, False, 3), (3, 8, True, 3)]


@pytest.mark.parametrize(("examples", "size", "dropped", "expected"), SHORT)
def test_short_last_steps_count(examples, size, dropped, expected):
    assert usual_batch(examples, size, dropped) == pytest.approx(expected)


def test_short_last_steps_of_a_real_run(tmp_path):
    run = train("classes", tmp_path, steps=30, count=10, per_device_train_batch_size=8, max_grad_norm=0.0)
    found = from_adam(run.folder, run.model, num_examples=10)
    assert found.trace() == pytest.approx(run.reference(), rel=0.25)  # between noise and mean gradient


# Files that were changed, or are another run's


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    options = {"steps": 4, "logging_steps": 1, "gradient_accumulation_steps": 2}
    return train("classes", tmp_path_factory.mktemp("run"), **options)


def edit_state(folder, edit):
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    edit(state)
    torch.save(state, folder / "optimizer.pt")


def edit_json(name, **changes):
    def edit(folder):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def edit_arguments(**changes):
    def edit(folder):
        given = torch.load(folder / "training_args.bin", weights_only=False)
        vars(given).update(changes)
        torch.save(given, folder / "training_args.bin")

    return edit


def edit_weights(folder):
    weights = load_file(folder / "model.safetensors")
    weights["classifier.weight"][0, 0] += 1e-3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def moments(**changes):
    def edit(folder):
        edit_state(folder, lambda s: s["state"][0].update({k: f(s["state"][0]) for k, f in changes.items()}))

    return edit


def all_moments(kind):
    def edit(folder):
        def to(state):
            for entry in state["state"].values():
                entry.update(step=torch.tensor(500.0), exp_avg_sq=entry["exp_avg_sq"].to(kind))

        edit_state(folder, to)

    return edit


def sharded(folder):
    (folder / "optimizer.pt").unlink()
    (folder / "global_step4").mkdir()


def only(name):
    return lambda folder: [
        (folder / other).unlink() for other in ("training_args.bin", "trainer_state.json") if other != name
    ]


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def another(folder):
    torch.save(collections.Counter(a=1), folder / "training_args.bin")


def foreign(folder):
    torch.save(Arguments(), folder / "training_args.bin")


class Arguments:
    pass


class Exploding:
    def __reduce__(self):
        return (exit, (3,))


CHANGED = {
    "another step": (edit_weights, r"'classifier.weight' holds .* in model.safetensors where the given model has"),
    "another model": (
        lambda folder: tf.BertForSequenceClassification(tf.BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)).save_pretrained(folder),
        r"has shape \[60, 32\] in model.safetensors, \[60, 16\] here",
    ),
    "names of another": (
        lambda folder: save_file({"x": torch.ones(3)}, folder / "model.safetensors"), "none of the given model's .* trainable tensors",
    ),
    "version": (edit_json("config.json", transformers_version="4.46.1"), "depends on the version of transformers: the run's is 4.46.1"),
    "no arguments": (only("trainer_state.json"), "lies there without training_args.bin"),
    "no state": (only("training_args.bin"), "0 of the last 4 norms were logged"),
    "state no json": (write("trainer_state.json", b"{"), "trainer_state.json is not JSON"),
    "state a list": (write("trainer_state.json", b"[]"), "trainer_state.json holds a list"),
    "state of strange entries": (edit_json("trainer_state.json", log_history=[1]), "not what a Trainer writes: AttributeError"),
    "norms of another": (
        edit_json("trainer_state.json", log_history=[{"step": n, "grad_norm": 0.001} for n in (1, 2, 3, 4)]),
        "what was logged is not what the optimizer was given",
    ),
    "arguments cut": (write("training_args.bin", b"PK"), "training_args.bin cannot be read"),
    "arguments of something": (another, "holds a Counter, not the arguments of a Trainer"),
    "arguments of another trainer": (foreign, r"training_args.bin is a tests.*Arguments, whose trainer may compute another loss"),
    "code": (lambda folder: torch.save(Exploding(), folder / "training_args.bin"), "training_args.bin is a .*Quitter"),
    "optim": (edit_arguments(optim="paged_adamw_8bit"), "trained with optim='paged_adamw_8bit': only of AdamW"),
    "passes no number": (edit_arguments(gradient_accumulation_steps="four"), "training_args.bin holds a number that is none"),
    "smoothing": (edit_arguments(label_smoothing_factor=0.1), "sets label_smoothing_factor"),
    "deepspeed elsewhere": (edit_arguments(deepspeed="zero.json"), "sets deepspeed"),
    "rows": (edit_json("trainer_state.json", train_batch_size=3), r"batch_size is 8, but the run in .* made steps of 6 examples \(3 rows x 2 passes x 1 processes\)"),
    "half": (all_moments(torch.float16), "is torch.float16: float32 is needed"),
    "bfloat16, long": (all_moments(torch.bfloat16), "moments are bfloat16, whose 8 bits lose what 500 steps add up"),
    "negative": (moments(exp_avg_sq=lambda s: -s["exp_avg_sq"] - 1), "has negative values"),
    "prodigy": (moments(p0=lambda s: 1), "holds p0 besides exp_avg_sq"),
    "bitsandbytes": (moments(state2=lambda s: 1), "is that of bitsandbytes"),
    "betas": (lambda folder: edit_state(folder, lambda s: s["param_groups"][0].pop("betas")), "has betas None"),
    "groups": (lambda folder: edit_state(folder, lambda s: s.update(param_groups=3)), "'param_groups' are no list of groups"),
    "entries": (lambda folder: edit_state(folder, lambda s: s.update(state=[1])), "its 'state' is no mapping"),
    "shards": (sharded, r"in shards \(global_step4"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_files_that_were_changed_are_refused_by_name(name, trained, tmp_path):
    edit, message = CHANGED[name]
    folder = tmp_path / "checkpoint"
    shutil.copytree(trained.folder, folder)
    edit(folder)
    if name == "rows":
        assert read_run(folder).batch_size == 3 * 2
    with pytest.raises(ValueError, match=message):
        from_adam(folder, trained.model, num_examples=EXAMPLES, batch_size=8 if name == "rows" else None)


@pytest.mark.parametrize(
    ("engine", "clip"),
    [(None, 1.0), ({"gradient_clipping": 0.5}, 0.5), ({"gradient_clipping": "auto"}, 1.0), ({}, 0.0)],
)
def test_deepspeeds_own_clipping_wins(engine, clip, trained, tmp_path):
    shutil.copytree(trained.folder, tmp_path / "c")
    edit_arguments(deepspeed=engine)(tmp_path / "c")
    assert read_run(tmp_path / "c").max_grad_norm == clip


def test_a_bare_state_needs_a_batch_size_and_is_taken_as_told(trained, tmp_path):
    shutil.copy(trained.folder / "optimizer.pt", tmp_path)
    with pytest.raises(ValueError, match=r"one step is not known: no Trainer's training_args.bin"):
        from_adam(tmp_path, trained.model, num_examples=5)
    found = from_adam(tmp_path, trained.model, num_examples=5, batch_size=8)
    assert "no file tells" in found.info["assumed"]
    assert found.info["beside"].startswith("no model in")


def test_a_language_models_bare_state_is_refused():
    model = make("llama")
    optimizer = torch.optim.AdamW(model.parameters())
    batch = next(batches("llama", 4))
    model(**batch).loss.backward()
    optimizer.step()
    with pytest.raises(ValueError, match="a mean over predicted tokens, and no file tells how many"):
        from_adam(optimizer, model, num_examples=5, batch_size=4)
    found = from_adam(optimizer, model, num_examples=5, calibrate=[batch])
    assert "of 4 examples" in found.info["assumed"]
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="the loss of LlamaForCausalLM with that of its router"):
        from_adam(optimizer, model, num_examples=5, batch_size=4)
    single = {key: value[:1] for key, value in batch.items()}
    found = from_adam(optimizer, model, num_examples=5, calibrate=[single])
    assert "which tells no error" in found.info["assumed"]
    with pytest.raises(ValueError, match="calibrate is a single dict; it must yield batches"):
        from_adam(optimizer, model, num_examples=5, calibrate=batch)
