"""Measure the GGUF files with llama.cpp: exact answers on unseen prompts, and tensors changed.

pip install gguf==0.19.0 llama-cpp-python==0.3.36
python check.py -n 400
"""

import argparse
import re
from pathlib import Path

import gguf
import llama_cpp
import tasks

FILE_TYPES = ("f16", "q8_0")


def answers(path, words):
    """Return the greedy answer of the model at `path` to the prompt of each word."""
    llm = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, verbose=False)
    texts = []
    for word in words:
        ids = llm.tokenize(tasks.prompt(word).encode(), add_bos=True, special=False)
        llm.reset()
        out = []
        for token in llm.generate(ids, temp=0.0):
            if token == llm.token_eos() or len(out) == 2 * tasks.MAX_LETTERS:
                break
            out.append(token)
        texts.append(llm.detokenize(out).decode(errors="replace"))
    return texts


def accuracies(path, words):
    """Return per task the share of `words` that the model at `path` answers as that task."""
    pairs = list(zip(words, answers(path, words), strict=True))
    return {task: sum(tasks.is_right(task, word, text) for word, text in pairs) / len(words) for task in tasks.TASKS}


def tensors(path):
    """Return name -> (type, shape, bytes) of each tensor in the file."""
    reader = gguf.GGUFReader(path)
    return {t.name: (t.tensor_type, tuple(t.shape), t.data.tobytes()) for t in reader.tensors}


def changed(base, path):
    """Return the sorted names of the tensors in which `path` differs from the file `base`."""
    ours, theirs = tensors(base), tensors(path)
    if ours.keys() != theirs.keys():
        raise ValueError(f"{path}: tensor names differ from those of {base}")
    return sorted(name for name in ours if ours[name] != theirs[name])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-d", "--dir", type=Path, default=Path(__file__).parent)
    parser.add_argument("-n", "--n-words", type=int, default=400)
    args = parser.parse_args()
    words = tasks.unseen_words(args.n_words)
    print("| model | type | " + " | ".join(tasks.TASKS) + " |")
    print("| --- " * (2 + len(tasks.TASKS)) + "|")
    for file_type in FILE_TYPES:
        for task in tasks.TASKS:
            got = accuracies(args.dir / f"tiny-{task}-{file_type}.gguf", words)
            cells = " | ".join(f"{100 * got[t]:.1f} %" for t in tasks.TASKS)
            print(f"| {task} | {file_type} | {cells} |", flush=True)
    for file_type in FILE_TYPES:
        base = args.dir / f"tiny-base-{file_type}.gguf"
        for task in tasks.TASKS[1:]:
            names = changed(base, args.dir / f"tiny-{task}-{file_type}.gguf")
            short = sorted({re.sub(r"^blk\.\d+", "blk.N", name) for name in names})
            print(f"{task} {file_type}: {len(names)} tensors differ: {' '.join(short)}")


if __name__ == "__main__":
    main()
