"""Renders small templates with transformers' jinja environment and writes host/data/tests/golden/jinja.json.

    python tests/oracle/jinja.py OUT.json

Each case is a template over one conversation (`messages`, `tools`, `text` and so on, below), and its text, or null where jinja2 refuses it. Made
with transformers 5.24, jinja2 3.1.6.
"""

import json
import sys

from transformers.utils.chat_template_utils import _compile_jinja_template

VARIABLES = {
    "messages": [{"role": "user", "content": "a <b> & \"c\" 'd'\n"}, {"role": "assistant", "content": "é 😀", "tool_calls": [{"name": "f"}]}],
    "tools": None,
    "add_generation_prompt": True,
    "text": "  Über <b>/\"q\" 'x' & y\n  z  ",
    "number": 3,
    "real": 2.0,
    "small": 1e-7,
    "none": None,
    "list": [3, 1, 2],
    "words": ["b", "A", "c", "a"],
    "map": {"b": 1, "a": [1, {"x": None}], "c": "it's"},
    "empty": {},
    "flag": True,
    "pairs": [["k", 1], ["l", 2]],
    "items": [{"n": "x", "v": 2}, {"n": "y"}, {"n": "x", "v": 1}],
}

EXPRESSIONS = """
none is iterable
tools is iterable and tools|length > 0
1 is iterable
true is iterable
'x' is iterable
map is iterable
undefined_name is iterable
none is sequence
'x' is sequence
map is sequence
list is sequence
map is mapping
none is mapping
1 is number
true is number
true is integer
1 is integer
2.0 is float
2.0 is integer
'x' is string
none is none
undefined_name is none
undefined_name is defined
undefined_name is undefined
true is boolean
flag is true
1 is true
1 is eq 1
'a' is in ['a']
3 is divisibleby 3
3 is odd
text is lower
words|first is callable
'x'|safe is escaped
text|e
text|escape
text|forceescape
text|safe
text|safe|e
messages[0].content|e
none|e
3|e
list|e
'<'|e ~ '>'
text|upper
text|lower
text|title
text|capitalize
text|trim
text|trim('z ')
text|replace('x', 'y')
text|replace(' ', '', 2)
text|length
text|wordcount
text|string
text|reverse
text|list
text|first
text|last
text|urlencode
text|striptags
text|indent
text|indent(2)
text|indent(2, true)
text|indent(width=3, first=true, blank=true)
text|truncate(9)
text|center(40)
text|wordwrap(10)
text|int
'12'|int
'x'|int(7)
'1.5'|float
'12px'|int
real|int
3.7|round
3.2|round|int
3.14159|round(2)
2.5|round
-3|abs
number|string
real|string
small|string
none|string
flag|string
map|string
list|string
words|join
words|join(', ')
list|join('-')
items|join(',', attribute='n')
map|join(',')
words|sort
words|sort(case_sensitive=true)
words|sort(reverse=true)
list|sort
items|map(attribute='n')|list
items|map(attribute='v', default=0)|list
items|map('length')|list
words|map('upper')|list
words|map('replace', 'a', 'z')|join
items|selectattr('v', 'defined')|list|length
items|selectattr('v')|list|length
items|rejectattr('n', 'equalto', 'x')|list
items|selectattr('n', '==', 'x')|map(attribute='n')|list
items|groupby('n')|length
items|sum(attribute='v')
list|sum
list|select('odd')|list
list|reject('odd')|list
list|select('gt', 1)|list
words|select('in', ['a', 'b'])|list
list|max
list|min
words|max
list|reverse|list
list|first
list|last
list|length
list|unique|list
[1, 1, 2]|unique|list
list|batch(2)|list
list|slice(2)|list
map|items|list
map|dictsort
map|dictsort(reverse=true)
map|dictsort(by='value')
map|list
map|length
map|tojson
map|tojson(indent=2)
map|tojson(sort_keys=true)
map|tojson(ensure_ascii=true)
map|tojson(separators=(',', ':'))
text|tojson
real|tojson
small|tojson
none|tojson
(1, 'a')|tojson
undefined_name|tojson
map|pprint
text|default('d')
undefined_name|default('d')
undefined_name|d('d')
none|default('d')
none|default('d', true)
''|default('d', true)
'%s and %d'|format('a', 3)
'%5.2f'|format(3.14159)
map|attr('b')
items|map(attribute='n')|unique|list
text|filesizeformat
text|xmlattr
map.items()|list
map.keys()|list
map.values()|list
map.get('b')
map.get('z')
map.get('z', 'd')
map['b']
map.b
map.z
map['z']
map.z is defined
map.z.y
undefined_name.x
undefined_name ~ 'x'
undefined_name + 'x'
undefined_name|length
undefined_name == none
undefined_name == undefined_name
'x' in undefined_name
not undefined_name
none ~ 'x'
none + 'x'
'x' + none
'x' + 1
'x' ~ 1
'x' ~ none ~ true ~ 1.0
'x' * 3
list + [4]
list + list
list * 2
1 + 1.0
7 // 2
-7 // 2
7 / 2
6 / 2
7 % 3
-7 % 3
2 ** 3
2 ** -1
2.0 ** 2
1 / 0
7 // 2.0
1e3
1_000
0x1F
true + 1
true
True
false
None
none
[true, none, 1.0, 'it\\'s']
(1, 2)
(1,)
()
('a', 'b')[1]
('a', 'b')|list
(1, 2) == [1, 2]
(1, 2) == (1, 2)
1 in (1, 2)
[(1, 2), (3, 4)]
('a', 'b') + ('c',)
{'a': 1, 'b': (1, 2)}
{1: 'a'}
{'a': 1}.items()|list
{'a': 1} == {'a': 1}
[1, 2] == [1.0, 2]
1 == true
1 == '1'
'a' < 'b'
[1, 2] < [1, 3]
1 < 2 < 3
1 < 'a'
none < 1
'b' not in words
not flag
flag and 'x'
'' or 'y'
'x' if flag else 'y'
'x' if not flag
('x' if not flag) is defined
list[0]
list[-1]
list[1:]
list[:-1]
list[::-1]
list[::2]
list[5]
list[5] is defined
text[2:5]
text[-3:]
text[0]
messages[-1].role
messages[-1]['tool_calls'][0].name
messages|length
messages[0]
messages[0].content.strip().split(' ')
text.strip()
text.strip(' z')
text.lstrip()
text.rstrip()
text.rstrip('\\n')
text.split()
text.split('\\n')
text.split(' ', 1)
text.rsplit(' ', 1)
text.split(none, 1)
text.splitlines()
text.splitlines(true)
text.startswith('  Ü')
text.startswith(('x', '  '))
text.endswith('  ')
text.find('b')
text.find('zz')
text.rfind(' ')
text.index('b')
text.count(' ')
text.upper()
text.lower()
text.title()
text.capitalize()
text.swapcase()
text.replace(' ', '_')
text.replace(' ', '_', 2)
text.strip().partition(' ')
text.rpartition(' ')
text.join(['a', 'b'])
', '.join(words)
'-'.join(map)
'a'.isalpha()
'1'.isdigit()
'a1'.isalnum()
' '.isspace()
'Ab'.islower()
'AB'.isupper()
'1'.isnumeric()
'1'.isdecimal()
'ab'.ljust(5) ~ '|'
'ab'.rjust(5) ~ '|'
'ab'.center(6) ~ '|'
'ab'.zfill(5)
'a\\tb'.expandtabs(4)
'ab'.removeprefix('a')
'ab'.removesuffix('b')
'{} {}'.format('a', 1)
'{0}{1}{0}'.format('a', 'b')
'{a}'.format(a=1)
'{:>5}'.format('a')
'{:.2f}'.format(1.234)
'ß'.casefold()
'ab'.encode()
list.index(1)
list.count(1)
list.append(4)
list.copy()
map.copy()
map.update({'z': 1})
map.pop('b')
words.pop()
'\\x41\\u00e9\\101\\n|'
'\\U0001F600'
'\\d \\. \\/ \\- \\a|\\v|\\b|\\f'
'\\N{BULLET}'
'\\'' ~ "\\""
'tab\\tend\\\\'
'a' 'b'
"line\\n"
range(3)|list
range(1, 7, 2)|list
dict(a=1, b='x')
dict(map, z=2)
namespace(a=1).a
joiner(',')() ~ 'x'
cycler('a', 'b').next()
loop is defined
raise_exception('no')
messages.0.role
list.0
text|float
'1'|float + 1
1.0
1.5e300 * 1e10
100000000000000000000
123456789012345678
3.0 * 2
10 / 5
1e16
1e15
0.1 + 0.2
-0.0
1.0e-5
5|float
'5' * 2
number == 3.0
[none]|tojson
[[]]|string
{}|string
''|string
'\\u2028 \\u00a0'|tojson
['\\u2028 \\u00a0 é \\x07']|string
'x'|safe ~ '<'
'x'|safe + 'y'
words|join('<')|safe
text|e|length
none == none
none is not none
none == false
map|first
empty|length
empty is defined and empty
'yes' if empty else 'no'
'yes' if [] else 'no'
'yes' if '' else 'no'
'yes' if 0 else 'no'
'yes' if 0.0 else 'no'
'yes' if '0' else 'no'
words is sameas words
list is lt 3
map is eq map
text is filter
'upper' is filter
'odd' is test
items[0].v
items[1].v
items[1].v is defined
items|map(attribute='v')|list
items|tojson
messages|map(attribute='role')|join
messages|selectattr('role', 'equalto', 'user')|list|length
(messages|selectattr('role', 'equalto', 'user')|first).content
(messages|first)['role']
messages[1:]|length
messages[0]['content'] is string
messages[0].content is not string
messages[0].content is not none
messages[0].missing is not none
messages[0].missing is none
messages[0].missing == ''
messages[0].missing is string
messages[0]['missing']|length
messages[0].missing|trim
messages[0].missing ~ 'x'
messages[0].get('missing', '') ~ 'x'
'missing' in messages[0]
'content' in messages[0]
messages[0].content[:3]
messages[0].content|length
messages[0].content.items is defined
messages[0].keys()|list
messages|last is mapping
""".strip("\n")

