"""The Trainer's callback: what it writes is what `estimate` measures, and the training does not notice it."""

import warnings

import peft
import pytest
import torch
import transformers as tf

import gradmatch
from gradmatch import Curvature, CurvatureCallback, Task
from gradmatch.estimators.callback import saved_in
from tests.gradmatch.tiny import text_llama

WORDS = ["<pad>", "good", "bad", "film", "plot", "very", "not", "fine"]


def rows(count=12):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, len(WORDS), (count, 6), generator=generator)
    return [{"input_ids": row, "labels": row.clone(), "attention_mask": torch.ones_like(row)} for row in ids]


def train(folder, *callbacks, data=None, model=None, **settings):
    torch.manual_seed(0)
    if model is None:
        model, _ = text_llama(WORDS)
    args = tf.TrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=4, save_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        disable_tqdm=True, logging_steps=1, **settings,
    )  # fmt: skip
    trainer = tf.Trainer(model, args, train_dataset=data or rows(), callbacks=list(callbacks))
    trainer.train()
    return trainer.model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a Fisher and Adam's moments beside every checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    callbacks = [CurvatureCallback(examples=None), CurvatureCallback("adam", filename="adam.safetensors")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return folder, train(folder, *callbacks)


def test_every_checkpoint_has_its_curvature(run):
    folder, model = run
    for step in (2, 4):
        found = Curvature.from_pretrained(folder / f"checkpoint-{step}")
        assert (found.num_examples, found.info["examples_seen"]) == (12, "12")
    expected = gradmatch.estimators.estimate(model, rows_in_batches(), progress=False)
    last = Curvature.from_pretrained(folder / "checkpoint-4", model=model)
    for name in expected:
        torch.testing.assert_close(last[name], expected[name], rtol=1e-5, atol=1e-9)


def rows_in_batches():
    return [{key: torch.stack([row[key] for row in rows()]) for key in rows()[0]}]


def test_moments_are_in_the_units_of_the_fisher(run):
    folder, model = run
    adam = Curvature.load(folder / "checkpoint-4" / "adam.safetensors", model=model)
    measured = gradmatch.estimators.estimate(
        model, rows_in_batches(), method="empirical_fisher", progress=False
    )
    assert 0.1 < adam.trace() / measured.trace() < 10
    assert adam.num_examples == 12


def test_the_training_does_not_notice(run, tmp_path):
    _, model = run
    alone = train(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))
    assert model.training == alone.training


def test_a_checkpoint_merges_with_what_lies_in_it(run):
    folder, _ = run
    first, last = folder / "checkpoint-2", folder / "checkpoint-4"
    merged = gradmatch.merge(first, [Task(last, last)], base_curvature=first)
    assert torch.isfinite(torch.cat([value.flatten() for value in merged.values()])).all()


def test_an_adapter_is_measured_in_its_bases_weights(tmp_path):
    torch.manual_seed(0)
    base, _ = text_llama(WORDS)
    base.save_pretrained(tmp_path / "base")
    base = tf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    adapted = train(
        tmp_path / "run", CurvatureCallback(examples=None), model=peft.get_peft_model(base, config)
    )
    folder = tmp_path / "run" / "checkpoint-4"
    found = Curvature.from_pretrained(folder)
    expected = gradmatch.estimate(folder, rows_in_batches(), progress=False)
    assert found.info["fingerprint"] == expected.info["fingerprint"]
    torch.testing.assert_close(dict(found), dict(expected), rtol=1e-4, atol=1e-9)
    assert sum(value.requires_grad for value in adapted.parameters()) == 4


def test_autocast_is_left_aside(tmp_path):
    model = train(tmp_path, CurvatureCallback(examples=None), bf16=True)
    found = Curvature.from_pretrained(tmp_path / "checkpoint-4")
    plain, _ = text_llama(WORDS)
    plain.load_state_dict(model.state_dict())
    expected = gradmatch.estimators.estimate(plain, rows_in_batches(), progress=False)
    torch.testing.assert_close(dict(found), dict(expected), rtol=1e-4, atol=1e-9)
    assert "forward" in vars(model)


def test_a_trial_has_a_folder_of_its_own(tmp_path):
    (tmp_path / "run-3" / "checkpoint-2").mkdir(parents=True)
    assert saved_in(tmp_path, 2) == tmp_path / "run-3" / "checkpoint-2"
    assert saved_in(tmp_path, 4) == tmp_path / "checkpoint-4"


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(rows())


@pytest.mark.parametrize(
    ("said", "make"),
    [
        ("did you mean 'fisher'", lambda: CurvatureCallback("fischer")),
        ("examples must be at least 1", lambda: CurvatureCallback(examples=0)),
        ("did you mean 'factors'", lambda: CurvatureCallback(on="factor")),
        ("takes no samples", lambda: CurvatureCallback("adam", samples=2)),
    ],
)
def test_arguments_are_refused(said, make):
    with pytest.raises(ValueError, match=said):
        make()


def test_what_cannot_work_is_told_at_the_start(tmp_path):
    with pytest.raises(ValueError, match="a stream without a length"):
        train(tmp_path, CurvatureCallback(), data=Stream())
    base, _ = text_llama(WORDS)
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="on='factors'"):
        train(tmp_path, CurvatureCallback("adam"), model=adapted)


def test_an_error_at_a_save_does_not_end_the_training(tmp_path):
    with pytest.warns(UserWarning, match=r"no curvature of checkpoint-2 was written, the training goes on"):
        train(tmp_path, CurvatureCallback("adam"), save_only_model=True)
    assert (tmp_path / "checkpoint-4").is_dir()
