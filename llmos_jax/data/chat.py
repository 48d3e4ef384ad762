"""Chat templates, run in a sandbox: jinja2's immutable one, in a process of its own that ends at its limits (`data/apart.py`).

The template comes from a model's files, never from a request. Nothing of Python can be reached from it. Loops and macro calls
are counted, and whatever makes a text or list longer is measured before it is done: most of what is hostile gets an error that
says what it did. All else ends by an alarm, or out of the memory that the process may take.
"""

import json

from llmos_jax.data import apart
from llmos_jax.errors import ConfigError

_SECONDS, _BYTES = 10.0, 2 * 2**30
_LARGEST_TEMPLATE_BYTES = 64 * 2**10
_LARGEST_TEXT_CHARACTERS = 2**23
_MOST_STEPS = 100_000
_LONGEST_ERROR = 1000
_LARGEST_INT = 2**63
# Methods of texts that templates use; of these the growing ones are measured.
_TEXT_METHODS = (
    *("strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "split", "rsplit", "splitlines", "partition", "rpartition"),
    *("startswith", "endswith", "find", "rfind", "index", "count", "upper", "lower", "title", "capitalize", "replace", "join"),
    *("isdigit", "isalpha", "isalnum", "isspace", "isupper", "islower"),
)
# Filters whose result can be far longer than what they are given, and that chat templates have no need of.
_NO_FILTERS = ("batch", "slice", "center", "indent", "wordwrap", "format", "xmlattr", "urlize", "pprint", "round", "random")


def render(template, **variables):
    """Returns the text of a chat template for these variables (`messages`, `add_generation_prompt`, `bos_token` ...).

    Raises ConfigError when the template is too large, fails, refuses the messages, or does more than it may.
    """
    size = len(template.encode(errors="surrogatepass"))
    if size > _LARGEST_TEMPLATE_BYTES:
        raise ConfigError(f"the chat template has {size} bytes, and {_LARGEST_TEMPLATE_BYTES} are the most.")
    try:
        answer = _PROCESS.ask({"template": template, "variables": variables}, _SECONDS, _BYTES)
    except TypeError as error:
        raise ConfigError(f"the chat template is given what is no JSON: {error}.") from None
    except apart.EndedError as error:
        raise ConfigError(f"the chat template fails on these messages: {error}.") from None
    if "error" in answer:
        raise ConfigError(answer["error"])
    return answer["text"]


_PROCESS = apart.Process(__name__)


def main():
    """Answers the requests of `render`."""
    apart.serve(lambda _: _answer)


def _answer(request):
    """Returns {"text"} or {"error"} for a template and its variables."""
    pieces, length = [], 0
    try:
        for piece in _compile(request["template"]).generate(**request["variables"]):
            length += len(piece)
            _measure(length)
            pieces.append(piece)
    except ConfigError as error:
        return {"error": str(error)[:_LONGEST_ERROR]}
    except Exception as error:  # whatever a template of someone else's makes of what it is given
        words = f"{type(error).__name__}: {error}"[:_LONGEST_ERROR]
        return {"error": f"the chat template fails on these messages ({words})."}
    return {"text": "".join(pieces)}


class _Steps:
    """Counts loops and macro calls of one rendering."""

    def __init__(self):
        self._left = _MOST_STEPS

    def take(self, count=1):
        self._left -= count
        if self._left < 0:
            raise ConfigError(f"the chat template takes more than {_MOST_STEPS} steps.")
        return ""

    def counted(self, items):
        """Returns the items of a loop; each is a step, and so is the loop."""
        items = list(items)
        self.take(1 + len(items))
        return items


def _compile(template):
    """Returns the template, compiled for one rendering."""
    try:
        from jinja2 import nodes
        from jinja2.visitor import NodeTransformer
    except ImportError:
        raise ConfigError("a chat template needs jinja2: pip install 'llmos-jax[serve]'.") from None

    def filtered(node, name):
        return nodes.Filter(node, name, [], [], None, None)

    class Bounded(NodeTransformer):
        """Puts the counting of loops and macros, and the measuring of joined texts, into a template's syntax tree."""

        def visit_For(self, node):
            self.generic_visit(node)
            node.iter = filtered(node.iter, "counted")
            return node

        def visit_Macro(self, node):
            self.generic_visit(node)
            node.body.insert(0, nodes.Output([nodes.Call(nodes.Name("step", "load"), [], [], None, None)]))
            return node

        def visit_Concat(self, node):
            self.generic_visit(node)
            return filtered(nodes.List(node.nodes), "join")

    steps = _Steps()
    environment = _environment(steps)
    tree = Bounded().visit(environment.parse(template))
    return environment.from_string(tree.set_environment(environment))


def _environment(steps):
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        """The sandbox, with what would make something long measured first."""

        intercepted_binops = frozenset(["*", "**", "+", "%"])

        def call_binop(self, context, operator, left, right):
            if operator == "**" or (operator in "*%" and not (_is_number(left) and _is_number(right))):
                raise ConfigError(f"the chat template uses {operator} on what it may not.")
            if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
                _measure(len(left) + len(right))
            return super().call_binop(context, operator, left, right)

        def wrap_str_format(self, value):
            return None  # jinja2 would let `format` pass, and its widths make any length

        def is_safe_attribute(self, obj, attribute, value):
            is_known = attribute in _TEXT_METHODS if isinstance(obj, str) else True
            return is_known and super().is_safe_attribute(obj, attribute, value)

        def call(self, context, function, /, *args, **kwargs):
            owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
            if isinstance(owner, str) and name == "replace":
                return _replace(owner, *args)
            if isinstance(owner, str) and name == "join":
                return _join(*args, owner)
            return super().call(context, function, *args, **kwargs)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals = {
        "range": _short_range,
        "namespace": environment.globals["namespace"],
        "dict": dict,
        "raise_exception": _refuse,
        "step": steps.take,
    }
    for name in _NO_FILTERS:
        environment.filters.pop(name, None)
    environment.filters |= {"counted": steps.counted, "join": _join, "replace": _replace, "tojson": _to_json}
    return environment


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
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    _measure(len(text))
    return text


def _is_number(value):
    return isinstance(value, (int, float)) and abs(value) < _LARGEST_INT


def _short_range(*bounds):
    numbers = range(*bounds)
    if len(numbers) > _MOST_STEPS:
        raise ConfigError(f"the chat template loops more than {_MOST_STEPS} times.")
    return numbers


def _refuse(message):
    raise ConfigError(f"the chat template refuses the messages: {message}")
