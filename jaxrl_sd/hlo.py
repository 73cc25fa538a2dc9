"""What a compiled program does: FLOPs, bytes and communication, read from its HLO text.

XLA's own `cost_analysis` counts the body of a loop once, and a model is a loop over layers. Here
bodies are counted as often as they run. All numbers are of one device.

FLOPs are those of matrix products (and convolutions, as which XLA for TPU writes them), 2 for each
multiplication with its addition. Bytes are those that top-level instructions read from and write to
the main memory: what a fusion slices is counted as the slice, arrays in a TPU's vector memory, S(1)
in their layout, not at all. Communication is what a device has to send, in a ring, over its group.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import NamedTuple

BITS = {"pred": 8, "bf16": 16} | {"s4": 4, "u4": 4, "token": 0, "opaque": 0}

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
    *("ragged-all-to-all", "collective-permute", "collective-broadcast"),
)
# They name an array or pass it on, or the instruction that they belong to is counted.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id iota "
    "opt-barrier optimization-barrier add-dependency while call conditional async-start".split()
)
NO_TRAFFIC = ("AllocateBuffer", "ConcatBitcast")  # custom calls
PASSES = {"highest": 6, "high": 3}  # of bfloat16 products that make one of float32


class Array(NamedTuple):
    """One array of an instruction's result."""

    dtype: str
    shape: tuple[int, ...]
    in_main_memory: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        """As much as its elements take, without a layout's padding."""
        digits = re.search(r"\d+", self.dtype)
        return self.size * BITS.get(self.dtype, int(digits[0]) if digits else 0) / 8

    @property
    def traffic(self) -> float:
        return self.bytes if self.in_main_memory else 0.0


