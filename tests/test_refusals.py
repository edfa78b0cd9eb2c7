"""What the command refuses: a table of (what is given, what is said), run row by row; docs/refused.md is written from it.

`python tests/test_refusals.py` writes the page.
"""

import ast
import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "refused.md"
M = "merge --base base --task one --method task_arithmetic -o out "  # a merge that works
G = "merge --base base --task one,curvature=one.safetensors --base-curvature base.safetensors -o out "
S = "subtract --base base --task one,curvature=one.safetensors --base-curvature base.safetensors -o out "
E = "estimate cls -o c.safetensors "
GUARD = "budget --base base --task one --base-curvature base.safetensors --method guarded "
B = "budget --base base --task one,curvature=one.safetensors --base-curvature base.safetensors "
D = "diagnose --base cls --task cls2,name=t "
TASKS = "tasks: [{model: one}]\n"
OURS = "base: base\nmethod: task_arithmetic\n"
LORA = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["w"],
    "base_model_name_or_path": "base",
}

# Section -> rows: what is given in words, files written first, the command, and words of the message.
REFUSALS = {
    "Models": [
        ("no such folder, and no hub within reach", {}, "merge --base bse --task one -o out", "no file or folder bse (did you mean 'base'?)"),
        ("an empty folder", {"empty/x": ""}, "merge --base empty --task one -o out", "empty holds no model.safetensors, no model.safetensors.index.json and no adapter_config.json"),
        ("a pickle, not asked for", {"old/pytorch_model.bin": "x"}, "merge --base old --task one -o out", "is a pickle, which can run code when it is opened; save it as safetensors, or pass"),
        ("a quantised model", {"base/config.json": '{"quantization_config": {"bits": 4}}'}, M, "base is quantised"),
        ("a file that is cut short", {"base/model.safetensors": "short"}, M, "model.safetensors: not a safetensors file, or cut short"),
        ("JSON in place of weights", {"base/model.safetensors": '{"weights": 1, "more": 2}'}, M, "model.safetensors: not a safetensors file but JSON text"),
        ("a git-lfs pointer in place of weights", {"base/model.safetensors": "version https://git-lfs.github.com/spec/v1\n"}, M, "the pointer of git-lfs, which stands for it; run `git lfs pull`"),
        ("an index that is no JSON", {"base/model.safetensors": None, "base/model.safetensors.index.json": "{"}, M, "model.safetensors.index.json is not JSON"),
        ("an index that leaves its folder", {"shards/model.safetensors.index.json": '{"weight_map": {"w": "../x"}}'}, "inspect shards", "points outside its folder: '../x'; do not trust this checkpoint"),
        ("an index of absolute paths", {"shards/model.safetensors.index.json": '{"weight_map": {"w": "/x.safetensors"}}'}, "inspect shards", "points outside its folder: '/x.safetensors'"),
        ("an index in place of its folder", {"x/model.safetensors.index.json": "{}"}, "merge --base base --task x/model.safetensors.index.json -o out", "says which tensor lies in which shard; name the folder that it lies in"),
        ("the folder above a model", {"up/ad/adapter_config.json": "{}"}, "merge --base base --task up -o out", "up holds no model.safetensors, no model.safetensors.index.json and no adapter_config.json; its folder ad may be what is meant"),
        ("an index whose shards are lists", {"base/model.safetensors": None, "base/model.safetensors.index.json": '{"weight_map": {"w": ["x"]}}'}, M, "has no weight_map from the name of a tensor to that of its shard"),
        ("a task that lacks a tensor", {}, "merge --base base --task short --method averaging -o out", "of the base is missing in short (short); pass --missing base"),
        ("a task with tensors of its own", {}, "merge --base short --task one --method averaging -o out", "that the base lacks, first 'layers.1.w'"),
        ("a tensor of another shape", {}, "merge --base base --task wide --method averaging -o out", "'layers.0.w' has shape [4, 4] in the base and [4, 5] in wide"),
        ("NaN in the weights", {}, "merge --base base --task nan --method averaging -o out", "NaN"),
        ("infinity in the weights", {}, "merge --base base --task inf --method averaging -o out", "'layers.0.w' holds 1 NaN or infinite values in inf"),
        ("two files and no index", {}, "merge --base pair --task one --method averaging -o out", "pair holds 2 safetensors files and no model.safetensors.index.json"),
        ("an index that promises a tensor", {"shards/model.safetensors.index.json": '{"weight_map": {"v": "a.safetensors"}}'}, "merge --base shards --task one --method averaging -o out", "says that a.safetensors holds 'v', but it does not"),
        ("an index that forgets a tensor", {"shards/model.safetensors.index.json": '{"weight_map": {"layers.0.w": "a.safetensors"}}'}, "merge --base shards --task one --method averaging -o out", "a.safetensors holds 'layers.1.w', which the index does not place there"),
        ("a config that is no JSON", {"base/config.json": "{"}, M, "config.json is not JSON"),
        ("a config that is no table", {"base/config.json": "[]"}, M, "holds a list, not a table"),
        ("a repository that cannot be fetched", {}, "merge --base nobody/nothing --task one -o out", "no hub repository of that name could be fetched"),
        ("a revision of a folder", {}, "merge --base base@main --task one -o out", "asks for revision 'main' of a local path, which has none"),
        ("a base and a model that is no adapter of it", {}, "merge --base base+one --task one -o out", "what stands behind the + must be an adapter"),
        ("models of two architectures", {}, "merge --base base --task cls --method averaging -o out", "share no tensor at all: they are models of different architectures"),
    ],
    "Adapters": [
        ("of another kind than LoRA", {"ad/adapter_config.json": json.dumps({**LORA, "peft_type": "IA3"}), "ad/adapter_model.safetensors": "x"}, "merge --base base --task ad --method averaging -o out", "peft_type='IA3'"),
        ("without a base", {"lora/adapter_config.json": json.dumps({**LORA, "base_model_name_or_path": None})}, "merge --base lora --task one --method averaging -o out", "lora is an adapter and names no base model"),
        ("with a setting that changes what it means", {"ad/adapter_config.json": json.dumps({**LORA, "layer_replication": [[0, 1]]})}, "merge --base base --task ad --method averaging -o out", "layer_replication"),
        ("whose file alone is named", {}, "merge --base base --task lora/adapter_model.safetensors --method averaging -o out", "holds an adapter's factors alone; name the folder"),
        ("whose base is not there", {"lora/adapter_config.json": json.dumps({**LORA, "base_model_name_or_path": "nowhere"})}, "merge --base lora --task one --method averaging -o out", "'nowhere', which is neither a folder nor in the hub's cache here"),
        ("that leads back to itself", {"lora/adapter_config.json": json.dumps({**LORA, "base_model_name_or_path": "lora"})}, "merge --base lora --task one --method averaging -o out", "leads back to itself"),
        ("of another base", {"lora/adapter_config.json": json.dumps(LORA)}, "merge --base base --task lora --method averaging -o out", "adapts 'layers.0.w.weight', which base does not have; it is an adapter for another base"),
        ("as a pickle, not asked for", {"lora/adapter_config.json": json.dumps(LORA), "lora/adapter_model.safetensors": None, "lora/adapter_model.bin": "x"}, "merge --base base --task lora --method averaging -o out", "adapter_model.bin is a pickle, which can run code"),
    ],
    "Merging": [
        ("nothing to merge", {}, "merge", "nothing to merge: give a recipe, or --base and at least one --task"),
        ("no output", {}, "merge --base base --task one", "no output folder: name it after the recipe or with --out"),
        ("an output that is there", {"out/x": ""}, M, "exists; pass overwrite (--overwrite)"),
        ("an output that no merge wrote", {"out/thesis.tex": ""}, M + "--overwrite", "holds files but no gradmatch.json, so no merge wrote it and it is not replaced"),
        ("an output inside an input", {}, "merge --base base --task one --method averaging -o base/out", "are the same or lie in one another"),
        ("an output in a file", {"file": ""}, "merge --base base --task one --method averaging -o file/out", "file is a file, so the output"),
        ("an unknown method", {}, M + "--method tis", "unknown method 'tis' (did you mean 'ties'?)"),
        ("an unknown option", {}, M + "--method ties --option densty=1", "ties has no option 'densty' (did you mean 'density'?)"),
        ("an option beyond its bounds", {}, M + "--method ties --option density=2", "density is 2"),
        ("an option of another kind", {}, M + "--option scale=much", "scale is 'much'; it must be a number"),
        ("an option that is a flag", {}, M + "--option delta0=1", "'delta0' is no option of a method but a key (and flag) of its own"),
        ("an option that is no pair", {}, M + "--option scale", "--option 'scale' is not KEY=VALUE"),
        ("an option that is no YAML", {}, M + "--option scale=[1", "--option 'scale=[1' is not YAML"),
        ("an option that is a flag of where it goes", {}, M + "--option out=z", "'out' is no option of a method but a key (and flag)"),
        ("a choice that is none", {}, M + "--method ties --option trim=globl", "trim is 'globl' (did you mean 'global'?); choose one of global, tensor"),
        ("an option of a transform that it has not", {}, M + "--option densty=1 --transform ties", "task_arithmetic has no option 'densty' (did you mean 'density'?)"),
        ("weights by patterns that miss a tensor", {}, M.replace("one", "\"one,weight={'*mlp*': 1}\""), "no pattern of ['*mlp*'] matches tensor 'layers.0.w'"),
        ("a device that is not there", {}, M + "--device gpu", "device is 'gpu', which torch does not know"),
        ("a module of rules that is not there", {}, M + "--method no_such.place:RULE", "no module 'no_such' to import; install it, or put its folder on PYTHONPATH"),
        ("values beyond the output's type", {}, M + "--option scale=1e6 --dtype float16", "beyond what torch.float16 holds; choose a wider dtype"),
        ("weights to be chosen for a rule that has none", {}, M + "--weights auto --method ties --products p.json", "not for 'ties'"),
        ("statistics to be measured, and no data", {}, M + "--batchnorm recalibrate", "--batchnorm recalibrate runs the model: pass the base as a module, or as a folder"),
        ("an output that holds the working directory", {}, "merge --base base --task one --method averaging -o . --overwrite", "is or holds the working directory"),
        ("a task whose name is no file's, with a head of its own", {}, "merge --base base --task one,name=../a --method averaging --heads keep-per-task -o out", "'../a' is no plain file name"),
        ("shards of no size", {}, M + "--shard-bytes 0", "shard_bytes is 0; it must be at least 1"),
        ("a template that is none", {}, M + "--chat-template chatlm", "chat_template is 'chatlm' (did you mean 'chatml'?)"),
        ("a tokenizer that is no model's", {}, M + "--tokenizer onne", "tokenizer is 'onne' (did you mean 'one'?)"),
        ("a task with another key", {}, "merge --base base --task one,wieght=1 -o out", "'wieght=1' is none of curvature=FILE, weight=W, name=NAME"),
        ("a weight that is not finite", {}, M.replace("--task one", "--task one,weight=.nan"), "the weight of one is nan; it must be finite"),
        ("a weight that is no YAML", {}, M.replace("--task one", "--task one,weight=[1"), "the weight is not YAML"),
        ("two tasks of one name", {}, "merge --base base --task one,name=a --task two,name=a -o out --method averaging", "two tasks are called 'a'"),
        ("two tasks for a rule of one", {}, "merge --base base --task one --task two --method passthrough -o out", "passthrough takes 1 task, got 2"),
        ("an output type that is none", {}, M + "--dtype int64", "dtype is 'int64'"),
        ("an unknown transform", {}, M + "--transform tis", "unknown transform 'tis' (did you mean 'ties'?)"),
        ("weights that sum to zero and are to be normalised", {}, "merge --base base --task one,weight=1 --task two,weight=-1 --method linear -o out", "sum to zero and cannot be normalised"),
        ("weights to be chosen, and nothing to choose from", {}, M + "--weights auto", "--weights auto needs data"),
        ("greedy soup from the command", {}, "merge --base base --task one --method greedy_soup -o out", "is called from Python"),
        ("reloading without a config", {}, M + "--verify reload", "has no config.json"),
    ],
    "Alignment": [
        ("nothing to align with", {}, "align cls", "nothing to align with: name a model with --to, or --check this one"),
        ("a check of two models", {}, "align cls --check --to cls2", "--check looks at one model alone, without --to"),
        ("a figure without data", {}, "align cls --to cls2 --figure x.png", "--figure draws losses, which need --data FILE"),
        ("a method that needs data, and none", {}, "align cls --to cls2 --method activations", "looks at what the models do on data; pass --data"),
        ("an unknown method", {}, "align cls --to cls2 --method weight", "method is 'weight' (did you mean 'weights'?)"),
        ("no restart at all", {}, "align cls --to cls2 --restarts 0", "restarts is 0; it must be at least 1"),
        ("weights that no module tells of", {}, "align base --to one", "base is weights alone: which units they belong to is told by a module"),
        ("a recipe with a method that is none", {"r.yaml": "base: cls\nmethod: averaging\nalign: wieghts\ntasks: [cls2]\n"}, "merge r.yaml out", "(did you mean 'weights'?)"),
    ],
    "Curvature": [
        ("none for a task", {}, "merge --base base --task one --base-curvature 1 -o out", "gradient_matching needs a curvature"),
        ("none for the base", {}, "merge --base base --task one,curvature=one.safetensors -o out", "gradient_matching needs the base's curvature; pass --base-curvature"),
        ("no such file", {}, "merge --base base --task one,curvature=eno.safetensors --base-curvature 1 -o out", "no curvature file eno.safetensors"),
        ("weights in place of a curvature", {}, "merge --base base --task one,curvature=one/model.safetensors --base-curvature 1 -o out", "not a curvature file (no format_version and num_examples in its header)"),
        ("JSON in place of a curvature", {"p.safetensors": '{"products": [1, 2]}'}, "merge --base base --task one,curvature=p.safetensors --base-curvature 1 -o out", "p.safetensors: not a safetensors file but JSON text"),
        ("of other weights", {}, G.replace("curvature=one", "curvature=two"), "was taken at other weights than"),
        ("of another model", {}, G.replace("curvature=one", "curvature=odd"), "has shape [3] for 'layers.0.w', the model has [4, 4]; it belongs to another model"),
        ("negative", {}, "merge --base base --task one,curvature=one.safetensors --base-curvature -1 -o out", "base_curvature is -1"),
        ("of which a negative weight leaves nothing", {}, G.replace("one.safetensors ", "one.safetensors,weight=-50 ", 1), "is not positive"),
        ("without Gram matrices, for RegMean", {}, G + "--method regmean", "holds no gram matrices; estimate it with"),
        ("without Kronecker factors, for a rule that needs them", {}, G + "--method kronecker", "needs curvatures with Kronecker factors"),
    ],
    "Recipes": [
        ("no such file", {"r.yaml": ""}, "merge rr.yaml out", "no recipe rr.yaml (did you mean 'r.yaml'?)"),
        ("an empty file", {"r.yaml": ""}, "merge r.yaml out", "r.yaml holds nothing, a recipe is a table of keys"),
        ("no UTF-8", {"r.yaml": b"base: \xe9"}, "merge r.yaml out", "r.yaml is not YAML"),
        ("a folder", {}, "merge base out", "base is a folder, a recipe is a YAML file"),
        ("no YAML", {"r.yaml": "a: [1"}, "merge r.yaml out", "r.yaml is not YAML"),
        ("a key given twice", {"r.yaml": "base: a\nbase: b\n"}, "merge r.yaml out", "the key 'base' is given twice"),
        ("an unknown tag", {"r.yaml": "base: !!python/name:os.system\n"}, "merge r.yaml out", "could not determine a constructor for the tag"),
        ("several documents", {"r.yaml": "a: 1\n---\nb: 2\n"}, "merge r.yaml out", "holds 2 YAML documents"),
        ("no table", {"r.yaml": "- base\n"}, "merge r.yaml out", "a recipe is a table of keys"),
        ("no tasks", {"r.yaml": OURS}, "merge r.yaml out", "tasks is missing; a recipe needs `base: MODEL` and `tasks:`, a list"),
        ("an empty list of tasks", {"r.yaml": OURS + "tasks: []\n"}, "merge r.yaml out", "tasks is []; a recipe needs `base: MODEL` and `tasks:`, a list"),
        ("tasks that are no list", {"r.yaml": OURS + "tasks: one\n"}, "merge r.yaml out", "tasks is 'one'; a recipe needs"),
        ("a task that is none", {"r.yaml": OURS + "tasks: [3]\n"}, "merge r.yaml out", "tasks.0 is 3: "),
        ("a task without a model", {"r.yaml": OURS + "tasks: [{curvature: one}]\n"}, "merge r.yaml out", "tasks.0.model is missing; a recipe needs"),
        ("a task with an unknown key", {"r.yaml": OURS + "tasks: [{model: one, wieght: 1}]\n"}, "merge r.yaml out", "unknown key 'tasks.0.wieght' (did you mean 'weight'?)"),
        ("a task with an option", {"r.yaml": OURS + "tasks: [{model: one, density: 1}]\n"}, "merge r.yaml out", "'tasks.0.density' is an option of the method"),
        ("an unknown key", {"r.yaml": OURS + TASKS + "wieghts: auto\n"}, "merge r.yaml out", "unknown key 'wieghts' (did you mean 'weights'?)"),
        ("an option beside the keys", {"r.yaml": OURS + TASKS + "density: 1\n"}, "merge r.yaml out", "'density' is an option of the method or a transform: write options: {density: ...}"),
        ("a key among the options", {"r.yaml": OURS + TASKS + "options: {method: ties}\n"}, "merge r.yaml out", "'method' is no option of a method but a key"),
        ("a flag among the options", {"r.yaml": OURS + TASKS + "options: {overwrite: true}\n"}, "merge r.yaml out", "'overwrite' is no option of a method but a key"),
        ("a value of another kind", {"r.yaml": OURS + TASKS + "delta0: much\n"}, "merge r.yaml out", "delta0 is 'much': "),
        ("a mixture of experts (mergekit-moe)", {"r.yaml": "base_model: a\nexperts: []\n"}, "merge r.yaml out", "describes a mixture of experts, and no merge; `gradmatch mix r.yaml` makes it"),
        ("mergekit's, with an unknown method", {"r.yaml": "merge_method: slurp\nmodels: [{model: base}]\n"}, "merge r.yaml out", "merge_method 'slurp' is unknown here (did you mean 'slerp'?)"),
        ("mergekit's, with both models and slices", {"r.yaml": "merge_method: linear\nmodels: []\nslices: []\n"}, "merge r.yaml out", "give either models or slices"),
        ("mergekit's, with an unknown parameter", {"r.yaml": "merge_method: linear\nmodels: [{model: base, parameters: {wieght: 1}}]\n"}, "merge r.yaml out", "wieght"),
        ("mergekit's, without the base that the method needs", {"r.yaml": "merge_method: ties\nmodels: [{model: base, parameters: {weight: 1, density: 1}}]\n"}, "merge r.yaml out", "ties needs a base_model"),
        ("mergekit's, with neither models nor slices", {"r.yaml": "merge_method: ties\n"}, "merge r.yaml out", "give either models or slices"),
        ("mergekit's, with an entry that has no model", {"r.yaml": "merge_method: linear\nmodels: [{parameters: {weight: 1}}]\n"}, "merge r.yaml out", "an entry of models has no model"),
        ("mergekit's, with layers that are no pair", {"r.yaml": "merge_method: linear\nslices: [{sources: [{model: base, layer_range: [0]}]}]\n"}, "merge r.yaml out", "layer_range is [0]; it must be two whole numbers"),
        ("mergekit's, with layers that the model lacks", {"r.yaml": "merge_method: passthrough\nslices: [{sources: [{model: base, layer_range: [0, 9]}]}]\n"}, "merge r.yaml out", "it has 2, a range needs 0 <= first < last <= 2"),
        ("mergekit's, with several modules", {"r.yaml": "merge_method: linear\nmodules: {a: {models: []}, b: {models: []}}\n"}, "merge r.yaml out", "modules holds 2 modules; one is supported"),
        ("mergekit's, with a tokenizer of none of the models", {"r.yaml": "merge_method: linear\nmodels: [{model: base, parameters: {weight: 1}}]\ntokenizer_source: b\n"}, "merge r.yaml out", "tokenizer source 'b' is none of the models"),
        ("a remedy, with the recipe's own key", {"r.yaml": "base: base\nmethod: averaging\ntasks: [{model: short}]\n"}, "merge r.yaml out", "pass --missing base (in r.yaml: `missing: base`)"),
        ("weights to be chosen, and nothing to choose from", {"r.yaml": OURS + TASKS}, "merge r.yaml out --weights auto --dry-run", "--weights auto (in r.yaml: `weights: auto`) needs data"),
    ],
    "Removing": [
        ("nothing to subtract", {}, "subtract --base base", "nothing to subtract: give --base and at least one --task"),
        ("no output", {}, "subtract --base base --task one", "no output folder: name it with --out"),
        ("a negative weight", {}, S + "--weight -1", "at least 0 to subtract"),
        ("nothing to be kept", {}, S + "--keep 0", "keep is 0, it must lie in (0, 1]"),
        ("an option that is a flag", {}, S + "--option keep=1", "'keep' is no option of a method but a key (and flag)"),
        ("a budget of nothing", {}, B + "--nats 0", "--nats must be positive, got 0"),
        ("a share above one", {}, B + "--share 2", "--share must lie in [0, 1], got 2"),
        ("alphas that are negative", {}, B + "--alphas -1", "alphas must be finite and not negative"),
        ("a budget, and no alpha above 0", {}, B + "--nats 1 --alphas 0", "--alphas holds nothing above 0"),
        ("a damping of nothing", {}, GUARD + "--damping 0 --nats 1", "--damping must be positive, got 0"),
        ("a guard without the base's curvature", {}, "budget --base base --task one --method guarded --nats 1", "--method guarded needs --base-curvature"),
        ("an ascent of nothing", {}, "budget --base base --base-curvature base.safetensors --method ascent --nats 1", "ascent needs to know what is to go"),
        ("nats a token without data", {}, GUARD + "--nats-per-token 1", "are measured: give --retain"),
        ("data beside data of the same name", {}, GUARD + "--retain d.txt --beside d.txt --beside d.txt --nats 1", "names two of the data"),
        ("steps of another method than ascent", {}, S + "--method guarded --steps 2", "only ascent takes several"),
        ("four steps", {}, S + "--method ascent --steps 4", "a whole number from 1 to 3"),
        ("examples to remove, and no ascent", {}, S + "--remove d.txt", "--remove gives ascent its gradient: add --method ascent"),
        ("a task added by another method", {}, S + "--add one,curvature=one.safetensors,name=two", "in one call by --method guarded, not by removal"),
        ("a task added with a weight below 0", {}, S + "--method guarded --add one,curvature=one.safetensors,name=two,weight=-1", "needs one above 0"),
        ("one file to keep and to remove", {}, B + "--retain d.txt --remove d.txt", "--retain and --remove are the same file d.txt"),
        ("no folder for the report", {}, B + "--report no/r.json", "no folder for --report no/r.json"),
        ("a task without curvature", {}, "budget --base base --task one --base-curvature base.safetensors", "has no curvature"),
        ("a curvature that is not there", {}, "budget --base base --task one,curvature=eno.safetensors --base-curvature base.safetensors", "no curvature file eno.safetensors"),
        ("data that is not there", {}, B + "--retain absent.txt", "no data file absent.txt"),
        ("no examples", {}, B + "--examples 0", "--examples must be at least 1, got 0"),
        ("texts of one token", {}, B + "--max-length 1", "--max-length must be at least 2, got 1"),
        ("a floor below 0", {}, B + "--delta0 -1", "delta0 is -1"),
    ],
    "Estimating": [
        ("neither data nor an optimizer's state", {}, E, "give either --data (to measure) or --adam"),
        ("both of them, and nothing to calibrate", {}, E + "--data d.csv --adam o.pt", "give either --data (to measure) or --adam"),
        ("Adam's state, and no size of its training set", {}, E + "--adam o.pt --batch-size 8", "--adam needs --num-examples"),
        ("a calibration without data", {}, E + "--adam o.pt --num-examples 5 --calibrate 4", "--calibrate needs both --adam"),
        ("a tolerance where none is watched", {}, E + "--data d.csv --method kfac --tolerance 0.1", "tolerance is not available for --method kfac"),
        ("a gradient where none is taken", {}, E + "--data d.csv --method kfac --gradient", "gradient is not available for --method kfac"),
        ("factors of a whole model", {}, E + "--data d.csv --on factors", "cls is no adapter, whose factors could be measured"),
        ("a model that is not there", {}, "estimate cl -o c.safetensors --data d.csv", "no file or folder cl (did you mean 'cls'?)"),
        ("a file in place of a model", {}, "estimate cls/config.json -o c.safetensors --data d.csv", "is a file; name the folder that save_pretrained wrote"),
        ("a model of no kind that can be trained on", {"cls/config.json": '{"model_type": "bert"}'}, E + "--data d.csv", "is saved as no architecture: pass --task"),
        ("an output of another kind", {}, "estimate cls -o c.pt --data d.csv", "known by their ending; name it c.safetensors"),
        ("an output that is there", {"c.safetensors": ""}, E + "--data d.csv", "c.safetensors exists; pass --overwrite"),
        ("an output that is a folder", {"c.safetensors/x": ""}, E + "--data d.csv", "c.safetensors is a folder; name the file"),
        ("an unknown method", {}, E + "--data d.csv --method fischer", "unknown method 'fischer' (did you mean 'fisher'?)"),
        ("no samples", {}, E + "--data d.csv --samples 0", "--samples must be at least 1, got 0"),
        ("a tolerance that is none", {}, E + "--data d.csv --tolerance 2", "a relative error between 0 and 1"),
        ("squares of whole batches, where these are wrong", {}, E + "--data d.csv --method ggn --reduction batch", "is right only for"),
        ("Adam's state that is not there", {}, E + "--adam cls/optimizer.pt --num-examples 9 --batch-size 2", "no optimizer state at"),
        ("the state of SGD", {}, E + "--adam sgd.pt --num-examples 9 --batch-size 2", "sgd.pt: the optimizer's state has no exp_avg_sq for any parameter (it holds momentum_buffer): only Adam and AdamW have one, after a step; train with torch's own Adam or AdamW, or measure"),
        ("the state of Adafactor", {}, E + "--adam adafactor.pt --num-examples 9 --batch-size 2", "adafactor.pt: the state of parameter 0 is that of Adafactor, which keeps rows and columns of the squares; train with torch's own Adam or AdamW, or measure"),
        ("a state of 8 bits", {}, E + "--adam bits.pt --num-examples 9 --batch-size 2", "bits.pt: the state of parameter 0 is that of bitsandbytes, quantised to 8 bits"),
        ("a state that is none", {"optimizer.pt": "x"}, E + "--adam optimizer.pt --num-examples 9 --batch-size 2", "optimizer.pt cannot be read"),
    ],
    "Data": [
        ("no such file", {}, E + "--data dd.csv", "no data file dd.csv (did you mean 'd.csv'?)"),
        ("no such set of the hub", {}, E + "--data nobody/nothing", "no file nobody/nothing here, and no hub set of that name"),
        ("another kind of file", {"d.xml": "<a/>"}, E + "--data d.xml", "d.xml: unknown kind of file '.xml'"),
        ("an empty file", {"e.csv": ""}, E + "--data e.csv", "e.csv holds no rows: the file is empty"),
        ("columns without rows", {"e.csv": "text,label\n"}, E + "--data e.csv", "e.csv holds no rows"),
        ("rows without text", {"e.csv": "text,label\n,1\n"}, E + "--data e.csv", "e.csv holds no text"),
        ("lines without text", {"e.txt": "\n \n"}, E + "--data e.txt", "e.txt holds no text"),
        ("no text column", {"e.csv": "a,b\n1,2\n"}, E + "--data e.csv", "which column is the text? there are: a, b; name it: --text-column"),
        ("a column that is not there", {}, E + "--data d.csv --text-column txt", "no column 'txt' (did you mean 'text'?)"),
        ("a label column that is not there", {}, E + "--data d.csv --label-column stars", "no column 'stars'"),
        ("three text columns", {"e.csv": "a,b,c\n1,2,3\n"}, E + "--data e.csv --text-column a,b,c", "the text is one column, or two different ones of a pair"),
        ("numbers for texts", {"e.jsonl": '{"text": 5}\n'}, E + "--data e.jsonl", "row 0: column 'text' holds no text but 5"),
        ("lists for texts", {"e.jsonl": '{"text": ["a"]}\n'}, E + "--data e.jsonl", "holds no text but ['a']"),
        ("an archive that is none", {"e.csv.gz": "text\nx\n"}, E + "--data e.csv.gz", "cannot be read"),
        ("conversations, and no chat template", {"e.jsonl": '{"messages": [{"role": "user", "content": "hi"}]}'}, E + "--data e.jsonl", "e.jsonl, row 0: column 'messages' holds a conversation, and the model's tokenizer has no chat template to write it by; save it with one"),
        ("conversations in another form", {"e.jsonl": '{"conversations": [{"from": "human", "value": "hi"}]}'}, E + "--data e.jsonl", "holds a conversation whose turns have from, value; a turn has role and content; rename them"),
        ("a split of a file", {}, E + "--data d.csv --split test", "d.csv is one file, and one split: there is no 'test' in it"),
        ("no UTF-8", {"e.txt": b"caf\xe9\n"}, E + "--data e.txt", "e.txt is no UTF-8 text"),
        ("JSON that is cut", {"e.jsonl": '{"text": '}, E + "--data e.jsonl", "e.jsonl cannot be read"),
        ("rows of other lengths", {"e.csv": "text,label\na,1\nb,1,2\n"}, E + "--data e.csv", "e.csv cannot be read: Expected 2 fields in line 3, saw 3"),
        ("more fields than names", {"e.csv": "text,label\na,1,2\n"}, E + "--data e.csv", "e.csv cannot be read: Length of header"),
        ("a stray quotation mark", {"e.csv": 'text,label\n"a,1\nb,0\n"c,1\n'}, E + "--data e.csv", "e.csv cannot be read: ',' expected after"),
        ("a row without a label", {"e.csv": "text,label\na,1\nb,\n"}, E + "--data e.csv", "row 1: column 'label' holds no label, and so it is in 1 of 2 rows"),
        ("a word that is no class", {"e.csv": "text,label\na,clas1\n"}, E + "--data e.csv", "holds the unknown label 'clas1' (did you mean 'class1'?)"),
        ("a fraction for a class", {"e.csv": "text,label\na,0.5\n"}, E + "--data e.csv", "holds the label '0.5', which is no class's number"),
        ("a class that the model lacks", {"e.csv": "text,label\na,7\n"}, E + "--data e.csv", "holds the label '7'; the model has the classes 0 to 1"),
        ("no examples", {}, E + "--data d.csv --examples 0", "--examples must be at least 1, got 0"),
        ("no labels, where losses are measured", {"e.csv": "text\na\n"}, D + "--data t=e.csv", "e.csv has no labels, which BertForSequenceClassification needs"),
        ("data of no task", {}, D + "--data d.csv", "--data 'd.csv' is not TASK=FILE; the tasks are t"),
        ("data of another task", {}, D + "--data u=d.csv", "--data names a task 'u'; the tasks are t"),
        ("data of a task that is not there", {}, D + "--data t=nowhere.jsonl", "no data file nowhere.jsonl"),
    ],
    "Zoos": [
        ("no models", {}, "zoo inspect", "no models: name folders, or give --task MODEL"),
        ("a folder without a model", {"none/x.txt": "x"}, "zoo inspect none", "no model was found (none: holds no model); name folders with models"),
        ("a folder of broken models alone", {"many/a/model.safetensors": "short"}, "zoo inspect many", "no model was found (many/a: many/a/model.safetensors: not a safetensors file"),
        ("one model twice", {}, "zoo cluster one one", "one is given twice; each model is one of the zoo once"),
        ("a threshold that no cosine has", {}, "zoo cluster one two --threshold 95", "threshold is 95.0, it must lie in [-1, 1]"),
        ("task vectors of no base", {}, "zoo cluster one two --by task_vectors", "compares what models have added to a base; pass --base"),
        ("mismatches without curvatures", {}, "zoo cluster one two --by mismatch --base base", "one has no curvature file to forecast by"),
        ("a selection without a base", {}, "zoo select one two --data d.csv", "no base: name the model that they were fine-tuned from with --base"),
        ("a selection without a score", {}, "zoo select one two --base base", "a search needs one score: --data FILE with examples, or --tasks NAME"),
        ("two scores", {}, "zoo select one --base base --data d.csv --tasks arc_easy", "or --tasks NAME of lm-eval, not both"),
        ("no evaluations", {}, "zoo select cls2 --base cls --data d.csv --budget 0", "budget is 0, and a search needs at least one evaluation"),
        ("a log that is a text", {"log": "thesis\n"}, "zoo select cls2 --base cls --data d.csv --log log", "log, line 1: no line of a search's log; name another file"),
        ("models that cannot be merged", {}, "zoo select one --base cls --data d.csv", "no candidate has a score (one:"),
        ("a plan of nothing", {"z.yaml": "base: base\nmodels: [one]\nbudgt: 3\n"}, "zoo plan z.yaml", "z.yaml: unknown key 'budgt' (did you mean 'budget'?)"),
        ("a plan without a family", {"z.yaml": "base: base\nbudget: 1\nmethods: [linear]\n"}, "zoo run z.yaml out", "the plan has no family to merge"),
        ("a plan that is not there", {}, "zoo run PLAN.yaml out", "no file PLAN.yaml"),
        ("a server out of reach", {}, "zoo evolve cls cls2 --base cls --data d.csv --storage postgresql://me:secret@127.0.0.1:1/none", "cannot open the postgresql storage (OperationalError); PostgreSQL needs a server within reach and a driver"),
        ("no trials", {}, "zoo evolve cls2 --base cls --data d.csv --trials 0", "trials is 0; a search needs at least one"),
        ("one number to search", {}, "zoo evolve cls2 --base cls --data d.csv", "CMA-ES needs at least two numbers to search, and there is one"),
        ("bounds that are none", {}, "zoo evolve cls cls2 --base cls --data d.csv --search density=1", "--search 'density=1' is not OPTION=LOW:HIGH"),
        ("a start without weights", {"w.json": "{}"}, "zoo evolve cls cls2 --base cls --data d.csv --start w.json", "w.json holds no weights; give what `gradmatch zoo select --json` printed"),
        ("gradients that no file holds", {}, "zoo inspect --task one,curvature=one.safetensors --by gradients", "the curvature of one holds no gradient"),
    ],
    "Diagnosing and forecasting": [
        ("nothing to look at", {}, "diagnose", "nothing to look at: give a recipe, or --base and at least one --task"),
        ("nothing to forecast from", {}, "forecast --base cls --task cls2", "nothing to choose weights from"),
        ("products that are not there", {}, "forecast --base cls --task cls2 --products p.json", "no products file p.json"),
        ("products that are none", {"p.json": "[]"}, "forecast --base cls --task cls2 --products p.json", "p.json is no products file"),
        ("a recipe for groups of layers", {}, "forecast --base cls --task cls2 --write r.yaml --group x", "--write and --group do not go together"),
        ("a task that is called as the base is", {}, "diagnose --base cls --task cls2,name=base", "a task is called 'base', which is what the base model goes by here"),
        ("a group of layers that is not there", {}, "forecast --base cls --task cls2,name=t --data t=d.csv --group z", "no layer group 'z'; this model has"),
        ("products of another version", {"p.json": '{"format_version": 9, "products": []}'}, "forecast --base cls --task cls2 --products p.json", "format version 9"),
        ("inspecting nothing", {}, "inspect bse", "no file or folder bse (did you mean 'base'?)"),
    ],
}  # fmt: skip
ROWS = [row for rows in REFUSALS.values() for row in rows]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    import torch
    from safetensors.torch import save_file

    from gradmatch.estimators import Curvature
    from tests.gradmatch.tiny import save_classifier

    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    base = {f"layers.{layer}.w": torch.randn(4, 4) for layer in range(2)}
    models = {"base": base, "short": {"layers.0.w": base["layers.0.w"]}}
    models |= {
        name: {key: value + torch.randn(4, 4) for key, value in base.items()} for name in ("one", "two")
    }
    models["wide"] = {**base, "layers.0.w": torch.ones(4, 5)}
    models["nan"] = {**base, "layers.0.w": torch.full((4, 4), torch.nan)}
    models["inf"] = {**base, "layers.0.w": torch.tensor([torch.inf] + 15 * [0.0]).view(4, 4)}
    for name, tensors in models.items():
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
    for name in ("base", "one", "two"):
        module = torch.nn.ParameterDict({key.replace(".", "_"): value for key, value in models[name].items()})
        known = Curvature.from_dict(
            {key: torch.rand(4, 4) for key in base}, 10, info_of(models[name], module)
        )
        known.save(folder / f"{name}.safetensors")
    Curvature.from_dict({key: torch.ones(3) for key in base}, 10).save(folder / "odd.safetensors")
    for name, number in (("pair", 2), ("shards", 1)):
        (folder / name).mkdir()
        for shard in "ab"[:number]:
            shutil.copy(folder / "base" / "model.safetensors", folder / name / f"{shard}.safetensors")
    (folder / "lora").mkdir()
    factors = {f"base_model.model.layers.0.w.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
    save_file(factors, folder / "lora" / "adapter_model.safetensors")
    for name in ("cls", "cls2"):
        save_classifier(folder / name)
    held = {
        "sgd": {"momentum_buffer": 1},
        "adafactor": {"exp_avg_sq_row": 1},
        "bits": {"state1": 1, "qmap2": 1},
    }
    for name, entry in held.items():
        torch.save({"state": {0: entry}, "param_groups": [{"params": [0]}]}, folder / f"{name}.pt")
    (folder / "d.csv").write_text("text,label\ngood,1\nbad,0\n")
    (folder / "d.txt").write_text("good\nbad\n")
    return folder


def info_of(tensors, _):
    from gradmatch.estimators.fingerprint import fingerprint
    from gradmatch.models.opening import open_checkpoint

    return {"fingerprint": fingerprint(tensors, open_checkpoint(tensors).sample), "estimator": "fisher"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_what_is_refused(files, tmp_path, monkeypatch, capsys, row):
    from tests.command import run

    _, written, command, words = row
    shutil.copytree(files, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    for name, content in written.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert run(command) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert words in err, err
    assert err.startswith("gradmatch: error: ")
    assert len(err) < 1000


def page():
    """docs/refused.md."""
    lines = [
        "# What is refused, and what is said",
        "",
        "gradmatch does not guess: what it does not understand of a file, or what would give a wrong number, is refused with code 2 and",
        "one line that names the thing and what to do. Each row is run by `tests/test_refusals.py`, from which this page is written",
        "(`python tests/test_refusals.py`). In Python the same is a `gradmatch.GradmatchError`, a ValueError with `code`, `where` and `remedy`",
        "(or FileNotFoundError, FileExistsError, TypeError where these say it best).",
    ]
    for section, rows in REFUSALS.items():
        lines += ["", f"## {section}", "", "| given | command | said |", "|---|---|---|"]
        lines += [
            "| "
            + " | ".join(
                cell.replace("|", "\\|") for cell in (given, f"`gradmatch {command.strip()}`", words)
            )
            + " |"
            for given, _, command, words in rows
        ]
    lines += [
        "",
        "## Codes",
        "",
        "`code` is one of " + ", ".join(f"`{code}`" for code in sorted(set(codes()))) + ".",
    ]
    return "\n".join(lines) + "\n"


def codes():
    """Of every GradmatchError in the code."""
    for path in [*ROOT.glob("gradmatch/**/*.py"), *ROOT.glob("estimators/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and getattr(node.func, "id", "") == "GradmatchError"
                and len(node.args) > 1
                and isinstance(node.args[1], ast.Constant)  # elsewhere it hands on another error's
            ):
                yield node.args[1].value


def test_the_page_is_the_table():
    assert PAGE.read_text(encoding="utf-8") == page(), "python tests/test_refusals.py writes it anew"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE}", file=sys.stderr)