TEMPLATES = [
    "{% for x in none %}{{ x }}{% endfor %}",
    "{% for x in undefined_name %}{{ x }}{% else %}empty{% endfor %}",
    "{% for k, v in map.items() %}{{ k }}={{ v }};{% endfor %}",
    "{% for k, v in map|items %}{{ k }}={{ v }};{% endfor %}",
    "{% for k in map %}{{ k }}{% endfor %}",
    "{% for x in text[:6] %}[{{ x }}]{% endfor %}",
    "{% for a, b in pairs %}{{ a }}{{ b }}{% endfor %}",
    "{% for x in list if x > 1 %}{{ loop.index }}/{{ loop.length }}{{ x }}{% endfor %}",
    "{% for x in list %}{{ loop.index0 }}{{ loop.revindex }}{{ loop.first }}{{ loop.last }}{{ loop.previtem }}{{ loop.nextitem }}{% endfor %}",
    "{% for x in list %}{{ loop.cycle('a', 'b') }}{{ loop.changed(x) }}{{ loop.depth }}{% endfor %}",
    "{% for x in list recursive %}{{ x }}{% endfor %}",
    "{% for x in 3 %}{{ x }}{% endfor %}",
    "{% set x = 1 %}{% for y in list %}{% set x = y %}{% endfor %}{{ x }}",
    "{% set x = 1 %}{% if true %}{% set x = 2 %}{% endif %}{{ x }}",
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "{% generation %} a \n{% endgeneration %} b",
    "{%- generation -%} a {%- endgeneration -%} b",
    "{% set x %}a{{ 1 }}b{% endset %}{{ x }}{{ x|length }}",
    "{% set x %}<b>{% endset %}{{ x ~ '&' }}{{ x + '&' }}{{ x|e }}",
    "{% set x, y = 1, 2 %}{{ x }}{{ y }}",
    "{% set x = 1, 2 %}{{ x }}",
    "{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}",
    "{% macro m(a, b=2) %}{{ a }}-{{ b }}{% endmacro %}{{ m(1) }}{{ m(1, b=3) }}{{ m() }}",
    "{% macro m(a) %}{{ a }}{{ caller() }}{% endmacro %}{% call m(1) %}x{% endcall %}",
    "{% macro m(a) %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1, 2, b=3) }}",
    "{% macro m(ns) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}{% endmacro %}{% set ns = namespace(a=1) %}{{ m(ns) }}{{ m(ns) }}",
    "{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(1) ~ '&' }}{{ m(1)|e }}{{ m(1)|length }}{{ (m(1) + '&')|length }}",
    "{% filter upper %}a{{ 'b' }}{% endfilter %}",
    "{% filter trim %}\n a \n{% endfilter %}",
    "{% with a = 1 %}{{ a }}{% endwith %}",
    "{% raw %}{{ x }}{% endraw %}",
    "{% raw -%}  {{ x }}  {%- endraw %}",
    "a{# comment #}b",
    "a {#- comment -#} b",
    "a\n{# comment #}\nb",
    "a\r\nb\rc\r\n",
    "{{ 'a\r\nb'|length }}",
    "{% if true %}\r\n  x\r\n{% endif %}\r\ny",
    "x\n",
    "x\n\n",
    "  {% if true %}\n  a\n  {% endif %}\n  b",
    "  {%+ if true %}\n  a\n  {%- endif %}\n  b",
    "  {{ 1 }}\n  {{ 2 }}  \n",
    "{{- 'a' -}}  \n b",
    "{% if true -%}   a   {%- endif %} b",
    "{%- if true +%}\n a{% endif %}",
    "{% for x in list %}{% if x == 1 %}{% continue %}{% endif %}{{ x }}{% endfor %}",
    "{% for x in list %}{% if x == 1 %}{% break %}{% endif %}{{ x }}{% endfor %}",
    "{% do list.append(1) %}",
    "{% if false %}{{ x|nofilter }}{% endif %}a",
    "{{ x|nofilter }}",
    "{% if x is notest %}{% endif %}",
    "{% autoescape true %}{{ '<' }}{% endautoescape %}",
    "{% block a %}x{% endblock %}",
    "{% include 'x' %}",
    "{% set content = messages[0].content if messages[0].content is string else '' %}{{ content|trim }}",
    "{%- set x = ['a'] -%}{%- set x = x + ['b'] -%}{{ x }}",
    "{% for m in messages %}{{ m.role }}:{{ m['content'] }}{% if not loop.last %}, {% endif %}{% endfor %}",
    "{% for m in messages[::-1] %}{{ m.role }}{% endfor %}",
    "{{ messages[0].content.split('<b>')[-1].lstrip('\\n') }}",
    "{% for m in messages %}{% if loop.index0 == 0 %}{{ loop.nextitem.role }}{% endif %}{% endfor %}",
    "{{ {'a': {'b': [1, 2.5, none, true]}} }}",
    "{{ [messages[0], 1] }}",
    "{{ \"a\" if tools else \"b\" }}{{ tools is none }}{{ tools is not none }}{{ tools is defined }}",
    "{% if tools %}x{% elif add_generation_prompt %}y{% else %}z{% endif %}",
    "{{ bos_token }}{{ bos_token is defined }}",
    "{% set d = {} %}{% set d = dict(d, a=1) %}{{ d }}",
    "{% set x = namespace() %}{{ x.y }}|{{ x.y is defined }}",
    "{{ '%s' % 'a' }}",
    "{{ '%d-%s' % (1, 'b') }}",
    "{{ 'a' | replace('a', '<') | e }}",
    "{{ loop }}",
    "{{ range }}",
    "{{ 'a\\'b' }}{{ \"a'b\" }}{{ ['a\\'b'] }}",
    "{{ (1 if true else 2) + 1 }}",
    "{{ 'x' in 'xyz' and 'b' in map }}",
    "{{ not 'x' in 'xyz' }}",
    "{{ -list[0] }}{{ +1 }}{{ 2 - -1 }}",
    "{{ 1 if undefined_name is defined and undefined_name.x else 2 }}",
    "{{ 'a'.upper }}",
    "{{ 5 // 0 }}",
    "{% for x in list|sort(reverse=true) %}{{ x }}{% endfor %}",
    "{% for g in items|groupby('n') %}{{ g.grouper }}{{ g.list|length }}{{ g[0] }}{% endfor %}",
    "{% for n, l in items|groupby('n') %}{{ n }}{{ l|length }}{% endfor %}",
    "{{ (text|trim).split('\\n')|map('trim')|join('|') }}",
]


def main():
    expressions = [f"{{{{ {e} }}}}" for e in EXPRESSIONS.split("\n")]
    cases = []
    for template in expressions + TEMPLATES:
        try:
            text = _compile_jinja_template(template).render(**VARIABLES)
        except Exception as e:
            text = None
        if text is None or " at 0x" not in text and "<function" not in text and "<built" not in text:
            cases.append([template, text])
    cases = [case for case in cases if "random" not in case[0] or case[1] == "True"]
    body = ",\n".join(" " + json.dumps(case, ensure_ascii=False) for case in cases)
    open(sys.argv[1], "w").write('{"variables": ' + json.dumps(VARIABLES, ensure_ascii=False) + ',\n"cases": [\n' + body + "\n]}\n")
    print(f"{len(cases)} renderings, {sum(text is None for _, text in cases)} refused")


main()
