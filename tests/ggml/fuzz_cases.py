"""Cases for fuzz_ops.py: what an op could be called with, from its stub and its docstring, right or wrong on purpose.

A case is plain JSON, so that it can be written down before it runs and run again:
leaves: type, ne and place of each, and `param`, true for a parameter; steps: op and arguments, each a tensor by its
number (leaves first, then what the steps gave), a number, a list, None, a function, or a Context.
"""

from __future__ import annotations

import ast
import math
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fuzz_valid

from pyggml_adapt.ggml import Type, enums, ops

Case = dict[str, Any]

TYPES = [each.name for each in Type]
SMALL = (1, 1, 2, 2, 3, 4, 4, 4, 5, 7, 8, 8)
ROWS = (32, 33, 64, 256, 512)
HUGE = (2**15 + 1, 2**31 - 1, 2**31, 2**32 + 1, 2**40, 2**62)
INTS = (*range(-3, 10), 16, 31, 32, 64, 2**15, -(2**31), *HUGE, 2**63 - 1, 2**63, -(2**63), 2**64)
TAME = (*range(5), 2, 4, 8, 16)
SIZES = {"F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I64": 8, "F64": 8, "I8": 1, "I16": 2}
TAME_FLOATS = (0.0, 1.0, 1.0, 0.5, 1e-5, 8.0, 1e4)
FLOATS = (0.0, 1.0, -1.0, 0.5, 1e-5, 8.0, 1e4, 1e-40, 3e38, -3e38, 1e300, math.nan, math.inf, -math.inf)
PLACES = ("graph",) * 8 + ("buffer", "readonly", "foreign", "foreign", "bare", "foreign bare")
COUNTS = (0, 1, 2, 3, 3, 4, 4, 4, 5)
WRONG: tuple[Any, ...] = ({"none": 1}, {"n": 3}, {"s": "x"}, {"l": []}, {"c": "closed"}, {"f": "nothing"})
FUNCTIONS = ("nothing", "raise", "write", "number")


@dataclass
class Parameter:
    """One parameter of an op: what stub and docstring say of it."""

    name: str
    kind: str  # the annotation
    default: bool = False
    star: bool = False
    dims: list[str] = field(default_factory=list)
    types: list[str] = field(default_factory=list)
    values: list[int] = field(default_factory=list)  # of the enum that it is one of


