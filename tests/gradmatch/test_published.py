"""What a merge publishes: names instead of paths, the hub's ids, and the files that the output loads by."""

import hashlib
import json
import shutil

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from gradmatch import Task, merge, open_checkpoint
from gradmatch.estimators import Curvature
from gradmatch.models.reference import hub_id, published, split_adapter, split_revision
from tests.gradmatch.tiny import llama


@pytest.fixture
def models(tmp_path):
    """base/ and tuned/, and adapter/ of base."""
    torch.manual_seed(0)
    base = llama(12, tie_word_embeddings=False)
    base.save_pretrained(tmp_path / "base")
    tuned = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    tuned.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "tuned")
    return tmp_path


@pytest.fixture
def cached(models, monkeypatch):
    """The same as me/base, me/tuned and me/adapter in the hub's cache; returns name -> revision."""
    revisions = {}
    for name in ("base", "tuned", "adapter"):
        revisions[name] = sha = hashlib.sha1(name.encode()).hexdigest()
        folder = models / "hub" / f"models--me--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(sha)
        (folder / "refs" / "v2").write_text(sha)
        shutil.copytree(models / name, folder / "snapshots" / sha)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(models / "hub"))
    return revisions


def texts(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.suffix in (".md", ".json")}


def front_matter(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---")[1])


def test_hub_ids_and_revisions_are_kept(cached, models):
    known = Curvature.from_dict({n: torch.ones(t.shape) for n, t in open_checkpoint("me/tuned").items()}, 4)
    known.save(models / "known.safetensors")
    tasks = [
        Task("me/tuned", models / "known.safetensors", 0.5),
        Task("me/base@v2+me/adapter", known, 0.5, "lora"),
    ]
    merge("me/base@v2", tasks, base_curvature=1.0, allow_mismatch=True, out=models / "out")
    recipe = json.loads((models / "out" / "gradmatch.json").read_text())["recipe"]
    assert recipe["base"] == f"me/base@{cached['base']}"
    assert [task["model"] for task in recipe["tasks"]] == [
        f"me/tuned@{cached['tuned']}",
        f"me/base@{cached['base']}+me/adapter@{cached['adapter']}",
    ]
    written = "\n".join(texts(models / "out").values())
    assert str(models) not in written
    assert "snapshots" not in written
    head = front_matter(models / "out")
    assert head["base_model"] == ["me/base", "me/tuned", "me/adapter"]
    assert head["base_model_relation"] == "merge"
    said = "no hub repository of that name at revision v7 could be fetched"
    with pytest.raises(FileNotFoundError, match=said):
        open_checkpoint("me/base@v7")


@pytest.mark.parametrize(
    ("base", "task", "stated"), [("mit", "mit", "mit"), ("mit", "", "mit"), ("mit", "gpl-3.0", None)]
)
def test_the_inputs_licences_and_data_sets_are_carried(models, base, task, stated):
    for name, licence in (("base", base), ("tuned", task)):
        head = f"license: {licence}\n" if licence else ""
        (models / name / "README.md").write_text(f"---\n{head}datasets: [me/{name}, me/all]\n---\n# {name}\n")
    merge(models / "base", [Task(models / "tuned")], method="averaging", out=models / "out")
    head = front_matter(models / "out")
    assert head.get("license") == stated
    assert head["datasets"] == ["me/base", "me/all", "me/tuned"]
    said = (
        "the inputs' licences differ (base: mit, task tuned: gpl-3.0)"
        in (models / "out" / "README.md").read_text()
    )
    assert said == (stated is None)


def test_a_readme_that_is_no_card_says_nothing(models):
    (models / "base" / "README.md").write_text("---\n: [\n---\n")
    merge(models / "base", [Task(models / "tuned")], method="averaging", out=models / "out")
    assert "license" not in front_matter(models / "out")


def test_local_models_are_called_by_their_name_alone(models):
    tasks = [
        Task(models / "tuned"),
        Task(models / "adapter"),
        Task(models / "base" / "model.safetensors", name="file"),
    ]
    merge(models / "base", tasks, method="averaging", out=models / "out")
    recipe = json.loads((models / "out" / "gradmatch.json").read_text())["recipe"]
    assert [recipe["base"], *(task["model"] for task in recipe["tasks"])] == [
        "base", "tuned", "base+adapter", "base/model.safetensors",
    ]  # fmt: skip
    assert not [name for name, text in texts(models / "out").items() if str(models) in text]
    assert "base_model" not in front_matter(models / "out")


NAMES = [
    ("me/base", ("me/base", ""), ("me/base", None)),
    ("me/base@v2", ("me/base@v2", ""), ("me/base", "v2")),
    ("me/base+me/lora@v1", ("me/base", "me/lora@v1"), ("me/base+me/lora", "v1")),
    ("a+b+c", ("a+b", "c"), ("a+b+c", None)),
]


@pytest.mark.parametrize(("text", "adapter", "revision"), NAMES, ids=[text for text, _, _ in NAMES])
def test_names_are_taken_apart(text, adapter, revision):
    assert split_adapter(text) == adapter
    assert split_revision(text) == revision


def test_a_path_that_holds_the_signs_is_a_path(models):
    shutil.copytree(models / "tuned", models / "a+b@c")
    assert split_adapter(str(models / "a+b@c")) == (str(models / "a+b@c"), "")
    assert split_revision(str(models / "a+b@c"))[1] is None
    assert hub_id(published(models / "a+b@c")) is None


CARRIED = [
    "source.spm", "target.spm", "qwen.tiktoken", "bpe.codes", "chat_template.jinja", "additional_chat_templates/tool.jinja",
    "modeling_tiny.py",
]  # fmt: skip


def test_what_a_model_loads_by_is_carried_and_the_rest_is_named(models):
    base = models / "base"
    (base / "modeling_tiny.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class TinyConfig(LlamaConfig):\n    model_type = 'tinyx'\n"
        "class TinyLM(LlamaForCausalLM):\n    config_class = TinyConfig\n"
    )
    config = json.loads((base / "config.json").read_text())
    code = {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyLM"}
    (base / "config.json").write_text(
        json.dumps({**config, "auto_map": code, "model_type": "tinyx", "architectures": ["TinyLM"]})
    )
    (base / "additional_chat_templates").mkdir()
    (base / "onnx").mkdir()
    for name in (*CARRIED[:-1], "export.onnx", "optimizer.pt"):
        (base / name).write_bytes(b"x")
    (models / "secret.json").write_text("{}")
    (base / "linked.json").symlink_to(models / "secret.json")
    done = merge(base, [Task(models / "tuned")], method="averaging", out=models / "out")
    assert [name for name in CARRIED if not (models / "out" / name).is_file()] == []
    assert AutoModelForCausalLM.from_pretrained(models / "out", trust_remote_code=True)
    said = "\n".join(done.report.notes)
    link, code = "linked.json: not carried along (a link out of", "modeling_tiny.py: code of"
    for text in ("export.onnx: not", "onnx/: not", link, code):
        assert text in said
    assert "optimizer.pt" not in said
    assert not (models / "out" / "linked.json").exists()


def test_configs_do_not_tell_where_the_base_was_made(models):
    """As older versions of transformers wrote them; ids of the hub and names of files beside them stay."""
    base, secret = models / "base", "/home/maker/secret"
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps({**config, "_name_or_path": "secret", "nested": {"_name_or_path": secret}})
    )
    paths = {
        "name_or_path": secret,
        "tokenizer_file": f"{secret}/t.json",
        "special_tokens_map_file": "C:\\\\secret",
    }
    kept = {"vocab_file": "vocab.txt", "chat_template": "/secret/ is said", "unk_token": "/"}
    (base / "tokenizer_config.json").write_text(json.dumps({**paths, **kept}))
    merge(base, [Task(models / "tuned")], method="averaging", out=models / "out")
    written = {
        name: json.loads((models / "out" / name).read_text())
        for name in ("config.json", "tokenizer_config.json")
    }
    assert written == {"config.json": {**config, "nested": {}}, "tokenizer_config.json": kept}
    (base / "tokenizer_config.json").write_text(json.dumps({**kept, "name_or_path": "me/base"}))
    merge(base, [Task(models / "tuned")], method="averaging", out=models / "out", overwrite=True)
    assert (models / "out" / "tokenizer_config.json").read_bytes() == (
        base / "tokenizer_config.json"
    ).read_bytes()


def test_code_that_no_config_names_stays_behind(models):
    (models / "base" / "train.py").write_text("raise SystemExit")
    done = merge(models / "base", [Task(models / "tuned")], method="averaging", out=models / "out")
    assert not (models / "out" / "train.py").exists()
    assert "train.py: not carried along" in "\n".join(done.report.notes)
