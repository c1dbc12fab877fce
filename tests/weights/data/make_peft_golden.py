"""Write peft/ and peft.npz beside this file: LoRA as PEFT itself saves it, and what it makes of the weights.

Needs torch, transformers and peft (made with 2.13, 5.23 and 0.21.2).  peft.npz has, by Hugging Face name, "delta." +
what merging adds to a weight, and "whole." + a parameter that is trained as it is.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
MODEL = LlamaConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=20,
    attention_bias=True,
    tie_word_embeddings=False,
)
LORA = LoraConfig(
    task_type="CAUSAL_LM",
    r=4,
    lora_alpha=6,
    use_rslora=True,
    target_modules=["q_proj", "k_proj", "down_proj", "embed_tokens", "lm_head"],
    rank_pattern={"k_proj": 3, r"model\.layers\.[0-9]+\.mlp\.down_proj": 2},
    alpha_pattern={"layers.1.mlp.down_proj": 5},
    modules_to_save=["norm"],
    bias="lora_only",
)


def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(MODEL)
    model.name_or_path = "tiny/llama"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    peft = get_peft_model(model, LORA)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    peft.save_pretrained(HERE / "peft")
    (HERE / "peft" / "README.md").unlink(missing_ok=True)
    arrays = {}
    for name, value in peft.merge_and_unload().state_dict().items():
        if torch.equal(value, before[name]):
            continue
        if value.ndim == 1:
            arrays[f"whole.{name}"] = value.numpy()
        else:
            arrays[f"delta.{name}"] = (value - before[name]).numpy()
    np.savez_compressed(HERE / "peft.npz", **arrays)


if __name__ == "__main__":
    main()
