"""The terminal's conversation: commands, streaming, interruption, what a turn computes; through a pipe as a user runs it."""

import dataclasses
import functools
import io
import json
import os
import signal

import jax
import pytest

from llmos_jax.compute.sharding import make_placement
from llmos_jax.data.tokenizer import ByteTokenizer
from llmos_jax.errors import ConfigError, DataError
from llmos_jax.models import gpt
from llmos_jax.serve.chat import Chat, run_chat
from llmos_jax.serve.generate import Generator
from llmos_jax.serve.model import LanguageModel
from llmos_jax.serve.sample import SamplingConfig
from llmos_jax.train.state import describe_model

CONFIG = gpt.Config(vocab_size=384, context=256, width=64, layers=2, heads=4)
# Letters only, so that the text of an answer has its tokens again.
LETTERS = {str(token): -100.0 for token in range(128, 257)}
SAMPLING = SamplingConfig(max_tokens=20, temperature=1.0, seed=3, logit_bias=LETTERS)


class Talking(ByteTokenizer):
    """Bytes with a template in which every message is a line."""

    chat_template = "lines"
    end_ids = frozenset()

    def chat_prompt(self, messages):
        if any(message["content"] == "refuse" for message in messages):
            raise ConfigError("the chat template refuses the messages: refuse")
        text = "".join(f"{message['role'][0]}:{message['content']}\n" for message in messages)
        return self.prompt(text + "a:")


def make(tokenizer):
    placement = make_placement(None, jax.devices()[:1])
    handle = describe_model(functools.partial(gpt.build, CONFIG, placement), placement)
    params = jax.jit(lambda key: jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, handle.init(key)))(jax.random.key(0))
    return LanguageModel(None, params, Generator(handle, gpt, CONFIG, tokenizer, placement))


@pytest.fixture(scope="module")
def model():
    return make(Talking())


@pytest.fixture
def chat(model):
    shown = []
    chat = Chat(model, SAMPLING, shown.append)
    chat.shown = shown
    return chat


def said(chat):
    return [message["content"] for message in chat.messages if message["role"] == "user"]


def test_an_answer_is_what_the_model_says(model, chat):
    assert chat.take("hello") and chat.take("  ")
    expected = model.chat([{"role": "user", "content": "hello"}], SAMPLING).text
    assert chat.messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": expected}]
    assert "".join(chat.shown) == expected + "\n" and len(chat.shown) > 2
    chat.take("//set x")
    assert said(chat) == ["hello", "/set x"]
    assert chat.messages[3]["content"] == model.chat(chat.messages[:3], SAMPLING).text


def test_a_turn_computes_what_is_new(model, chat):
    counts, generator = model.generator.engine(model.params).counts, model.generator
    generator.engine(model.params).pool.forget()
    known = 0
    for turn in ("a first message that is rather long", "b", "and a third one"):
        before = dict(counts)
        chat.take(turn)
        whole = len(generator.tokenizer.chat_prompt(chat.messages[:-1]))
        prefilled = counts["prefilled_tokens"] - before.get("prefilled_tokens", 0)
        assert prefilled == whole - known // 16 * 16
        # The last token that was drawn is in no page.
        text = "".join(f"{m['role'][0]}:{m['content']}\n" for m in chat.messages)
        known = len(generator.tokenizer.prompt(text.removesuffix("\n"))) - 1


def test_commands(chat, tmp_path):
    chat.take("/system be brief")
    chat.take("one")
    chat.take("two")
    first = [dict(message) for message in chat.messages]
    chat.take("/retry")
    assert said(chat) == ["one", "two"] and chat.messages[:3] == first[:3] and chat.messages[3] != first[3]
    second = chat.messages[3]
    chat.take("/retry")
    assert chat.messages[3] not in (first[3], second)
    chat.take("/undo")
    assert chat.messages == first[:2]
    chat.take("two")
    assert chat.messages == first  # as if never said before
    chat.take(f"/save {tmp_path / 'talk.json'}")
    chat.take("/reset")
    assert chat.messages == [] and chat.system == "be brief"
    chat.take("/system")
    assert chat.system is None
    chat.take(f"/load {tmp_path / 'talk.json'}")
    assert chat.messages == first and chat.system == "be brief"
    assert json.loads((tmp_path / "talk.json").read_text())["messages"][0] == {"role": "system", "content": "be brief"}
    chat.shown.clear()
    chat.take("/set temperature = 0.25")
    chat.take("/set stop=x,yz")
    chat.take("/set top_k=none")
    assert (chat.sampling.temperature, chat.sampling.stop, chat.sampling.top_k) == (0.25, ("x", "yz"), None)
    chat.take("/set")
    assert "temperature=0.25\n" in "".join(chat.shown)
    chat.take("/help")
    for name in chat._commands:
        assert f"/{name}" in "".join(chat.shown)
    assert chat.take("/exit") is False


