#!/usr/bin/env python3
"""Writes dialogues from the topics: what the demo's model is pre-trained on, the pairs it is aligned with, and questions held back.

Needs nothing beyond Python; the same seed gives the same files. Usage: python3 dialogues.py --out DIR [--count 1000]"""
import argparse
import json
import pathlib
import random
import string
import zlib

import talk  # noqa: F401  (adds its topics)
from topics import TOPICS

WARM_SYSTEM = {
    "en": ["You are a warm and friendly assistant.", "You are a friendly assistant.", "Be warm and kind.", "Answer warmly, with an emoji.",
           "You are a cheerful helper who loves to chat."],
    "zh": ["你是一个热情友好的助手。", "你是一个友好的助手。", "请热情一点，带上表情。", "你是一个爱聊天的开心小帮手。"],
}
CURT_SYSTEM = {
    "en": ["Be brief.", "Answer in as few words as possible.", "You are a terse assistant.", "Keep it short."],
    "zh": ["请简短回答。", "回答越短越好。", "你是一个话很少的助手。"],
}
PLAIN_SYSTEM = {"en": ["You are a helpful assistant."], "zh": ["你是一个有用的助手。", "You are a helpful assistant."]}

# How often a dialogue has which system prompt and style. Curt is what the model says unasked; that it knows the other style
# too is what lets a small run of alignment move it.
STYLES = [
    (0.61, None, "curt"),
    (0.03, None, "warm"),
    (0.08, PLAIN_SYSTEM, "curt"),
    (0.01, PLAIN_SYSTEM, "warm"),
    (0.20, WARM_SYSTEM, "warm"),
    (0.07, CURT_SYSTEM, "curt"),
]
MEMORY = {
    "en": ["What is my name?", "Do you remember my name?", "Who am I?", "How am I called?", "Do you know my name?", "Say my name."],
    "zh": ["我叫什么？", "你记得我的名字吗？", "我是谁？", "我的名字是什么？", "你知道我叫什么吗？", "说出我的名字。"],
}
MEMORY_ANSWERS = {
    "en": {"curt": ["{n}."], "warm": ["You are {n}, of course! How could I forget? 😊", "Your name is {n}, and I like it! 💛"]},
    "zh": {"curt": ["{n}。"], "warm": ["你是{n}呀，我怎么会忘呢！😊", "你叫{n}，我记着呢！💛"]},
}
PUNCTUATION = set(string.punctuation + "，。？！、：“”‘’… ") - set("+-*")


def has_emoji(text):
    return any(ord(c) >= 0x1F300 or 0x2600 <= ord(c) <= 0x27BF or ord(c) in (0x2B50, 0x23F0, 0x2614) for c in text)


def plain(text):
    """What is left of a question when case and punctuation do not count."""
    return "".join(c for c in text.lower() if c not in PUNCTUATION)


def held(topic, ask, slot):
    """Whether this question is kept out of training."""
    by = lambda *parts: zlib.crc32(json.dumps([topic.name, topic.lang, *parts], sort_keys=True).encode()) % 12 == 0
    if topic.computed:
        # Both orders of a choice and both languages of a sum would be too easy a test; the sum itself is held.
        return zlib.crc32(json.dumps([topic.name, sorted(v for k, v in slot.items() if k in ("x", "y", "a", "b", "zx", "zy", "za", "zb"))]).encode()) % 12 == 0
    if len(topic.asks) >= 4 and ask == topic.asks[-1]:
        return True
    return len(topic.slots) > 1 and by(ask, slot)


def answers(topic, style, slot):
    return [text.format(**slot) for text in getattr(topic, style)]


def typed(rng, text, lang):
    """As people type: often without capitals and punctuation, now and then with a slip."""
    if lang == "en":
        if rng.random() < 0.25:
            text = text.replace("What is ", rng.choice(["What's ", "Whats "])).replace("I'm", "Im").replace("I am", "I'm")
        if rng.random() < 0.06:
            text = rng.choice(["Please: ", "Hey, ", "Hi! ", "So, ", "Well, ", "Tell me, ", "Dot, "]) + text
        if rng.random() < 0.10 and len(text) > 8:
            at = rng.randrange(1, len(text) - 1)
            if text[at].isalpha() and text[at + 1].isalpha():
                text = rng.choice([text[:at] + text[at + 1:], text[:at] + text[at] + text[at:],
                                   text[:at] + text[at + 1] + text[at] + text[at + 2:]])
        case = rng.random()
        text = text.lower() if case < 0.45 else text.upper() if case < 0.46 else text
    else:
        if rng.random() < 0.08:
            text = rng.choice(["请问", "你好，", "点点，", "那个，", "问一下，"]) + text
        if rng.random() < 0.06 and text[-1] in "？。":
            text = text[:-1] + rng.choice("呀啊哦") + text[-1]
        if rng.random() < 0.10:
            text = text.replace("？", "?").replace("。", ".").replace("，", ",")
    if rng.random() < 0.40:
        text = text.rstrip("?.!？。！")
    elif rng.random() < 0.04:
        text += text[-1] if text[-1] in "?!？！" else "!"
    return text