class Instruction(NamedTuple):
    """A line of HLO."""

    name: str
    arrays: tuple[Array, ...]  # the result; several of a tuple
    opcode: str
    operands: tuple[str, ...]
    argument: str  # between the parentheses, of a constant or parameter
    attributes: str
    is_root: bool


Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Cost:
    """Of one device."""

    flops: float = 0.0
    passes: float = 0.0  # FLOPs, those of exact float32 products six times: in bfloat16 products
    bytes: float = 0.0
    collectives: Counter = field(default_factory=Counter)  # how often, by kind
    sent: Counter = field(default_factory=Counter)  # bytes that this device sends, by kind
    kernels: frozenset = frozenset()  # names of custom kernels: their FLOPs are not known
    unbounded: frozenset = frozenset()  # names of loops counted once: their length is dynamic

    def plus(self, other: "Cost", times: float = 1.0) -> "Cost":
        """Of this and then `times` the other."""

        def add(a, b):
            if isinstance(a, Counter):
                return Counter({k: a[k] + times * b[k] for k in a.keys() | b.keys()})
            return a | b if isinstance(a, frozenset) else a + times * b

        return Cost(*(add(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))


Kernel = Callable[[str, tuple[Array, ...]], float]


def cost(text: str, trips: Mapping[str, float] | None = None, kernel: Kernel | None = None) -> Cost:
    """What running a compiled module costs.

    Args:
      text: `compiled.as_text()` of a jitted function.
      trips: for loops whose number of iterations is dynamic: a part of the loop's `op_name`, as
        from `jax.named_scope`, and how often it runs. Others are counted once and named in
        `unbounded`.
      kernel: FLOPs of a custom kernel, of its name and operands. Without it they count as 0, and
        the names are in `kernels`.
    """
    computations, entry = parse(text)
    trips = trips or {}

    @cache
    def of(name: str) -> Cost:
        total, instructions = Cost(), computations[name]
        for instruction in instructions.values():
            total = total.plus(_cost(instruction, instructions))
        return total

    def _cost(x: Instruction, others: Computation) -> Cost:
        if x.opcode == "while":
            return _loop(x)
        called = _called(x)
        if x.opcode == "conditional":
            return max(map(of, called), key=lambda c: (c.flops, c.bytes))
        here = Cost(bytes=_traffic(x, others, computations))
        here = here.plus(_product(x, others)).plus(_collective(x, others))
        if x.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in x.attributes:
            here = here.plus(_of_kernel(x, others))
        if x.opcode in ("fusion", "call", "async-start"):
            for inner in called:
                part = _as_reduce_scatter(of(inner)) if "all-reduce-scatter" in inner else of(inner)
                here = here.plus(part if x.opcode != "fusion" else replace(part, bytes=0.0))
        return here

    def _of_kernel(x: Instruction, others: Computation) -> Cost:
        name = re.sub(r"[.\d]+$", "", x.name)
        if kernel is None:
            return Cost(kernels=frozenset([name]))
        flops = kernel(name, tuple(a for o in x.operands for a in others[o].arrays))
        return Cost(flops=flops, passes=flops)

    def _loop(x: Instruction) -> Cost:
        body, condition = (re.search(rf"{key}=%?([\w.\-]+)", x.attributes)[1] for key in LOOP)
        count, dynamic = _trip_count(x, computations[condition], computations[body]), frozenset()
        if count is None:
            label = _op_name(x)
            found = [n for scope, n in trips.items() if scope in label]
            count, dynamic = (found[0], dynamic) if found else (1, frozenset([label or x.name]))
        return Cost(unbounded=dynamic).plus(of(body), count)

    return of(entry)


LOOP = ("body", "condition")


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a module, by name, and the name of the first that runs."""
    computations, entry, current = {}, "", {}
    for line in _logical_lines(text):
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif instruction := _instruction(line):
            current[instruction.name] = instruction
    return computations, entry


def _logical_lines(text: str) -> Iterable[str]:
    """Lines, with those that go on an instruction joined to it."""
    held = ""
    for line in text.splitlines():
        if re.match(r"  (ROOT )?%?[\w.\-]+ = |\S.*\{$|\}$", line):
            yield held
            held = line
        else:
            held += " " + line
    yield held


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"  (ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    end = _closing(line, head.end()) if line[head.end()] == "(" else line.index(" ", head.end())
    shapes, rest = line[head.end() : end], line[end:].lstrip()
    opcode = rest[: rest.index("(")]
    end = _closing(rest, len(opcode))
    argument, attributes = rest[len(opcode) + 1 : end - 1], rest[end:]
    operands = tuple(re.findall(r"%([\w.\-]+)", argument))
    arrays = tuple(_arrays(shapes))
    return Instruction(head[2], arrays, opcode, operands, argument, attributes, bool(head[1]))


def _closing(text: str, start: int) -> int:
    """The place behind the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i + 1
    raise ValueError(f"no closing parenthesis: {text[:200]}")


def _arrays(shapes: str) -> Iterable[Array]:
    for dtype, sizes, layout in re.findall(r"(\w+)\[([\d,<=]*)\](\{[^}]*\})?", shapes):
        shape = tuple(int(n.strip("<=")) for n in sizes.split(",") if n)
        yield Array(dtype, shape, not re.search(r"S\([1-9]", layout))


def _called(x: Instruction) -> list[str]:
    """Computations that an instruction runs once."""
    keys = r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    branches = re.search(r"branch_computations=\{([^}]*)\}", x.attributes)
    names = branches[1].replace("%", "").replace(" ", "").split(",") if branches else []
    return names or re.findall(keys, x.attributes)


def _op_name(x: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', x.attributes)
    return found[1] if found else ""


def _trip_count(x: Instruction, condition: Computation, body: Computation) -> float | None:
    """How often a loop runs, if it counts from 0 to a constant, as a scan does."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', x.attributes)
    if known:
        return int(known[1])
    root = _root(condition)
    limit = _constant(root, condition)
    if root.opcode != "compare" or "direction=LT" not in root.attributes or limit is None:
        return None
    return -(-limit // _step(condition[root.operands[0]], body))


def _step(counter: Instruction, body: Computation) -> int:
    """By how much a loop counts: by more than 1 where XLA has unrolled it."""
    place = re.search(r"index=(\d+)", counter.attributes)
    if place is None:
        return 1
    following = body.get(_root(body).operands[int(place[1])])
    added = _constant(following, body) if following and following.opcode == "add" else None
    return added or 1


def _root(computation: Computation) -> Instruction:
    return next(i for i in computation.values() if i.is_root)


def _constant(x: Instruction, others: Computation) -> int | None:
    """The first of an instruction's operands that is a constant whole number."""
    operands = (others[name] for name in x.operands if name in others)
    constants = (i.argument for i in operands if i.opcode == "constant" and i.argument.isdigit())
    return next(map(int, constants), None)


def _product(x: Instruction, others: Computation) -> Cost:
    """FLOPs of a matrix product."""
    if x.opcode not in ("dot", "convolution"):
        return Cost()
    left, right = (others[name].arrays[0] for name in x.operands[:2])
    if x.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", x.attributes)[1]
        flops = 2 * x.arrays[0].size * math.prod(left.shape[int(i)] for i in axes.split(",") if i)
    else:
        flops = _convolution_flops(x, left, right)
    exact = re.search(r"operand_precision=\{(\w+)", x.attributes)
    is_float32 = left.dtype == right.dtype == "f32"
    passes = PASSES.get(exact[1], 1) if exact and is_float32 else 1
    return Cost(flops=flops, passes=passes * flops)


def _convolution_flops(x: Instruction, left: Array, right: Array) -> float:
    """2 for each multiplication whose two factors exist: none with padding or between dilations.

    XLA writes batch axes of a product as spatial axes that are dilated until they cannot overlap.
    """
    of_left, of_right, of_out = re.match(
        r"(\w+)_(\w+)->(\w+)", re.search(r"dim_labels=(\S+?)(?:,|$)", x.attributes)[1]
    ).groups()
    window = re.search(r"window=\{([^}]*)\}", x.attributes)
    fields = dict(f.split("=") for f in window[1].split()) if window else {}
    rank = sum(label.isdigit() for label in of_out)

    def of_axis(field: str, default: str) -> list[str]:
        return fields[field].split("x") if field in fields else [default] * rank

    pairs = 1
    for axis in range(rank):
        label = str(axis)
        pairs *= _valid_pairs(
            size=left.shape[of_left.index(label)],
            kernel=right.shape[of_right.index(label)],
            out=x.arrays[0].shape[of_out.index(label)],
            stride=int(of_axis("stride", "1")[axis]),
            low=int(of_axis("pad", "0_0")[axis].split("_")[0]),
            dilation=int(of_axis("lhs_dilate", "1")[axis]),
            kernel_dilation=int(of_axis("rhs_dilate", "1")[axis]),
        )
    groups = re.search(r"batch_group_count=(\d+)", x.attributes)
    batch = left.shape[of_left.index("b")] // (int(groups[1]) if groups else 1)
    features = right.shape[of_right.index("o")] * right.shape[of_right.index("i")]
    return 2 * batch * features * pairs


@cache
def _valid_pairs(
    size: int, kernel: int, out: int, stride: int, low: int, dilation: int, kernel_dilation: int
) -> int:
    """Pairs of an output and a kernel position that meet an element of the input."""
    last = (size - 1) * dilation
    count = 0
    for k in range(kernel):
        offset = k * kernel_dilation - low
        places = (o * stride + offset for o in range(out))
        count += sum(0 <= place <= last and place % dilation == 0 for place in places)
    return count


def _collective(x: Instruction, others: Computation) -> Cost:
    """What a device sends: each kind is computed in a ring."""
    kind = x.opcode.removesuffix("-start")
    if kind not in COLLECTIVES or _goes_on(x, others):
        return Cost()
    operands = sum(a.bytes for name in x.operands for a in others[name].arrays)
    n = _group_size(x)
    factor = {
        "all-gather": n - 1,
        "all-reduce": 2 * (n - 1) / n,
        "reduce-scatter": (n - 1) / n,
        "all-to-all": (n - 1) / n,
        "ragged-all-to-all": (n - 1) / n,
    }.get(kind, 1)
    return Cost(collectives=Counter({kind: 1}), sent=Counter({kind: factor * operands}))


def _goes_on(x: Instruction, others: Computation) -> bool:
    """TPUs spread a collective over several fusions; it is counted in the one that starts it."""
    starts = any('"AsyncCollectiveStart"' in i.attributes for i in others.values())
    return "chain_id=" in x.attributes and not starts


def _group_size(x: Instruction) -> int:
    """Devices of one group, in any of the forms that XLA prints."""
    groups = x.attributes.partition("replica_groups=")[2]
    if mesh := re.match(r"mesh\[([^\]]*)\] \{([^}]*)\}", groups):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    if iota := re.match(r"\[(\d+),(\d+)\]<=", groups):
        return int(iota[2])
    if first := re.match(r"\{\{([\d,]*)\}", groups):
        return first[1].count(",") + 1
    return 2  # collective-permute has pairs; others always name their groups


def _as_reduce_scatter(inner: Cost) -> Cost:
    """TPUs compute all-reduce and slice as one: half of the sending is left."""
    sent, count = inner.sent, inner.collectives
    return replace(
        inner,
        sent=Counter({"reduce-scatter": sent["all-reduce"] / 2}),
        collectives=Counter({"reduce-scatter": count["all-reduce"]}),
    )


def _traffic(x: Instruction, others: Computation, computations: dict[str, Computation]) -> float:
    """Bytes that an instruction moves between the main memory and the device."""
    if x.opcode in FREE or x.opcode.endswith(("-done", "-update")):
        return 0.0
    if x.opcode == "custom-call" and any(f'"{name}"' in x.attributes for name in NO_TRAFFIC):
        return 0.0
    result = [a.traffic for a in x.arrays]
    if x.opcode in ("slice-start", "copy-start"):  # (operand, result, flag)
        moved = x.arrays[1]
        return moved.bytes * (x.arrays[0].in_main_memory + moved.in_main_memory)
    if x.opcode.endswith("-start"):
        return sum(a.traffic for name in x.operands for a in others[name].arrays) * 2
    if x.opcode in ("slice", "dynamic-slice", "gather"):
        source = others[x.operands[0]].arrays[0]
        return x.arrays[0].bytes * source.in_main_memory + sum(result)
    if x.opcode in ("dynamic-update-slice", "scatter"):
        update = others[x.operands[1 if x.opcode == "dynamic-update-slice" else -1]].arrays[0]
        return 2 * update.bytes * x.arrays[0].in_main_memory
    operands = [others[name].arrays[0] for name in x.operands]
    if x.opcode != "fusion":
        return sum(a.traffic for a in operands) + sum(result)
    inner = computations[_called(x)[0]]
    return _fusion_reads(operands, inner) + _fusion_writes(x, inner)


def _fusion_reads(operands: list[Array], inner: Computation) -> float:
    """What a fusion reads of its operands: slices, where it only slices one."""
    users: dict[str, list[Instruction]] = {}
    for i in inner.values():
        for name in i.operands:
            users.setdefault(name, []).append(i)

    def read(name: str, whole: Array) -> float:
        total = 0.0
        for user in users.get(name, []):
            if user.opcode == "bitcast":
                total += read(user.name, whole)
            elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                total += user.arrays[0].bytes
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                pass  # written in place
            elif user.opcode == "tuple" or _goes_on(user, inner):
                pass  # handed on
            else:
                return whole.bytes
        return min(total, whole.bytes)

    parameters = {int(i.argument): i for i in inner.values() if i.opcode == "parameter"}
    return sum(
        read(parameters[i].name, a) for i, a in enumerate(operands) if a.in_main_memory and a.bytes
    )


def _fusion_writes(x: Instruction, inner: Computation) -> float:
    """What a fusion writes: slices, where it updates an array in place."""
    root = next(i for i in inner.values() if i.is_root)
    parts = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(parts) < len(x.arrays):  # the start of a collective
        return sum(a.traffic for a in x.arrays)
    total = 0.0
    for part, array in zip(parts, x.arrays, strict=True):
        if part.opcode == "parameter" or _goes_on(part, inner):
            continue  # handed on
        while part.opcode == "bitcast" and part.operands[0] in inner:
            part = inner[part.operands[0]]
        if part.opcode == "dynamic-update-slice":
            update = inner[part.operands[1]].arrays[0]
            total += update.bytes * array.in_main_memory
        else:
            total += array.traffic
    return total