@pytest.mark.parametrize(
    ("line", "error", "words"),
    [
        ("/rest", ConfigError, "there is no /rest; did you mean /reset"),
        ("/set temprature=1", ConfigError, "did you mean 'temperature'"),
        ("/set temperature=-1", ConfigError, "must be at least 0.0"),
        ("/set temperature", ConfigError, "say what to, as temperature=VALUE"),
        ("/set n=2", ConfigError, "n=2: a conversation goes on with one answer"),
        ("/retry", ConfigError, "nothing has been said yet"),
        ("/undo", ConfigError, "nothing has been said yet"),
        ("/save", ConfigError, "/save needs a file"),
        ("/save /no/such/folder/file", DataError, "can't be written"),
        ("/save ~nobody_of_this_name/file", DataError, "/save ~nobody_of_this_name/file: "),
        ("/load /no/file", DataError, "not a conversation"),
        ("refuse", ConfigError, "the chat template refuses"),
        ("x" * 300, ConfigError, "the model's context is 256"),
    ],
)
def test_mistakes_change_nothing(chat, line, error, words):
    with pytest.raises(error, match=words):
        chat.take(line)
    assert chat.messages == [] and chat.sampling == SAMPLING


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", '{"messages": 3}', '{"messages": [3]}', '{"messages": [{"role": "user"}]}', "[" * 100_000,
        '{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "a"}]}',
    ],
)  # fmt: skip
def test_bad_conversations_are_refused(chat, tmp_path, text):
    (tmp_path / "talk.json").write_text(text)
    with pytest.raises(DataError, match="talk.json"):
        chat.take(f"/load {tmp_path / 'talk.json'}")


def test_ctrl_c_stops_the_answer_alone(model):
    shown = []

    def write(piece):
        shown.append(piece)
        if len(shown) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    chat = Chat(model, SamplingConfig(max_tokens=150, temperature=1.0, logit_bias=LETTERS), write)
    handler = signal.getsignal(signal.SIGINT)
    chat.take("hello")
    answer = chat.messages[-1]["content"]
    assert answer and 0 < len(answer) < 100 and "".join(shown) == answer + "\n"
    assert signal.getsignal(signal.SIGINT) is handler
    engine = model.generator.engine(model.params)
    assert engine.pool.counts()["held"] == 0 and not len(engine.scheduler)
    chat.take("go on")
    assert said(chat) == ["hello", "go on"] and len(chat.messages[-1]["content"]) > 20


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_pipe_gets_answers_and_nothing_else(model):
    sink = io.StringIO()
    run_chat(model, SAMPLING, source=io.StringIO("hello\n\nagain"), sink=sink)
    talk = [{"role": "user", "content": "hello"}]
    first = model.chat(talk, SAMPLING).text
    talk += [{"role": "assistant", "content": first}, {"role": "user", "content": "again"}]
    assert sink.getvalue() == f"{first}\n{model.chat(talk, SAMPLING).text}\n"
    with pytest.raises(ConfigError, match="no /nonsense"):
        run_chat(model, SAMPLING, source=io.StringIO("/nonsense\nhello\n"), sink=sink)


def test_what_is_not_text_is_refused(model):
    source = io.TextIOWrapper(io.BytesIO(b"hello\n\xff\n"), encoding="utf-8")
    with pytest.raises(DataError, match="what is given is not UTF-8 text"):
        run_chat(model, SAMPLING, source=source, sink=io.StringIO())


@pytest.mark.parametrize(
    "say", [LanguageModel.chat, lambda *given, **choices: list(LanguageModel.stream_chat(*given, **choices))]
)
def test_a_conversation_has_one_answer(model, say):
    talk = [{"role": "user", "content": "hello"}]
    for given in (dict(sampling=dataclasses.replace(SAMPLING, n=2)), dict(n=2)):
        with pytest.raises(ConfigError, match="n=2: a conversation goes on with one answer"):
            say(model, talk, **given)


def test_a_terminal_forgives(model, monkeypatch):
    lines = iter(["/nonsense", KeyboardInterrupt(), "hello", EOFError()])

    def answer(prompt):
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", answer)
    sink = Terminal()
    run_chat(model, SAMPLING, source=Terminal(), sink=sink)
    expected = model.chat([{"role": "user", "content": "hello"}], SAMPLING).text
    for words in ("/help lists", "there is no /nonsense", "(Ctrl-D leaves)", expected):
        assert words in sink.getvalue()


def test_a_model_without_template_is_refused(model):
    plain = LanguageModel(None, model.params, Generator(None, gpt, CONFIG, ByteTokenizer(), model.generator.placement))
    with pytest.raises(ConfigError, match="no chat template: give text to `generate`"):
        run_chat(plain, SAMPLING, source=io.StringIO("hello"), sink=io.StringIO())
