"""Chat templates, run in a sandbox: jinja2's immutable one, in which time and memory are bounded as well.

The template comes from a model's files, never from a request. Nothing of Python can be reached from it. Every turn of a loop
and every macro call counts against a limit; what an operation reads or makes, character by character, counts against another
before it is done, and whatever makes a text or list longer is measured.
"""

import functools
import json

from llmos_jax.errors import ConfigError

_LARGEST_TEMPLATE_BYTES = 64 * 2**10
_LARGEST_TEXT_CHARACTERS = 2**23
_MOST_STEPS = 100_000
# All that the operations of a rendering read and make: twenty of them on 6 million characters. An element of a list counts as
# several characters; so does a character that is compared with many.
_MOST_CHARACTERS = 2**27
_ELEMENT, _COMPARED_AT_ONCE = 16, 32
_LARGEST_INT = 2**63
# Methods of texts that templates use; of these the growing ones are measured.
_TEXT_METHODS = (
    *("strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "split", "rsplit", "splitlines", "partition", "rpartition"),
    *("startswith", "endswith", "find", "rfind", "index", "count", "upper", "lower", "title", "capitalize", "replace", "join"),
    *("isdigit", "isalpha", "isalnum", "isspace", "isupper", "islower"),
)
# Filters by what they read of a value: nothing but its length; each element, but not what is in it; all there is.
_FREE_FILTERS = ("count", "d", "default", "first", "last", "length", "safe")
_SHALLOW_FILTERS = ("items", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr")
_DEEP_FILTERS = (
    *(
        "abs",
        "capitalize",
        "dictsort",
        "e",
        "escape",
        "float",
        "int",
        "join",
        "lower",
        "max",
        "min",
        "replace",
        "sort",
        "string",
    ),
    *("title", "tojson", "trim", "unique", "upper"),
)
# Tests that look at what is in a value; all others look at its type.
_DEEP_TESTS = (
    *("==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", ">=", "ge", "<", "lt", "lessthan", "<=", "le", "in"),
    *("lower", "upper"),
)


def render(template, **variables):
    """Returns the text of a chat template for these variables (`messages`, `add_generation_prompt`, `bos_token` ...).

    Raises ConfigError when the template is too large, fails, refuses the messages, or does more than it may.
    """
    if len(template.encode()) > _LARGEST_TEMPLATE_BYTES:
        raise ConfigError(f"the chat template has {len(template.encode())} bytes, and {_LARGEST_TEMPLATE_BYTES} are the most.")
    pieces, length = [], 0
    try:
        for piece in _compile(template).generate(**variables):
            length += len(piece)
            _measure(length)
            pieces.append(piece)
    except ConfigError:
        raise
    except Exception as error:  # whatever a template of someone else's makes of what it is given
        raise ConfigError(f"the chat template fails on these messages ({type(error).__name__}: {error}).") from None
    return "".join(pieces)


class _Work:
    """Counts what one rendering does."""

    def __init__(self):
        self._steps, self._characters = _MOST_STEPS, _MOST_CHARACTERS

    def take(self, count=1):
        """Counts turns of loops and calls of macros."""
        self._steps -= count
        if self._steps < 0:
            raise ConfigError(f"the chat template takes more than {_MOST_STEPS} steps.")
        return ""

    def charge(self, characters):
        """Counts characters that are read or made."""
        self._characters -= characters
        if self._characters < 0:
            raise ConfigError(f"the chat template works on more than {_MOST_CHARACTERS} characters, all operations together.")
        return ""

    def skim(self, value):
        """Counts a text, or the elements of what holds some, and returns it."""
        if isinstance(value, str):
            self.charge(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.charge(_ELEMENT * len(value))
        return value

    def weigh(self, value):
        """Counts a value with all that is in it, as often as it is in it, and returns it."""
        left = [value]
        while left:
            self.skim(some := left.pop())
            if isinstance(some, dict):
                left += [*some.keys(), *some.values()]
            elif isinstance(some, (list, tuple)):
                left += some
        return value

    def search(self, value):
        """Counts what `in` looks through, and returns it."""
        return value if isinstance(value, dict) else self.weigh(value)

    def match(self, text, others):
        """Counts a text each of whose characters may be compared with all of some other texts."""
        several = sum(len(other) for other in others if isinstance(other, str))
        self.charge((1 + len(text)) * (1 + several // _COMPARED_AT_ONCE))

    def go_through(self, items):
        """Returns what a loop goes through as a list, its elements counted."""
        return self.skim(items if isinstance(items, (list, tuple)) else list(self.skim(items)))


def _compile(template):
    """Returns the template, compiled for one rendering."""
    try:
        from jinja2 import nodes
        from jinja2.visitor import NodeTransformer
    except ImportError:
        raise ConfigError("a chat template needs jinja2: pip install 'llmos-jax[serve]'.") from None

    # Filters can't be named anew by the template, as variables can.
    def filtered(node, name):
        return nodes.Filter(node, name, [], [], None, None)

    def seen(node, name):
        return node if isinstance(node, nodes.Const) else filtered(node, name)

    def step():
        return nodes.Output([filtered(nodes.Const(1), "step")])

    class Bounded(NodeTransformer):
        """Puts counting and measuring into a template's syntax tree, where no filter, test or call is."""

        def visit_For(self, node):
            self.generic_visit(node)
            node.iter = filtered(node.iter, "listed")
            node.body.insert(0, step())  # a recursive loop is given what to go through anew
            return node

        def visit_Macro(self, node):
            self.generic_visit(node)
            node.body.insert(0, step())
            return node

        visit_CallBlock = visit_Macro

        def visit_Concat(self, node):
            self.generic_visit(node)
            return filtered(nodes.List(node.nodes), "join")

        def visit_Compare(self, node):
            self.generic_visit(node)
            node.expr = seen(node.expr, "weighed")
            for operand in node.ops:
                operand.expr = seen(operand.expr, "searched" if operand.op in ("in", "notin") else "weighed")
            return node

        def visit_Getitem(self, node):
            self.generic_visit(node)
            if isinstance(node.arg, nodes.Slice):
                node.node = seen(node.node, "skimmed")
            return node

        def visit_List(self, node):
            self.generic_visit(node)
            return filtered(node, "skimmed")

        visit_Dict = visit_List

        def visit_Tuple(self, node):
            self.generic_visit(node)
            return filtered(node, "skimmed") if node.ctx == "load" else node

        def visit_Output(self, node):
            self.generic_visit(node)
            shown = []
            for part in node.nodes:
                if isinstance(part, nodes.TemplateData):
                    shown += [filtered(nodes.Const(len(part.data)), "made"), part]
                else:
                    shown.append(filtered(part, "weighed"))
            node.nodes = shown
            return node

    work = _Work()
    environment = _environment(work)
    tree = Bounded().visit(environment.parse(template))
    return environment.from_string(tree.set_environment(environment))


def _environment(work):
    """Returns the sandbox with its names, filters and tests, of which each counts what it does."""
    environment = _sandbox(work)
    environment.globals = {
        "range": _short_range,
        "namespace": environment.globals["namespace"],
        "dict": dict,
        "raise_exception": _refuse,
    }
    plain = environment.filters | {"join": _join, "replace": _replace, "tojson": _to_json}

    def trim(value, chars=None):
        work.match(str(value), [chars])
        return plain["trim"](value, chars)

    kinds = ((_FREE_FILTERS, _nothing), (_SHALLOW_FILTERS, work.skim), (_DEEP_FILTERS, work.weigh))
    environment.filters = {name: _charged(plain[name], read, work) for names, read in kinds for name in names}
    environment.filters["trim"] = _charged(trim, work.weigh, work)
    # What is put into the syntax tree.
    own = {"step": work.take, "made": work.charge, "listed": work.go_through, "weighed": work.weigh}
    own |= {"searched": work.search, "skimmed": work.skim}
    environment.filters |= {name: _charged(function, _nothing, work) for name, function in own.items()}
    tests = ((name, work.weigh if name in _DEEP_TESTS else _nothing) for name in environment.tests)
    environment.tests = {name: _charged(environment.tests[name], read, work) for name, read in tests}
    return environment


def _sandbox(work):
    """Returns an environment of jinja2 in which operators and calls are counted and measured."""
    from jinja2.runtime import Macro
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        """The sandbox, with what would make something long measured first."""

        intercepted_binops = frozenset(["*", "**", "+", "%"])

        def call_binop(self, context, operator, left, right):
            if operator == "**" or (operator in "*%" and not (_is_number(left) and _is_number(right))):
                raise ConfigError(f"the chat template uses {operator} on what it may not.")
            if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
                _measure(len(left) + len(right))
                work.skim(left), work.skim(right)
            return super().call_binop(context, operator, left, right)

        def wrap_str_format(self, value):
            return None  # jinja2 would let `format` pass, and its widths make any length

        def is_safe_attribute(self, obj, attribute, value):
            is_known = attribute in _TEXT_METHODS if isinstance(obj, str) else True
            return is_known and super().is_safe_attribute(obj, attribute, value)

        def call(self, context, function, *args, **kwargs):
            owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
            if isinstance(owner, str):
                work.match(owner, args)
                for value in (*args, *kwargs.values()):
                    work.weigh(value)
                if name == "replace":
                    return work.skim(_replace(owner, *args))
                if name == "join":
                    return work.skim(_join(*args, owner))
            elif name in ("index", "count", "changed"):  # these compare
                for value in (owner, *args):
                    work.weigh(value)
            elif name != "get":
                for value in (owner, *args, *kwargs.values()):
                    work.skim(value)
            result = super().call(context, function, *args, **kwargs)
            return work.skim(result) if isinstance(owner, str) or isinstance(function, Macro) else result

    return Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])


def _charged(function, read, work):
    """Returns a filter or test that counts what it reads and makes. Given the context, it is never run once for all."""
    from jinja2 import pass_context

    wanted = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

    @pass_context
    @functools.wraps(function, updated=())
    def run(context, *args, **kwargs):
        for value in (*args, *kwargs.values()):
            read(value)
        given = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
        result = function(*([given[wanted]] if wanted else []), *args, **kwargs)
        return result if read is _nothing else work.skim(result)

    return run


def _nothing(value):
    return value


def _measure(length):
    if length > _LARGEST_TEXT_CHARACTERS:
        raise ConfigError(f"the chat template makes more than {_LARGEST_TEXT_CHARACTERS} characters.")


def _join(items, separator="", attribute=None):
    items = [item if attribute is None else item[attribute] for item in items]
    texts = [item if isinstance(item, str) else str(item) for item in items]
    _measure(sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


def _replace(text, old, new, count=-1):
    text, times = str(text), str(text).count(old)
    _measure(len(text) + (times if count is None or count < 0 else min(times, count)) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _to_json(value, indent=None):
    if isinstance(indent, int) and indent > 8:
        raise ConfigError(f"the chat template indents by {indent}.")
    pieces, length = [], 0
    for piece in json.JSONEncoder(ensure_ascii=False, indent=indent).iterencode(value):  # indents make any length
        length += len(piece)
        _measure(length)
        pieces.append(piece)
    return "".join(pieces)


def _is_number(value):
    return isinstance(value, (int, float)) and abs(value) < _LARGEST_INT


def _short_range(*bounds):
    numbers = range(*bounds)
    if len(numbers) > _MOST_STEPS:
        raise ConfigError(f"the chat template loops more than {_MOST_STEPS} times.")
    return numbers


def _refuse(message):
    raise ConfigError(f"the chat template refuses the messages: {message}")
