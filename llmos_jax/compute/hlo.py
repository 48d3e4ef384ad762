"""Reads what XLA compiled: collectives with their place in the schedule, and the arrays that memory is taken for.

The texts are the compiler's own (scheduled HLO after optimisation, buffer assignment); nothing is run. Figures are per device.
"""

import dataclasses
import functools
import itertools
import math
import re

_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4,
    "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+|f8e\w+|c64|c128)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|body|to_apply|condition|branch_computations|called_computations)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)"
)
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# How v5e's compiler takes an asynchronous collective apart: a fusion that starts it, products that each carry a piece of it
# along (in computations of this name), a fusion that ends it.
_STARTED, _CARRIED, _ENDED = "async-collective-start", "async_collective_fusion", "async-collective-done"
# What keeps a device busy while a collective is under way; copies and bookkeeping do not count.
_COMPUTE = ("fusion", "dot", "convolution", "custom-call", "while", "call", "conditional", "reduce", "sort", "scatter")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: name, result type, opcode, what is in its parentheses, called computations, the rest as text."""

    name: str
    type: str
    opcode: str
    inside: str
    called: tuple[str, ...]
    attributes: str

    @property
    def operands(self):
        """Names of the instructions whose results it takes."""
        return _NAME.findall(self.inside)

    @property
    def source(self):
        """The operation of the traced program that it comes from, as JAX names it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the schedule.

    kind: as XLA names it (an all-reduce of which a slice is kept counts as the reduce-scatter that it is executed as). type:
    of the result on one device. devices: how many take part. count: how often a step runs it (loops multiply; one whose
    length the program decides counts once, and is_counted is false). sent_bytes: what one device sends each time, on a ring.
    is_async: started and awaited in different places. hidden_by: compute instructions between these places.
    """

    kind: str
    type: str
    devices: int
    count: int
    is_counted: bool
    sent_bytes: int
    is_async: bool
    hidden_by: int
    source: str


@dataclasses.dataclass(frozen=True)
class Array:
    """One array that memory is assigned to: its HLO value, dtype[shape], bytes, whether it is an argument, and its source."""

    name: str
    type: str
    shape: tuple[int, ...]
    size_bytes: int
    is_argument: bool
    source: str


def parse_module(text):
    """Returns ({computation: [Instruction] in schedule order}, entry computation) of HLO text."""
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and " = " not in line.split("(")[0]:
            current = computations.setdefault(header.group(2), [])
            entry = header.group(2) if header.group(1) else entry
        elif current is not None:
            found = _INSTRUCTION.match(line)
            if found:
                inside, rest = _arguments(line, found.end())
                called = tuple(_NAME.findall(" ".join(_CALLED.findall(rest))))
                current.append(Instruction(*found.groups(), inside, called, rest))
    if entry is None:
        raise ValueError("this is no HLO module: it has no ENTRY computation.")
    return computations, entry


def type_bytes(type_text):
    """Returns the bytes of an HLO type, tuples summed, without the padding of tiles."""
    return int(sum(_element_bytes(kind) * math.prod(_dimensions(dims)) for kind, dims in _ARRAY.findall(type_text)))


def collectives(text):
    """Returns the Collectives of a module's schedule, loops and branches followed, in the order in which they are started."""
    computations, entry = parse_module(text)
    partitions = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
    everyone = int(partitions.group(1)) if partitions else 1
    holds = functools.cache(lambda name: _collective_inside(computations, name))
    found = []

    def visit(name, count, is_counted):
        instructions = computations[name]
        for position, instruction in enumerate(instructions):
            inner = _collective_of(instruction, holds)
            if inner is not None:
                is_async = instruction.opcode.endswith("-start") or instruction.name.startswith(_STARTED)
                hidden_by = _compute_between(instructions, position) if is_async else 0
                devices = _group_size(inner.attributes, everyone)
                found.append(_describe(instruction, inner, devices, count, is_counted, is_async, hidden_by))
            elif instruction.opcode == "while":
                trips, body = _trips(computations, instruction)
                visit(body, count * (trips or 1), is_counted and trips is not None)
            elif instruction.opcode in ("call", "conditional"):
                for called in instruction.called:
                    visit(called, count, is_counted)

    visit(entry, 1, True)
    return found


def arrays(buffer_assignment, text, at_least_bytes):
    """Returns the Arrays of `at_least_bytes` or more that a step's memory is assigned to, largest first.

    Every value counts once by name and type; those that share memory one after another are all listed.
    """
    sources = {i.name: i.source for instructions in parse_module(text)[0].values() for i in instructions}
    found, is_argument = {}, False
    for line in buffer_assignment.splitlines():
        if line.startswith("allocation "):
            is_argument = ", parameter " in line
            if "thread-local" in line:
                is_argument = None  # of a computation inside another: counted there
        value = re.match(r"\s+value: <\d+ ([\w.\-]+)(?:\{[\d,]*\})* @\d+> \(size=(\d+),offset=\d+\): (\S+)", line)
        if value is None or is_argument is None:
            continue
        name, size, type_text = value.group(1), int(value.group(2)), value.group(3)
        array = _ARRAY.match(type_text)
        if array and size >= at_least_bytes:
            key = (array.group(0), sources.get(name, ""), is_argument)
            found.setdefault(key, Array(name, array.group(0), _dimensions(array.group(2)), size, is_argument, key[1]))
    return sorted(found.values(), key=lambda a: (-a.size_bytes, a.type, a.source))


