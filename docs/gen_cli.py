"""Write docs/reference/cli.md from --help, and docs/reference/supported-architectures.md from the registry.

Usage: python docs/gen_cli.py   (the package must be installed)
"""

from __future__ import annotations

import argparse
import inspect
import os
import textwrap
from pathlib import Path

os.environ["COLUMNS"] = "100"  # argparse folds its help to this width

from pyggml_adapt.cli.main import parser
from pyggml_adapt.models import architectures, model_class
from pyggml_adapt.text.pre_tokenizers import PRE_TOKENIZERS

HERE = Path(__file__).parent / "reference"
CLI = """# Commands

Written by `docs/gen_cli.py` from `--help`. Conventions that all commands share, such as exit statuses, are in the
[guide](../guide/command-line.md).

"""
ARCHITECTURES = """# Supported architectures

Written by `docs/gen_cli.py`. A model's architecture is its key `general.architecture`; `pyggml-adapt inspect` shows it.
Files of any architecture can be split, merged, verified and linked; to run, it must be one of these.

| architecture | models | source |
| --- | --- | --- |
"""
NOTES = """
## Of all of them

- an output head of its own or tied to `token_embd`, and optional biases, where llama.cpp has these too; Q, K and V in
  three weights or in one
- grouped-query attention; RoPE with linear and YaRN scaling; `rope_freqs` and LongRoPE's factors where llama.cpp reads
  them
- sliding windows, of which the KV cache keeps no more than it needs
- weights of F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K to Q6_K, IQ4_NL, IQ4_XS and MXFP4, in any mixture
- logits equal to llama.cpp's of the same commit bit for bit, on the CPU, with flash attention and without
- adaptors of whole tensors and of low-rank pairs
- tokenizers: SentencePiece (`tokenizer.ggml.model` = `llama`, Gemma's too) and byte-level BPE (`gpt2`) with the
  pre-tokenizers below, token for token llama.cpp's; with another one a model runs on token ids. Unigram and WordPiece
  belong to none of these architectures

Two choices of llama.cpp's are kept, since results are compared with it: `phi3` attends to all tokens though its files
name a sliding window, and layers that predict further tokens (`nextn`, in `glm4moe` and `exaone4`) are kept in the
files but not computed.

A model that needs more is refused with the name of the key or tensor: sizes that differ from layer to layer in other
architectures than `deci`, groups of experts, positions in sections (multimodal GLM 4 and Hunyuan), deep stacks
(Granite), experts in every n-th layer only (ERNIE 4.5), and `llama4` without chunks.
"""
PRE_TOKENIZER_NOTES = """
## Pre-tokenizers

The values of `tokenizer.ggml.pre` that are known. Without the key words are cut as by `default`, with a warning.

"""


def cli() -> str:
    """Return the page of all commands."""
    top = parser()
    (commands,) = (action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    page = CLI + f"```\n{top.format_help()}```\n"
    for name, command in commands.choices.items():
        page += f"\n## {name}\n\n```\n{command.format_help()}```\n"
    return page


def supported() -> str:
    """Return the page of all architectures, from the first paragraph and the `Source:` line of each model file."""
    page = ARCHITECTURES
    for name in architectures():
        doc = inspect.getmodule(model_class(name)).__doc__ or ""
        first, _, rest = doc.strip().partition("\n")
        source = rest.partition("Source:")[2].strip().replace("\n", " ")
        page += f"| `{name}` | {first} | {source} |\n"
    names = textwrap.fill(", ".join(f"`{name}`" for name in sorted(PRE_TOKENIZERS)) + ".", 119, break_on_hyphens=False)
    return page + NOTES + PRE_TOKENIZER_NOTES + names + "\n"


def main() -> None:
    """Write both pages."""
    (HERE / "cli.md").write_text(cli(), encoding="utf-8")
    (HERE / "supported-architectures.md").write_text(supported(), encoding="utf-8")


if __name__ == "__main__":
    main()
