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
