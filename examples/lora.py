"""LoRA adapters: merged in core space into an adapter again, and equal to the merge of the whole models."""

import copy
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from gradmatch import Task, merge

torch.manual_seed(0)
folder = Path(tempfile.mkdtemp())
sizes = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 32,
}
base = LlamaForCausalLM(LlamaConfig(**sizes))
base.save_pretrained(folder / "base")
for name, rank in (("a", 2), ("b", 4)):  # stands for training
    config = LoraConfig(
        r=rank, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapter = get_peft_model(copy.deepcopy(base), config)
    adapter.peft_config["default"].base_model_name_or_path = str(folder / "base")
    adapter.save_pretrained(folder / name)
tasks = [Task(folder / name, weight=0.5) for name in ("a", "b")]
merge(folder / "base", tasks, method="task_arithmetic", space="core", out=folder / "merged")
whole = merge(folder / "base", tasks, method="task_arithmetic")
loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), folder / "merged")
far = max(
    float((value - whole[name]).abs().max()) for name, value in loaded.merge_and_unload().state_dict().items()
)
print(f"the merged adapter and the merge of whole models differ by {far:.1g} at most")
assert far < 1e-5
