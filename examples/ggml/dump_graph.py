"""Write a small graph as a drawing: DOT, and SVG too where PyGraphviz is installed.

usage: python dump_graph.py [FILE.dot]
"""

from __future__ import annotations

import sys
from pathlib import Path

from pyggml_adapt.ggml import CGraph, Context, Type, ops


def block(ctx: Context, n_embd: int, n_ff: int, n_tokens: int) -> CGraph:
    """Return the graph of a feed-forward block with SwiGLU: names as llama.cpp has them."""
    cur = ctx.new_tensor(Type.F32, (n_embd, n_tokens), "inpL").set_input()
    up, gate = (ctx.new_tensor(Type.Q4_K, (n_embd, n_ff), f"blk.0.ffn_{name}.weight") for name in ("up", "gate"))
    down = ctx.new_tensor(Type.Q6_K, (n_ff, n_embd), "blk.0.ffn_down.weight")
    hidden = ops.swiglu_split(ctx, gate @ cur, up @ cur)
    hidden.name = "ffn_swiglu-0"
    out = down @ hidden + cur
    out.name = "l_out-0"
    graph = CGraph(ctx, 32)
    graph.expand(out)
    return graph


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "graph.dot")
    ctx = Context(Context.size_for(16, 32))
    graph = block(ctx, 256, 512, 7)
    graph.dump_dot(path)
    print(f"{path}: {graph.n_nodes} nodes")
    try:
        import pygraphviz  # its wheels bring Graphviz with them
    except ImportError:
        print("no SVG: that needs `pip install pygraphviz`")
        return
    svg = path.with_suffix(".svg")
    pygraphviz.AGraph(str(path)).draw(svg, prog="dot")
    print(f"{svg}: drawn")


if __name__ == "__main__":
    main()
