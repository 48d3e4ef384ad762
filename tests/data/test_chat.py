"""Chat templates: what models' own ones make, and what hostile ones may not."""

import pytest

from llmos_jax.data import chat
from llmos_jax.data.chat import render
from llmos_jax.errors import ConfigError

pytest.importorskip("jinja2")

MESSAGES = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Hi <you> & 'all'"},
    {"role": "assistant", "content": "Yes"},
]
CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim +
 '<|im_end|>' ~ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
WITH_MACRO = """{%- set ns = namespace(system='') %}
{%- macro turn(name, text) %}[{{ name | upper }}] {{ text.strip() }}
{% endmacro %}
{%- for m in messages if m.role != 'assistant' %}
    {%- if m.role == 'system' %}{% set ns.system = m.content %}{% continue %}{% endif %}
    {{- turn(m.role, m.content) }}
{%- endfor %}{{ bos_token }}{{ ns.system.split('.')[0] | tojson }}"""


def test_templates_are_rendered():
    assert render(CHATML, messages=MESSAGES, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <you> & 'all'<|im_end|>\n"
        "<|im_start|>assistant\nYes<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(WITH_MACRO, messages=MESSAGES, bos_token="<s>") == "[USER] Hi <you> & 'all'\n<s>\" Be brief\""


_GROW = "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(100) %}{% set ns.x = NEXT %}{% endfor %}{{ ns.x | length }}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("x" * 70_000, "65536 are the most"),
        ("{% for a in messages", "TemplateSyntaxError"),
        ("{{ raise_exception('roles must alternate') }}", "refuses the messages: roles must alternate"),
        ("{{ messages[7].content }}", "UndefinedError"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 100000 steps"),
        ("{% for a in range(10**9) %}{% endfor %}", r"uses \*\*"),
        ("{% for a in range(1000000000) %}{% endfor %}", "loops more than"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        ("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}", "more than 100000 steps"),
        ("{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "RecursionError|100000 steps"),
        (_GROW.replace("NEXT", "ns.x ~ ns.x"), "more than 8388608 characters"),
        (_GROW.replace("NEXT", "ns.x + ns.x"), "more than 8388608 characters"),
        (_GROW.replace("NEXT", "ns.x.replace('a', ns.x)"), "more than 8388608 characters"),
        (_GROW.replace("NEXT", "[ns.x, ns.x] | join(ns.x)"), "more than 8388608 characters"),
        (_GROW.replace("NEXT", "ns.x.join([ns.x, ns.x])"), "more than 8388608 characters"),
        ("{{ 'a' * 1000000000 }}", r"uses \*"),
        ("{{ '%1000000000d' % 5 }}", "uses %"),
        ("{{ 'a'.ljust(1000000000) }}", "SecurityError"),
        ("{{ '{:1000000000}'.format(1) }}", "SecurityError"),
        ("{{ messages | tojson(indent=100000000) }}", "indents by"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "TypeError|no loader"),
    ],
)
def test_hostile_templates_are_stopped(template, words):
    with pytest.raises(ConfigError, match=words):
        render(template, messages=MESSAGES)


_LOOP = "{% for i in range(99000) %}BODY{% endfor %}"
_LONG = "{% set ns = namespace(x='aaaaaaaa', l=[]) %}{% for i in range(20) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
_NESTED = "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
_BLOCKS = "".join(f"{{% block b{n} %}}{{{{ self.b{n - 1}() }}}}{{{{ self.b{n - 1}() }}}}{{% endblock %}}" for n in range(1, 40))


@pytest.mark.parametrize(
    "template",
    [
        "".join("{% for a" + str(n) + " in 'aaaaaaaaaa' %}" for n in range(9)) + "{% endfor %}" * 9,
        _LOOP.replace("BODY", "{{ 'x' if 'a' in range(100000) }}"),
        _LOOP.replace("BODY", "{% if i is none %}{% endif %}" * 2000),
        _LOOP.replace("BODY", "{% set _ = loop.cycle(*range(100000)) %}"),
        _LONG + _LOOP.replace("BODY", "{% set _ = ns.x | upper %}"),
        _LONG + _LOOP.replace("BODY", "{% set ns.l = [ns.l, ns.x | upper] %}"),
        _LONG + "{{ (ns.x | int(base=16)) // (ns.x[:4194304] | int(base=16)) }}",
        _LOOP.replace("BODY", "{% set ns = namespace(l=[l, dict.fromkeys(range(100000))]) %}{% set l = ns.l %}"),
        _NESTED + "{{ ns.x }}",
        _NESTED + "{{ ns.x | tojson }}",
        "{% block b0 %}{% endblock %}" + _BLOCKS,
    ],
)
def test_what_counting_does_not_see_ends_at_a_limit(template, monkeypatch):
    monkeypatch.setattr(chat, "_SECONDS", 1.0)
    monkeypatch.setattr(chat, "_BYTES", 2**29)
    with pytest.raises(ConfigError, match="more than 1 seconds|MemoryError|out of 0.5 GiB|more than 8388608 characters"):
        render(template, messages=MESSAGES)
    assert render(CHATML, messages=MESSAGES[:1]) == "<|im_start|>system\nBe brief.<|im_end|>\n"


def test_half_a_character_and_names_of_ours_are_nothing_special():
    assert render("\ud800", messages=[]) == "\ud800"
    assert render("{% macro m(function) %}{{ function.name }}{% endmacro %}{{ m(function={'name': 'f'}) }}") == "f"
    with pytest.raises(ConfigError, match="what is no JSON: .*set"):
        render("", messages={1})


def test_long_conversations_are_within_what_a_template_may_do():
    """Two million characters, and a thousand short turns that each look at all messages."""
    for turns, content in ((20, "some words " * 10_000), (1000, "some words")):
        messages = [{"role": ("user", "assistant")[turn % 2], "content": content} for turn in range(turns)]
        template = CHATML.replace(
            "{{ '<|im_start|>' +", "{{ 'last ' if loop.index == messages | length }}{{ '<|im_start|>' +", 1
        )
        template = template.replace(
            "message['content'] | trim", "message.content.split('</think>')[-1].strip().replace('  ', ' ')"
        )
        template += "{% if messages | selectattr('role', 'equalto', 'system') | list %}none{% endif %}"
        template += "{% if 'tools' in messages[0] or messages[0].get('tools') %}none{% endif %}"
        text = render(template, messages=messages, add_generation_prompt=True)
        ends = f"last <|im_start|>assistant\n{content.strip()}<|im_end|>\n<|im_start|>assistant\n"
        assert text.count(content.strip()) == turns and text.endswith(ends)