def stubs() -> dict[str, ast.FunctionDef]:
    """Return the stub of every op."""
    found = {}
    for path in sorted(Path(ops.__file__).parent.glob("*.pyi")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                found[node.name] = node
    return found


def signatures() -> dict[str, list[Parameter]]:
    """Return the parameters of every op of pyggml_adapt.ggml.ops."""
    known, found = stubs(), {}
    for name in sorted(vars(ops)):
        op = getattr(ops, name)
        if name.startswith("_") or not callable(op):
            continue
        if name not in known:
            raise SystemExit(f"ops.{name} is in no stub")
        args = known[name].args
        plain = [*args.args, *args.kwonlyargs]
        n_required = len(args.args) - len(args.defaults)
        found[name] = [
            Parameter(each.arg, ast.unparse(each.annotation) if each.annotation else "Any", i >= n_required)
            for i, each in enumerate(plain)
        ]
        if args.vararg:
            found[name].append(Parameter(args.vararg.arg, "int", star=True))
        describe(found[name], op.__doc__ or "")
    for name, parameters in found.items():
        inherit(name, parameters, found)
    return found


def mentioned(name: str, ops_by_name: Any) -> list[str]:
    """Return the other ops that the docstring of an op names, and those whose name its own begins with."""
    words = re.findall(r"\w+", getattr(ops, name).__doc__ or "")
    return [each for each in ops_by_name if each != name and (each in words or name.startswith(each))]


def inherit(name: str, parameters: list[Parameter], known: dict[str, list[Parameter]]) -> None:
    """Take what the docstring does not say from the ops that it refers to, as `Raises: as rope_ext` does."""
    for other in sorted(mentioned(name, known), key=len, reverse=True):
        theirs = {each.name: each for each in known[other]}
        for each in parameters:
            if each.name in theirs and not (each.dims or each.types or each.values):
                same = theirs[each.name]
                each.dims, each.types, each.values = same.dims, same.types, same.values


def describe(parameters: list[Parameter], doc: str) -> None:
    """Note the shapes and types that the docstring gives, as in `b: F32 [k, n_ids or 1, n_tokens]`."""
    text = " ".join(doc.split())
    heads = list(re.finditer(r"(?<![\w.])((?:\w+, )*\w+): (?=\S)", text))
    for head, after in zip(heads, [*heads[1:], None], strict=True):
        said = text[head.end() : after.start() if after else len(text)]
        dims = re.search(r"\[([^\]]+)\]", said)
        for each in parameters:
            if each.name in head[1].split(", ") or each.name.rstrip("_") in head[1].split(", "):
                each.dims = [dim.strip() for dim in dims[1].split(",")] if dims else []
                words = re.findall(r"\w+", said)
                each.types = [word for word in words if word in Type.__members__]
                named = [vars(enums)[word] for word in words if hasattr(vars(enums).get(word), "__members__")]
                each.values = [int(value) for enum in named if enum is not Type for value in enum]


def block(type: str) -> int:
    """Return the elements of a block, 256 for a type that packs as many."""
    if type in ("F32", "F16", "BF16", "F64") or (type.startswith("I") and not type.startswith("IQ")):
        return 1
    return 32 if type in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q8_1", "IQ4_NL", "MXFP4") else 256


class Maker:
    """Makes the cases of one seed; remembers calls that were accepted, and changes one thing in them."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.signatures = signatures()
        self.names = sorted(self.signatures)
        self.accepted: dict[str, list[Case]] = {}

    def chance(self, p: float) -> bool:
        """Return True with probability p."""
        return self.random.random() < p

    def remember(self, case: Case) -> None:
        """Keep a case whose last step was accepted, to be changed later."""
        kept = self.accepted.setdefault(case["steps"][-1]["op"], [])
        if len(kept) < 20:
            kept.append(case)
        else:
            kept[self.random.randrange(20)] = case

    def make(self, i: int) -> Case:
        """Return case i: ops take turns."""
        name = self.names[i % len(self.names)]
        known = self.accepted.get(name)
        if known and self.chance(0.5):
            case = self.changed(self.random.choice(known))
        else:
            case = self.valid(name) if name in fuzz_valid.CALLS and self.chance(0.7) else None
            if case is None:
                case = {"leaves": [], "steps": []}
                self.call(case, name)
            elif self.chance(0.4):
                case = self.changed(case)
        args = case["steps"][-1]["args"]
        if args and self.chance(0.12):  # some ops take whatever fits their stub
            args[self.random.randrange(len(args))] = self.random.choice(WRONG)
        while len(case["steps"]) < 6 and self.chance(0.3):  # others go on with what this one gives
            numbers = [*range(len(case["leaves"])), *range(1000, 1000 + len(case["steps"]))]
            self.call(case, self.random.choice(self.names), self.random.choice(numbers))
        case["threads"] = self.random.choice((1, 2))
        case["fill"] = self.random.choice(("normal", "normal", "small", "small", "zeros", "special", "bytes"))
        case["end"] = self.random.choice(("gallocr",) * 8 + ("sched", "close", "empty"))
        case["seed"] = self.random.randrange(2**31)
        return case

    def valid(self, name: str) -> Case:
        """Return a call of the op as fuzz_valid.py has it, with leaves that can be computed with, most of the time."""
        case: Case = {"leaves": [], "steps": []}

        def call(name: str) -> Any:
            args = fuzz_valid.CALLS[name](draw)
            context = [{"c": "own"}] if self.signatures[name][0].kind.startswith("Context") else []
            case["steps"].append({"op": name, "args": [*context, *args]})
            return {"t": 1000 + len(case["steps"]) - 1}

        def add(type: str, ne: list[int], is_param: bool) -> int:
            place = self.random.choice(PLACES) if self.chance(0.1) else "graph"
            case["leaves"].append({"type": type, "ne": ne, "place": place, "param": is_param})
            return len(case["leaves"]) - 1

        draw = fuzz_valid.Draw(self.random, add, call)
        call(name)
        return case

    def changed(self, case: Case) -> Case:
        """Return a copy of the case with one thing changed."""
        new: Case = {
            "leaves": [dict(leaf, ne=list(leaf["ne"])) for leaf in case["leaves"]],
            "steps": [dict(step, args=list(step["args"])) for step in case["steps"]],
        }
        leaf = self.random.choice(new["leaves"]) if new["leaves"] else None
        step = self.random.choice(new["steps"])
        what = self.random.choice(("ne", "ne", "type", "place", "argument", "argument", "nothing"))
        if what == "ne" and leaf:
            k = self.random.randrange(len(leaf["ne"]))
            leaf["ne"][k] = self.random.choice((0, leaf["ne"][k] * 2, leaf["ne"][k] + 1, self.dim(), *ROWS, *HUGE))
        elif what == "type" and leaf:
            leaf["type"] = self.random.choice(TYPES)
        elif what == "place" and leaf:
            leaf["place"] = self.random.choice(PLACES)
        elif what == "argument":
            parameters = self.signatures[step["op"]]
            k = self.random.randrange(len(step["args"])) if step["args"] else 0
            if k < min(len(parameters), len(step["args"])) and "t" not in step["args"][k]:
                step["args"][k] = self.number(
                    parameters[k], {"tame": self.chance(0.3), "shape": leaf["ne"] if leaf else [1]}
                )
        return new

    def dim(self) -> int:
        """Return a size: mostly small."""
        if self.chance(0.02):
            return 0
        if self.chance(0.01):
            return self.random.choice(HUGE)
        return self.random.choice(ROWS if self.chance(0.15) else SMALL)

    def call(self, case: Case, name: str, tensor: int | None = None) -> None:
        """Add a call of the op, and leaves for it; `tensor` becomes one of its operands."""
        parameters = self.signatures[name]
        if not parameters[0].kind.startswith("Context") and tensor is None:  # an op on another's result
            others = mentioned(name, self.signatures)
            if others and self.chance(0.9):
                self.call(case, self.random.choice(others))
                tensor = 1000 + len(case["steps"]) - 1
        symbols: dict[str, Any] = {"": self.dim()} if self.chance(0.3) else {}
        symbols["tame"] = self.chance(0.8)
        symbols["shape"] = [self.dim() for _ in range(self.random.choice((1, 2, 2, 3, 4)))]
        symbols["more"] = [self.dim() for _ in range(self.random.choice((0, 0, 1, 2)))]
        args = []
        wrong = self.random.randrange(len(parameters)) if self.chance(0.25) else -1
        taken = self.random.choice([i for i, p in enumerate(parameters) if "Tensor" in p.kind] or [-1])
        for i, each in enumerate(parameters):
            if each.default and self.chance(0.4):
                break
            if each.star:
                known = case["leaves"][-1]["ne"] if case["leaves"] and self.chance(0.7) else [self.dim()]
                args += [{"n": n} for n in self.random.sample(known, len(known))]
            elif i == taken and tensor is not None:
                args.append({"t": tensor})
            else:
                args.append(self.argument(case, each, symbols, i == wrong))
        if self.chance(0.02):
            args = args[:-1] if self.chance(0.5) else [*args, {"n": 1}]
        case["steps"].append({"op": name, "args": args})

    def argument(self, case: Case, parameter: Parameter, symbols: dict[str, Any], wrong: bool) -> Any:
        """Return one argument, adding the leaf that it is, if it is a tensor."""
        if wrong and self.chance(0.1):
            return self.random.choice(WRONG)
        if parameter.kind.startswith("Context"):
            return {"c": "closed" if self.chance(0.01) else "foreign" if self.chance(0.02) else "own"}
        if re.search(r"(Sequence|Iterable|list)\[Tensor", parameter.kind):
            return {"l": [self.tensor(case, parameter, symbols, wrong) for _ in range(self.random.randrange(5))]}
        if "Tensor" in parameter.kind:
            if "None" in parameter.kind and self.chance(0.5):
                return {"none": 1}
            return self.tensor(case, parameter, symbols, wrong)
        return self.number(parameter, symbols)

    def number(self, parameter: Parameter, symbols: dict[str, Any]) -> Any:
        """Return an argument that is no tensor."""
        kind, tame = parameter.kind, symbols["tame"]
        if "Callable" in kind:
            return {"f": self.random.choice(FUNCTIONS)}
        if "float" in kind or "Any" in kind:
            return {"n": self.random.choice(TAME_FLOATS if tame else FLOATS)}
        if "Sequence" in kind or "tuple" in kind or "list" in kind:
            given = (
                symbols["shape"]
                if self.chance(0.3)
                else [self.integer(tame) for _ in range(self.random.choice(COUNTS))]
            )
            return {"l": [{"n": n} for n in given]}
        if "bool" in kind:
            return {"n": self.random.choice((0, 1))}
        values = [int(v) for name in kind.split(" | ") for v in vars(enums).get(name, ())] or parameter.values
        if values:
            return {"n": self.random.choice(values) if tame or self.chance(0.7) else 999}
        if parameter.name in symbols and self.chance(0.8):
            return {"n": symbols[parameter.name]}
        symbols[parameter.name] = self.integer(tame)
        return {"n": symbols[parameter.name]}

    def integer(self, tame: bool) -> int:
        """Return a number: a small one if it shall be tame."""
        return self.random.choice(TAME if tame or self.chance(0.5) else INTS)

    def tensor(self, case: Case, parameter: Parameter, symbols: dict[str, Any], wrong: bool) -> Any:
        """Return a tensor argument: a leaf as the docstring has it, or a view of a larger or permuted one."""
        ne = [self.size(dim, symbols) for dim in parameter.dims if dim != "..."]
        if "..." in parameter.dims:
            ne = (ne + symbols["more"])[:4]
        ne = ne or list(symbols["shape"])
        type = self.random.choice(parameter.types) if parameter.types else "F32" if self.chance(0.8) else None
        if wrong and self.chance(0.5):
            type = None
        elif wrong:
            k = self.random.randrange(len(ne))
            ne[k] = self.random.choice((0, ne[k] + 1, *HUGE, 256))
        type = type or self.random.choice(TYPES)
        if ne[0] % block(type) and self.chance(0.95):
            ne[0] += -ne[0] % block(type)
        for k, n in enumerate(ne):
            symbols[f"{parameter.name}.ne{k}"] = n
        return {"t": self.leaf(case, type, ne)}

    def leaf(self, case: Case, type: str, ne: list[int]) -> int:
        """Add a leaf of that shape, at times as a view of one with other strides, and return its number.

        Numbers count leaves from 0 and steps from 1000, so that adding to one does not move the other.
        """
        style = self.random.choice(("plain",) * 6 + ("permute", "transpose", "view"))
        place = self.random.choice(PLACES)
        full = (ne + [1, 1, 1, 1])[:4]
        step: Case | None = None
        if style == "permute":
            axes = self.random.sample(range(4), 4) if block(type) == 1 else [0, *self.random.sample(range(1, 4), 3)]
            ne = [full[axes[i]] for i in range(4)]
            step = {"op": "permute", "args": [{"n": axis} for axis in axes]}
        elif style == "transpose" and block(type) == 1:
            ne, step = [full[1], full[0], *full[2:]], {"op": "transpose", "args": []}
        elif style == "view" and max(full) < 1000 and type in SIZES:
            larger = [full[0] + self.random.choice((0, 1)), full[1] + self.random.choice((0, 1)), *full[2:]]
            ne = [*larger[:3], larger[3] + 1]
            row = larger[0] * SIZES[type]
            nb = [row, row * larger[1], row * larger[1] * larger[2]]
            offset = self.random.choice((0, SIZES[type], row))
            step = {
                "op": "view",
                "args": [{"l": [{"n": n} for n in full]}, {"l": [{"n": n} for n in nb]}, {"n": offset}],
            }
        case["leaves"].append({"type": type, "ne": ne, "place": place})
        number = len(case["leaves"]) - 1
        if step is None:
            return number
        step["args"] = [{"c": "own"}, {"t": number}, *step["args"]]
        case["steps"].append(step)
        return 1000 + len(case["steps"]) - 1

    def size(self, text: str, symbols: dict[str, Any]) -> int:
        """Return the size that a docstring gives as a name, a number or an expression of names."""
        text = re.sub(r"\(\W?_\w+\)", "", self.random.choice(text.removeprefix(">=").strip().split(" or ")))
        names = re.findall(r"[A-Za-z_][\w.]*", text)
        for name in names:
            symbols.setdefault(name, symbols.get("", self.dim()))
        if re.search(r"\w\s+\w|\w\s*\(", text):  # words
            return self.dim()
        code = re.sub(r"[A-Za-z_][\w.]*", lambda match: str(symbols[match[0]]), text).replace("/", "//")
        try:
            return max(0, int(eval(code, {"__builtins__": {}})))
        except (SyntaxError, TypeError, ValueError, ZeroDivisionError):
            return self.dim()
