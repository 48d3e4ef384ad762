"""Chat templates: what models' own ones make, and what hostile ones may not."""

import pytest

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
_LONG = "{% set ns = namespace(x='aaaaaaaa', l=[]) %}{% for i in range(20) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
_BODIES = (
    *("{% set ns.l = ns.l + [ns.x | upper] %}", "{% set _ = ns.x | upper %}", "{% set _ = ns.x | list | sort %}"),
    *("{% set _ = ns.x.strip(ns.x) %}", "{% set _ = ns.x.rfind('b' + ns.x[1:]) %}", "{% set _ = ns.x.split('a') %}"),
    *("{% set _ = ns.x[1:] in ns.x %}", "{% set _ = ns.x[1:] == ns.x[:-1] %}", "{% set _ = ns.x is lower %}"),
    *("{% set x %}{{ ns.x }}{% endset %}", "{% set _ = [ns.x] | map('upper') | list %}", "{% set _ = ns.x[1:] ~ 'b' %}"),
    "{% if loop.changed(ns.x[1:]) %}{% endif %}",
)
_TWICE = "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}"
_SHARED = "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
_DEEP = "{% set ns = namespace(x=[]) %}{% for i in range(400) %}{% set ns.x = [ns.x] + range(16) | list %}{% endfor %}"


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
        (_TWICE, "more than 100000 steps"),
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
        # What no loop and no text shows: turns over constants, a name taken by the template, a loop that calls itself.
        ("".join("{% for a" + str(n) + " in 'aaaaaaaaaa' %}" for n in range(9)) + "{% endfor %}" * 9, "more than 100000 steps"),
        ("{% macro step() %}{% endmacro %}" + _TWICE, "more than 100000 steps"),
        ("{% for m in [1, 2] recursive %}{{ loop([1, 2]) ~ loop([1, 2]) if loop.depth < 60 }}{% endfor %}", "100000 steps"),
        # Much work, and much that is held, in few steps.
        *((_LONG + "{% for i in range(90000) %}" + body + "{% endfor %}", "works on more than") for body in _BODIES),
        (_SHARED + "{{ ns.x }}", "works on more than"),
        (_SHARED + "{{ ns.x | tojson }}", "works on more than"),
        (_SHARED + "{{ [ns.x, ns.x] | sort }}", "works on more than"),
        ("{% for i in range(90000) %}{% set x %}" + "y" * 60000 + "{% endset %}{% endfor %}", "works on more than"),
        ("{% for i in range(90000) %}{% set x = [" + "1," * 10000 + "] %}{% endfor %}", "works on more than"),
        (_DEEP + "{{ ns.x | tojson(indent=8) }}", "more than 8388608 characters"),
    ],
)
def test_hostile_templates_are_stopped(template, words):
    with pytest.raises(ConfigError, match=words):
        render(template, messages=MESSAGES)


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
