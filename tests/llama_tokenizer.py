"""llama.cpp's tokenizer functions, random text to compare with them, and vocabularies in which words show."""

import ctypes
import random

import pytest

from pyggml_adapt.ggml import GGUFReader, GGUFWriter
from pyggml_adapt.text.bpe import CHAR_OF_BYTE

RANGES = (
    (0, 0x20), (0x20, 0x7F), (0x20, 0x7F), (0x80, 0x250), (0x300, 0x370), (0x370, 0x780), (0x900, 0xE80),
    (0x1100, 0x1200), (0x1C80, 0x1CC0), (0x2000, 0x2070), (0x2070, 0x2C00), (0x3000, 0x3100), (0x4E00, 0xA000),
    (0xAC00, 0xD7A4), (0xE000, 0xFE10), (0xFE10, 0x10000), (0x10000, 0x14700), (0x16000, 0x19000), (0x1D000, 0x1F000),
    (0x1F000, 0x1FB00), (0x20000, 0x33480), (0xE0000, 0xE01F0), (0x10FF00, 0x110000),
)  # fmt: skip
WORDS = (
    "Hello", " world", " the", "it's", "I'LL", "'Re", "don't", "naïve", "Straße", "Привет", "世界", "안녕하세요",
    "مرحبا", "नमस्ते", "▁", "▁▁", "<0x0A>", "<unk>", "<s>", "...", "3.14159", "1234567", "²Ⅷ٣½", "İſK",
    "👍🏽", "👨‍👩‍👧", "🇩🇪", "1️⃣",
    " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\x85", "\u2028", "\u200b", "e\u0301",
    "camelCase", "HTTPServer", "ÄÖüß", "a/b//\n", "$x+=1;", "`(a|b)`", "。、！", "“”…", "ひらカタ", "ㄅㄆ", "ㄱㄴ",
    "ไทย", "شلونك؟", "עברית", "ก็", "ἀρχή", "豈", "IMGIMGABZ", "<sentinel:12>", " 12345 ", "'S's", "/\n/", "?!\r\n\r\n",
)  # fmt: skip


def random_text(rng, special=()):
    """Return words, runs of one character, random characters and special tokens, some cut short."""
    out = []
    for _ in range(rng.randrange(12)):
        kind = rng.random()
        if kind < 0.4:
            out.append(rng.choice(WORDS))
        elif kind < 0.5:
            out.append(rng.choice(" \n.ae=-'7") * rng.randrange(30))
        elif kind < 0.7 and special:
            text = rng.choice(special)
            out.append(text if kind < 0.65 else text[: rng.randrange(len(text))])
        else:
            low, high = rng.choice(RANGES)
            out.append("".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(8))))
    return "".join(out)


