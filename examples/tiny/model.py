"""A llama in PyTorch whose parameters carry their GGUF names and need no permutation."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class HParams:
    """Sizes under llama.cpp's names; every row length is a multiple of a Q8_0 block (32)."""

    n_vocab: int
    n_embd: int = 96
    n_layer: int = 6
    n_head: int = 3
    n_head_kv: int = 1
    n_ff: int = 128
    n_ctx_train: int = 256
    f_norm_rms_eps: float = 1e-5
    rope_freq_base: float = 10000.0

    @property
    def n_embd_head(self):
        return self.n_embd // self.n_head


class Norm(nn.Module):
    def __init__(self, n_embd, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rope_tables(hp, n_tokens):
    """Return cos and sin as [n_tokens, n_embd_head / 2]."""
    freqs = hp.rope_freq_base ** (-torch.arange(0, hp.n_embd_head, 2) / hp.n_embd_head)
    angles = torch.arange(n_tokens)[:, None] * freqs
    return angles.cos(), angles.sin()


def rope(x, cos, sin):
    """Rotate adjacent pairs of x [..., n_tokens, n_embd_head]: ggml's rope type NORM."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class Layer(nn.Module):
    def __init__(self, hp):
        super().__init__()
        self.hp = hp
        n_q, n_kv = hp.n_head * hp.n_embd_head, hp.n_head_kv * hp.n_embd_head
        self.attn_norm = Norm(hp.n_embd, hp.f_norm_rms_eps)
        self.attn_q = nn.Linear(hp.n_embd, n_q, bias=False)
        self.attn_k = nn.Linear(hp.n_embd, n_kv, bias=False)
        self.attn_v = nn.Linear(hp.n_embd, n_kv, bias=False)
        self.attn_output = nn.Linear(n_q, hp.n_embd, bias=False)
        self.ffn_norm = Norm(hp.n_embd, hp.f_norm_rms_eps)
        self.ffn_gate = nn.Linear(hp.n_embd, hp.n_ff, bias=False)
        self.ffn_up = nn.Linear(hp.n_embd, hp.n_ff, bias=False)
        self.ffn_down = nn.Linear(hp.n_ff, hp.n_embd, bias=False)

    def heads(self, x, n_head):
        """Return x as [n_batch, n_head, n_tokens, n_embd_head]."""
        return x.unflatten(-1, (n_head, self.hp.n_embd_head)).transpose(1, 2)

    def forward(self, x, cos, sin):
        cur = self.attn_norm(x)
        q = rope(self.heads(self.attn_q(cur), self.hp.n_head), cos, sin)
        k = rope(self.heads(self.attn_k(cur), self.hp.n_head_kv), cos, sin)
        v = self.heads(self.attn_v(cur), self.hp.n_head_kv)
        cur = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.attn_output(cur.transpose(1, 2).flatten(-2))
        cur = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(cur)) * self.ffn_up(cur))


class Llama(nn.Module):
    def __init__(self, hp):
        super().__init__()
        self.hp = hp
        self.token_embd = nn.Embedding(hp.n_vocab, hp.n_embd)
        self.blk = nn.ModuleList(Layer(hp) for _ in range(hp.n_layer))
        self.output_norm = Norm(hp.n_embd, hp.f_norm_rms_eps)
        self.output = nn.Linear(hp.n_embd, hp.n_vocab, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                deep = name.endswith(("attn_output.weight", "ffn_down.weight"))
                nn.init.normal_(weight, std=0.1 / (2 * hp.n_layer) ** 0.5 if deep else 0.1)

    def forward(self, ids):
        """Return logits [n_batch, n_tokens, n_vocab] for ids [n_batch, n_tokens]."""
        cos, sin = rope_tables(self.hp, ids.shape[1])
        x = self.token_embd(ids)
        for layer in self.blk:
            x = layer(x, cos, sin)
        return self.output(self.output_norm(x))
