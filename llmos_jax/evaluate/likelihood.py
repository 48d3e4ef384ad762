"""Evaluation of a loaded model by log-likelihood: perplexity of text, and multiple choice."""

import dataclasses
import json
import math
import pathlib

from llmos_jax.errors import ConfigError, DataError

# Texts and questions that are scored at once: their log-probabilities are in memory together.
_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class TextFigures:
    """How well a model predicts texts, each read from its start. Documents of no tokens count nothing.

    nats: of all tokens, the sum of their negative log-likelihoods. bytes: of the texts in UTF-8.
    """

    documents: int
    tokens: int
    bytes: int
    nats: float

    @property
    def perplexity(self):
        """exp of the mean over tokens: models of different tokenizers can't be compared by it."""
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self):
        """Mean over bytes of text, base 2: what models of any tokenizer can be compared by."""
        return self.nats / self.bytes / math.log(2)


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt, texts of which one continues it, and the number of that one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclasses.dataclass(frozen=True)
class ChoiceFigures:
    """Shares of questions whose answer is the likeliest choice: by log-likelihood, and by log-likelihood per byte (norm)."""

    questions: int
    acc: float
    acc_norm: float

    @property
    def acc_stderr(self):
        """Standard error of `acc` over questions (of the sample's variance); None with one question."""
        return _standard_error(self.acc, self.questions)

    @property
    def acc_norm_stderr(self):
        """The same of `acc_norm`."""
        return _standard_error(self.acc_norm, self.questions)


def evaluate_model(model, texts=(), choices=(), stride=None):
    """Returns {file: {figure: value}} of a LanguageModel on files of text (one document each) and of questions.

    See `measure_text` and `measure_choices`. Raises DataError naming file and line of what can't be read, before anything is
    computed.
    """
    return measure_files(model, read_files(texts, choices), stride)


def read_files(texts, choices):
    """Returns {file: its text, or its Questions}: what `measure_files` takes."""
    files = {str(path): _read(path) for path in texts} | {str(path): read_questions(path) for path in choices}
    if not files:
        raise ConfigError("there is nothing to evaluate on: give --text=FILE or --choices=FILE.")
    return files


def measure_files(model, files, stride=None):
    """Returns {file: {figure: value}}."""
    figures = {}
    for path, content in files.items():
        if isinstance(content, str):
            figures[path] = _tree(measure_text(model, [content], stride), "perplexity", "bits_per_byte")
        else:
            figures[path] = _tree(measure_choices(model, content), "acc_stderr", "acc_norm_stderr")
    return figures


def measure_text(model, texts, stride=None):
    """Returns the TextFigures of documents; what is longer than the context is read in windows (`LanguageModel.score`)."""
    documents, tokens, size, nats = 0, 0, 0, []
    for start in range(0, len(texts), _AT_ONCE):
        part = texts[start : start + _AT_ONCE]
        for text, score in zip(part, model.score([""] * len(part), part, stride), strict=True):
            documents, tokens, size = documents + 1, tokens + len(score.tokens), size + len(text.encode())
            nats.append(-score.loglikelihood)
    if not tokens:
        raise DataError("the texts hold no token: there is nothing to measure.")
    return TextFigures(documents, tokens, size, math.fsum(nats))


def measure_choices(model, questions):
    """Returns the ChoiceFigures of Questions; the first of equally likely choices counts.

    A choice stands behind its prompt as it is, with a space between them if neither has one there.
    """
    right, right_norm = 0, 0
    for start in range(0, len(questions), _AT_ONCE):
        part = questions[start : start + _AT_ONCE]
        pairs = [(question.prompt, _behind(question.prompt, choice)) for question in part for choice in question.choices]
        scores = iter(model.score(*zip(*pairs, strict=True)))
        for question in part:
            found = [next(scores).loglikelihood for _ in question.choices]
            by_byte = [value / len(choice.encode()) for value, choice in zip(found, question.choices, strict=True)]
            right += found.index(max(found)) == question.answer
            right_norm += by_byte.index(max(by_byte)) == question.answer
    return ChoiceFigures(len(questions), right / len(questions), right_norm / len(questions))


def read_questions(path):
    """Returns the Questions of a JSON Lines file.

    A record holds "prompt" (or "question"), "choices" (two texts at least) and "answer": the right one's number from 0, or its
    text. Raises DataError naming the line.
    """
    questions = []
    for number, line in enumerate(_read(path).split("\n"), 1):
        if line.strip():
            questions.append(_question(line, f"{path}, line {number}"))
    if not questions:
        raise DataError(f"{path} holds no question.")
    return tuple(questions)


def format_figures(figures):
    """Returns the figures of `evaluate_model` as a table, one row a figure."""
    width = max(map(len, figures))
    lines = []
    for path, values in figures.items():
        for name, value in values.items():
            if name.endswith("_stderr"):
                continue
            error = values.get(f"{name}_stderr")
            text = f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
            lines.append(f"{path:<{width}}  {name:<13} {text:>12}{'' if error is None else f' +- {error:.4f}'}")
    return "\n".join(lines)


def _question(line, where):
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}.") from None
    if not isinstance(record, dict):
        raise DataError(f"{where} must be an object with prompt, choices and answer, not {line[:40]!r}.")
    prompt, choices, answer = record.get("prompt", record.get("question")), record.get("choices"), record.get("answer")
    if not isinstance(prompt, str):
        raise DataError(f"{where}: prompt (or question) must be a text, not {prompt!r}.")
    is_list = isinstance(choices, list) and len(choices) >= 2 and all(isinstance(c, str) and c for c in choices)
    if not is_list or len(set(choices)) < len(choices):
        raise DataError(f"{where}: choices must be a list of two or more different texts, not {choices!r}.")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise DataError(
            f"{where}: answer must be one of the choices or its number from 0 to {len(choices) - 1}, not {answer!r}."
        )
    return Question(prompt, tuple(choices), answer)


def _behind(prompt, choice):
    is_apart = not prompt or prompt[-1].isspace() or choice[0].isspace()
    return choice if is_apart else f" {choice}"


def _read(path):
    try:
        text = pathlib.Path(path).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read as UTF-8 text: {error}.") from None
    if not text:
        raise DataError(f"{path} is empty: there is nothing to evaluate on.")
    return text


def _tree(figures, *derived):
    return dataclasses.asdict(figures) | {name: getattr(figures, name) for name in derived}


def _standard_error(share, count):
    return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None
