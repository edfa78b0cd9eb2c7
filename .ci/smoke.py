"""What a stranger does first with an installed gradmatch, in an empty folder: every name, every command's help, an estimate, a merge."""

import json
import os
import subprocess
import sys
import tarfile
import time
from importlib.metadata import files, version
from pathlib import Path

os.makedirs("estimators", exist_ok=True)  # a user's own folder of this name is in nobody's way
Path("estimators/__init__.py").write_text("raise SystemExit('the user\\'s own estimators were imported')\n")

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import gradmatch  # noqa: E402

assert "site-packages" in gradmatch.__file__, gradmatch.__file__
tops = {path.parts[0] for path in files("gradmatch") if not path.parts[0].startswith(("..", "gradmatch-"))}
assert tops == {"gradmatch"}, tops
for name in gradmatch.__all__:
    if name != "CurvatureCallback":  # what it stands on, accelerate, is of who trains
        getattr(gradmatch, name)
for name in gradmatch.estimators.__all__:
    if name != "CurvatureCallback":
        getattr(gradmatch.estimators, name)
with tarfile.open(sys.argv[1]) as sdist:
    held = {"/".join(name.split("/")[1:]) for name in sdist.getnames()}
wanted = {
    "Makefile",
    "constraints.txt",
    "mkdocs.yml",
    "CITATION.cff",
    "docs/site.py",
    "tests/oracle.py",
    "configs/demo.yaml",
}
assert wanted <= held, wanted - held


def run(*words, code=0):
    """What a command prints."""
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "gradmatch", *words], capture_output=True, text=True)
    assert done.returncode == code, (words, done.returncode, done.stderr)
    return done.stdout, time.monotonic() - begun


from gradmatch.cli import COMMANDS  # noqa: E402

slowest = max((run(command, "--help")[1], command) for command in COMMANDS)
assert version("gradmatch") in run("--version")[0]

model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
batches = [(torch.randn(16, 4), torch.randint(3, (16,)))]
for name in ("base", "a", "b"):
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.01 * torch.randn_like(value))
    save_file(dict(model.state_dict()), f"{name}.safetensors")
    gradmatch.estimate(model, batches).save(f"{name}-h.safetensors")
tasks = [word for name in "ab" for word in ("--task", f"{name}.safetensors,curvature={name}-h.safetensors")]
told, _ = run(
    "merge", "--base", "base.safetensors", "--base-curvature", "base-h.safetensors", *tasks, "-o", "out", "--overwrite",
    "--json", "--quiet",
)  # fmt: skip
assert json.loads(told)["report"]["method"] == "gradient_matching"
assert run("merge", "--base", "bas.safetensors", *tasks, "-o", "out2", code=2)[0] == ""
print(
    f"gradmatch {version('gradmatch')} on Python {sys.version.split()[0]}, torch {torch.__version__}: {len(gradmatch.__all__)} names, "
    f"{len(COMMANDS)} commands (slowest help: {slowest[1]}, {slowest[0]:.2f} s), an estimate and a merge"
)
