"""A conversation in the terminal: lines in, answers out as they are written, commands that begin with a slash.

The conversation is sent whole every turn; the engine keeps the pages of what it has read and written, so a turn computes what
is new alone.
"""

import contextlib
import dataclasses
import difflib
import json
import pathlib
import signal
import sys

from llmos_jax.compute.host import write_whole
from llmos_jax.config import Override, parse, to_plain
from llmos_jax.errors import ConfigError, DataError, LlmosError
from llmos_jax.serve.model import check_conversation
from llmos_jax.serve.sample import SamplingConfig

_HELP = """\
/help               this
/system [TEXT]      set the system message; without a text: none
/set [NAME=VALUE]   set how answers are drawn, as temperature=0.7; without a name: show it
/retry              answer the last message again, from other random numbers
/undo               take the last message and its answer back
/reset              begin anew; system message and settings stay
/save FILE          write the conversation as JSON
/load FILE          go on with a conversation that was saved
/exit               leave (or Ctrl-D)
Ctrl-C stops an answer; what is there of it stays. A message that begins with a slash: begin it with two."""
_ROLES = ("system", "user", "assistant")
_LARGEST_FILE_BYTES = 2**24
_SEEDS = 2**32


class Chat:
    """A conversation with a LanguageModel. `messages` ({"role", "content"}) without the `system` message, `sampling`.

    write: called with each piece of what is to be shown.
    """

    def __init__(self, model, sampling, write, system=None):
        model.check_chat()
        check_conversation(sampling)
        self.model, self.sampling, self.write, self.system = model, sampling, write, system or None
        self.messages, self.attempt = [], 0
        self._commands = {
            name.removeprefix("_on_"): getattr(self, name) for name in sorted(dir(self)) if name.startswith("_on_")
        }

    def take(self, line):
        """Does what a line says, a message or a command; False when the conversation is over.

        A LlmosError leaves the conversation as it was before.
        """
        if not line.strip():
            return True
        if not line.startswith("/") or line.startswith("//"):
            self.attempt = 0
            self._answer([*self.messages, _message("user", line.removeprefix("/") if line.startswith("/") else line)])
            return True
        name, _, argument = line[1:].strip().partition(" ")
        if name == "exit":
            return False
        if name not in self._commands:
            close = difflib.get_close_matches(name, [*self._commands, "exit"], n=1)
            raise ConfigError(
                f"there is no /{name}{f'; did you mean /{close[0]}' if close else ''}; /help lists what there is."
            )
        self._commands[name](argument.strip())
        return True

    def _whole(self, messages):
        return messages if self.system is None else [_message("system", self.system), *messages]

    def _answer(self, messages):
        sampling = dataclasses.replace(self.sampling, seed=(self.sampling.seed + self.attempt) % _SEEDS)
        text = ""
        with (
            _interruptible() as is_interrupted,
            contextlib.closing(self.model.stream_chat(self._whole(messages), sampling)) as pieces,
        ):
            for piece in pieces:
                text += piece
                self.write(piece)
                if is_interrupted():
                    break
        self.write("\n")
        self.messages = [*messages, _message("assistant", text)]

    def _on_help(self, argument):
        self.write(_HELP + "\n")

    def _on_reset(self, argument):
        self.messages = []

    def _on_system(self, argument):
        self.system = argument or None

    def _on_set(self, argument):
        if argument:
            name, has_value, value = (part.strip() for part in argument.partition("="))
            if not has_value:
                raise ConfigError(f"/set {argument}: say what to, as {name or 'temperature'}=VALUE.")
            sampling = parse(SamplingConfig, to_plain(self.sampling) | {name: Override(value)})
            check_conversation(sampling)
            self.sampling = sampling
        else:
            self.write("".join(f"{name}={value}\n" for name, value in to_plain(self.sampling).items()))

    def _on_retry(self, argument):
        kept = self._before_last()
        self.attempt += 1
        self._answer([*kept, self.messages[len(kept)]])

    def _on_undo(self, argument):
        self.messages = self._before_last()

    def _before_last(self):
        """Returns the messages before the last one of the user's."""
        last = max((index for index, message in enumerate(self.messages) if message["role"] == "user"), default=None)
        if last is None:
            raise ConfigError("nothing has been said yet.")
        return self.messages[:last]

    def _on_save(self, argument):
        path = _path(argument, "save")
        try:
            write_whole(path, json.dumps({"messages": self._whole(self.messages)}, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise DataError(f"{path} can't be written: {error}.") from None

    def _on_load(self, argument):
        messages = _read_messages(_path(argument, "load"))
        self.system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else None
        self.messages = messages


def run_chat(model, sampling, system=None, source=None, sink=None):
    """Talks until the source's lines end or /exit. source, sink: text streams; by default those of the process.

    On a terminal lines are asked for, and a mistake is told and forgotten; else a line of the source is a message, nothing but
    answers is written, and a mistake ends it (as LlmosError).
    """
    source, sink = source or sys.stdin, sink or sys.stdout
    is_terminal = source.isatty() and sink.isatty()

    def write(text):
        sink.write(text)
        sink.flush()

    chat = Chat(model, sampling, write, system)
    if is_terminal:
        write("/help lists the commands.\n")
    while (line := _read_line(source, write, is_terminal)) is not None:
        try:
            if not chat.take(line):
                return
        except LlmosError as error:
            if not is_terminal:
                raise
            write(f"{error}\n")
    if is_terminal:
        write("\n")


def _read_line(source, write, is_terminal):
    """Returns the next line, None at the end. Ctrl-C at a terminal's prompt gives a new one."""
    if not is_terminal:
        try:
            line = source.readline()
        except UnicodeDecodeError as error:
            raise DataError(f"what is given is not UTF-8 text: {error}.") from None
        return line.rstrip("\r\n") if line else None
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  `input` edits lines and remembers them where it is there
    while True:
        try:
            return input("> ")
        except EOFError:
            return None
        except KeyboardInterrupt:
            write("\n(Ctrl-D leaves)\n")


@contextlib.contextmanager
def _interruptible():
    """Gives a function that tells whether Ctrl-C was pressed meanwhile. The second one interrupts as ever.

    Only the first is safe for the engine, which is never left in the middle of a step.
    """
    pressed = []

    def handle(number, frame):
        pressed.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not the main thread: signals are someone else's
        yield lambda: False
        return
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _message(role, content):
    return {"role": role, "content": content}


def _path(argument, name):
    if not argument:
        raise ConfigError(f"/{name} needs a file: /{name} FILE.")
    try:
        return pathlib.Path(argument).expanduser()
    except RuntimeError as error:  # ~NOBODY
        raise DataError(f"/{name} {argument}: {error}") from None


def _read_messages(path):
    try:
        if path.stat().st_size > _LARGEST_FILE_BYTES:
            raise DataError(f"{path} is larger than {_LARGEST_FILE_BYTES} bytes: no conversation that fits a model.")
        messages = json.loads(path.read_text("utf-8"))["messages"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is not a conversation that was saved ({type(error).__name__}: {error}).") from None
    is_list = isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
    for number, message in enumerate(messages if is_list else [{}]):
        if message.get("role") not in _ROLES[number > 0 :] or not isinstance(message.get("content"), str):
            raise DataError(f"{path}: messages must be objects with role ({', '.join(_ROLES)}; system first) and content.")
    return [_message(message["role"], message["content"]) for message in messages]