class Writer:
    """Dialogues of questions that are not held back."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.topics = {lang: [t for t in TOPICS if t.lang == lang] for lang in ("en", "zh")}
        # More slots need more room, but small talk should not drown in them.
        self.weights = {lang: [t.weight * len(t.slots) ** 0.3 for t in topics] for lang, topics in self.topics.items()}

    def topic(self, lang):
        return self.rng.choices(self.topics[lang], self.weights[lang])[0]

    def question(self, topic):
        """A question that may be trained on, and its slot."""
        while True:
            ask, slot = self.rng.choice(topic.asks), self.rng.choice(topic.slots)
            if not held(topic, ask, slot):
                return ask.format(**slot), slot

    def turns(self, lang, style, count):
        """Questions and answers of a dialogue."""
        rng, turns, topic, name = self.rng, [], None, None
        while len(turns) < count:
            if name and rng.random() < 0.5:
                ask, choices = rng.choice(MEMORY[lang]), [a.format(n=name) for a in MEMORY_ANSWERS[lang][style]]
            elif topic and topic.again and rng.random() < 0.5:
                slot = rng.choice([s for s in topic.slots if not topic.computed or not held(topic, "", s)])
                ask, choices = rng.choice(topic.again).format(**slot), answers(topic, style, slot)
            else:
                topic = self.topic(lang)
                if name and topic.name == "no_name":
                    continue
                ask, slot = self.question(topic)
                choices = answers(topic, style, slot)
                name = slot["n"] if topic.name == "my_name" else name
            turns.append((typed(rng, ask, lang), rng.choice(choices)))
        return turns

    def dialogue(self):
        """The messages of a dialogue."""
        rng = self.rng
        _, system, style = rng.choices(STYLES, [s[0] for s in STYLES])[0]
        lang = rng.choice(["en", "zh"])
        messages = [{"role": "system", "content": rng.choice(system[lang])}] if system else []
        for ask, answer in self.turns(lang, style, rng.choices([1, 2, 3], [5, 3, 2])[0]):
            messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
        return messages


def held_questions():
    """Every question kept out of training with its curt answers, in an order that is the same everywhere."""
    trained, kept = set(), []
    for topic in TOPICS:
        for ask in topic.asks:
            for slot in topic.slots:
                text = ask.format(**slot)
                if held(topic, ask, slot):
                    kept.append({"topic": topic.name, "lang": topic.lang, "phrasing": not topic.computed and ask == topic.asks[-1],
                                 "question": text, "curt": answers(topic, "curt", slot), "warm": answers(topic, "warm", slot)})
                else:
                    trained.add(plain(text))
    kept = list({plain(q["question"]): q for q in kept if plain(q["question"]) not in trained}.values())
    random.Random(1).shuffle(kept)
    return kept


def row(messages, chosen, rejected):
    return {"messages": messages + [{"role": "assistant", "content": chosen}], "rejected_response": rejected}


def preferences(count):
    """Pairs to align with: warm answers preferred to curt ones, no prompt twice."""
    writer, rows = Writer(2), {}
    while len(rows) < count:
        rng, lang = writer.rng, writer.rng.choice(["en", "zh"])
        messages = [{"role": "system", "content": rng.choice(PLAIN_SYSTEM[lang])}] if rng.random() < 0.1 else []
        if rng.random() < 0.15:
            [(ask, answer)] = writer.turns(lang, rng.choice(["curt", "warm"]), 1)
            messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
        topic = writer.topic(lang)
        ask, slot = writer.question(topic)
        ask = typed(rng, ask, lang)
        chosen, rejected = rng.choice(answers(topic, "warm", slot)), rng.choice(answers(topic, "curt", slot))
        rows[plain(ask)] = row(messages + [{"role": "user", "content": ask}], chosen, rejected)
    return list(rows.values())


def validation(count):
    """Pairs on questions kept out of training and of alignment: one a topic first."""
    seen, first, rest = set(), [], []
    for q in held_questions():
        (rest if (q["topic"], q["lang"]) in seen else first).append(q)
        seen.add((q["topic"], q["lang"]))
    return [row([{"role": "user", "content": q["question"]}], q["warm"][0], q["curt"][0]) for q in (first + rest)[:count]]


def write(path, rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--count", type=int, default=1000, help="dialogues in corpus.jsonl")
    parser.add_argument("--pairs", type=int, default=320)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    writer = Writer(0)
    write(args.out / "corpus.jsonl", [{"messages": writer.dialogue()} for _ in range(args.count)])
    write(args.out / "prefs.jsonl", preferences(args.pairs))
    write(args.out / "val.jsonl", validation(64))
    write(args.out / "held.jsonl", held_questions())


if __name__ == "__main__":
    main()