def pair_vocabulary(n_pairs=65536):
    """Return tokens, types and merges: bytes, pairs of bytes in random order, pairs of pairs, special tokens.

    A word rarely comes apart at the same places as its parts, so that a border of a word at the wrong place shows.
    """
    rng = random.Random(7)
    chars = list(CHAR_OF_BYTE.values())
    pairs = [(a, b) for a in chars for b in chars]
    rng.shuffle(pairs)
    merges = pairs[:n_pairs]
    merges += [("".join(rng.choice(pairs)), "".join(rng.choice(pairs))) for _ in range(n_pairs // 16)]
    tokens = dict.fromkeys(chars)
    for left, right in merges:
        tokens |= {left: None, right: None, left + right: None}
    words = dict.fromkeys(w for w in ("Ġworld", "Hello", "123", "Ċ") if w not in tokens)  # no merges give the first two
    special = {"<|im_start|>": 3, "<|im_end|>": 3, "<unk>": 2, "<tool>": 4, "  <u> ": 4}
    texts = [*tokens, *words, *special]
    types = [1] * (len(tokens) + len(words)) + list(special.values())
    return texts, types, [f"{left} {right}" for left, right in dict.fromkeys(merges)]


def write_vocab(path, tokens, types, merges, pre=None, **keys):
    """Write a GGUF file of a byte-level vocabulary alone; keys: name -> (value, type)."""
    writer = GGUFWriter()
    writer.set("general.architecture", "llama", "str")
    writer.set("tokenizer.ggml.model", "gpt2", "str")
    if pre is not None:
        writer.set("tokenizer.ggml.pre", pre, "str")
    writer.set("tokenizer.ggml.tokens", tokens, "str")
    writer.set("tokenizer.ggml.token_type", types, "i32")
    writer.set("tokenizer.ggml.merges", merges, "str")
    for key, (value, kind) in keys.items():
        writer.set(f"tokenizer.ggml.{key}", value, kind)
    writer.write(path, {}, overwrite=True)


def write_gemma_vocab(path, gemma4_path):
    """Write a vocabulary like Gemma 3's: Gemma 4's tokens by SentencePiece; return how many are user-defined.

    Those are runs of line ends and of spaces, and HTML tags; a text gets no space before it.
    """
    with GGUFReader(gemma4_path) as reader:
        tokens = list(reader.metadata["tokenizer.ggml.tokens"])
        types = [int(kind) for kind in reader.metadata["tokenizer.ggml.token_type"]]
    for i, text in enumerate(tokens):
        is_run = set(text) == {"\n"} or (set(text) == {"▁"} and len(text) > 1)
        if types[i] == 1 and (is_run or (len(text) > 2 and text[0] + text[-1] == "<>")):
            types[i] = 4
            tokens[i] = text.replace("▁", " ")
    writer = GGUFWriter()
    writer.set("general.architecture", "gemma3", "str")
    writer.set("tokenizer.ggml.model", "llama", "str")
    writer.set("tokenizer.ggml.tokens", tokens, "str")
    writer.set("tokenizer.ggml.token_type", types, "i32")
    writer.set("tokenizer.ggml.scores", [-float(i) for i in range(len(tokens))], "f32")
    writer.set("tokenizer.ggml.bos_token_id", 2, "u32")
    writer.set("tokenizer.ggml.eos_token_id", 1, "u32")
    writer.set("tokenizer.ggml.add_space_prefix", False, "bool")
    writer.write(path, {})
    return types.count(4)


class Reference:
    """llama.cpp's tokenizer functions on one GGUF file."""

    def __init__(self, path):
        self.lib = pytest.importorskip("llama_cpp")
        params = self.lib.llama_model_default_params()
        params.vocab_only = True
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, f"llama.cpp does not load {path}"
        self.vocab = self.lib.llama_model_get_vocab(self.model)

    def close(self):
        self.lib.llama_model_free(self.model)

    def encode(self, text, add_special, parse_special):
        data = text.encode()
        out = (self.lib.llama_token * (len(data) + 16))()
        n = self.lib.llama_tokenize(self.vocab, data, len(data), out, len(out), add_special, parse_special)
        return out[:n]

    def decode(self, ids, remove_special, unparse_special):
        tokens = (self.lib.llama_token * len(ids))(*ids)
        out = ctypes.create_string_buffer(256 * (len(ids) + 1))
        n = self.lib.llama_detokenize(self.vocab, tokens, len(ids), out, len(out), remove_special, unparse_special)
        return out.raw[:n].decode(errors="replace")

    def piece(self, token, special):
        out = ctypes.create_string_buffer(512)
        n = self.lib.llama_token_to_piece(self.vocab, token, out, len(out), 0, special)
        return out.raw[:n]

    def id(self, name):
        id = getattr(self.lib, f"llama_vocab_{name}")(self.vocab)
        return None if id < 0 else id


def assert_equal(tok, ref, text):
    """Assert that text gives the same ids, and these the same text, with both values of every option."""
    for add, parse in ((False, False), (True, True), (True, False), (False, True)):
        ids = tok.encode(text, add_special=add, parse_special=parse)
        assert ids == ref.encode(text, add, parse), (text, add, parse)
    for remove, unparse in ((False, False), (True, True)):
        assert tok.decode(ids, remove_special=remove, unparse_special=unparse) == ref.decode(ids, remove, unparse), ids