def _arguments(line, start):
    """Returns what is inside the parenthesis that was opened before `start`, and what follows it."""
    depth, end = 1, start
    while depth and end < len(line):
        depth += {"(": 1, ")": -1}.get(line[end], 0)
        end += 1
    return line[start : end - 1], line[end:]


def _dimensions(text):
    return tuple(int(size) for size in text.split(",") if size)


def _element_bytes(kind):
    return _BYTES.get(kind) or _BYTES[kind[:2]]


def _collective_inside(computations, name):
    """Returns the collective that a fusion or an asynchronous computation wraps, or None."""
    instructions = computations.get(name, ())
    for instruction in instructions:
        kind = instruction.opcode.removesuffix("-start")
        if kind in _COLLECTIVES:
            last = instructions[-1]
            if kind == "all-reduce" and last.opcode == "dynamic-slice":
                return dataclasses.replace(instruction, opcode="reduce-scatter", type=_result_type(last))
            return dataclasses.replace(instruction, opcode=kind, type=_result_type(instruction))
    inner = (_collective_inside(computations, called) for i in instructions if i.opcode != "while" for called in i.called)
    return next((found for found in inner if found is not None), None)


def _collective_of(instruction, holds):
    """Returns the collective that an instruction of a schedule starts or is, or None; what goes on with one is none."""
    if instruction.name.startswith(_ENDED) or any(name.startswith(_CARRIED) for name in instruction.called):
        return None
    if instruction.opcode.removesuffix("-start") in _COLLECTIVES:
        kind = instruction.opcode.removesuffix("-start")
        return dataclasses.replace(instruction, opcode=kind, type=_result_type(instruction))
    if instruction.opcode in ("fusion", "async-start", "custom-call"):
        return next(filter(None, map(holds, instruction.called)), None)
    return None


def _describe(instruction, inner, devices, count, is_counted, is_async, hidden_by):
    kind, result_bytes = inner.opcode, type_bytes(inner.type)
    sent_bytes = {
        "all-reduce": 2 * result_bytes * (devices - 1) / devices,
        "reduce-scatter": result_bytes * (devices - 1),
        "collective-permute": result_bytes,
    }.get(kind, result_bytes * (devices - 1) / devices)
    source = inner.source or instruction.source
    return Collective(kind, inner.type, devices, count, is_counted, int(sent_bytes), is_async, hidden_by, source)


def _result_type(instruction):
    """Returns the types of a collective's results, without the operands and contexts that a start hands on."""
    found = [f"{kind}[{dims}]" for kind, dims in _ARRAY.findall(instruction.type)]
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        found = [array for array in found if array != "u32[]"]
        found = found[len(found) // 2 :]
    return ", ".join(found)


def _group_size(text, everyone):
    """Returns how many devices take part in a collective, from any of the spellings of its groups; none named: all."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh.group(2)))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text)
    if iota:
        return int(iota.group(2))
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
    if listed:
        return len(_dimensions(listed.group(1)))
    pairs = dict(re.findall(r"\{(\d+),(\d+)\}", text.partition("source_target_pairs=")[2].partition("}}")[0] + "}"))
    start = device = next(iter(pairs), None)
    for length in range(1, len(pairs) + 1):
        device = pairs.get(device)
        if device in (start, None):
            return length
    return everyone


def _compute_between(instructions, start):
    """Returns how many compute instructions the schedule has between a collective's last update and its end."""
    waited, begun = instructions[start].name, start
    if waited.startswith(_STARTED):
        end = waited.replace(_STARTED, _ENDED)
        between = itertools.takewhile(lambda i: i.name != end, instructions[start + 1 :])
        return sum(i.opcode in _COMPUTE for i in between)
    for position in range(start + 1, len(instructions)):
        instruction = instructions[position]
        if waited in instruction.operands:
            if instruction.opcode == "async-update":
                waited, begun = instruction.name, position
            elif instruction.opcode.endswith("-done"):
                return sum(i.opcode in _COMPUTE for i in instructions[begun + 1 : position])
    return 0


def _trips(computations, instruction):
    """Returns (how often a loop runs, its body): XLA's own figure, or limit / step of a counter that begins at 0.

    None for a count that the program decides while it runs.
    """
    body = re.search(r"body=%?([\w.\-]+)", instruction.attributes).group(1)
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.attributes)
    if known:
        return int(known.group(1)), body
    condition = {i.name: i for i in computations[re.search(r"condition=%?([\w.\-]+)", instruction.attributes).group(1)]}
    steps = {i.name: i for i in computations[body]}
    compared = [i for i in condition.values() if i.opcode == "compare" and "direction=LT" in i.attributes]
    if len(compared) != 1:
        return None, body
    counter, limit = (condition[name] for name in compared[0].operands)
    index = re.search(r"index=(\d+)", counter.attributes)
    if limit.opcode != "constant" or index is None:
        return None, body
    result = steps[computations[body][-1].operands[int(index.group(1))]]
    step = [steps[name].inside for name in result.operands if steps[name].opcode == "constant"]
    return (-(-int(limit.inside) // int(step[0])), body) if result.opcode == "add" and step else (None, body)
