"""Talks to `dpo-host serve` with OpenAI's own client: chats, completions, streams, two adapters, many requests at once, and what is refused.

    pip install openai
    python check_serve.py [--requests 32] [--tokens 64] -- dpo-host serve --adapter first=DIR second=DIR --listen 0

or, of a server that runs, with its base URL in the place of the command.
Prints what was checked, and the tokens a second of requests one by one and all at once; ends with 1 at the first difference.
"""

import argparse
import asyncio
import subprocess
import threading
import time

import openai

PROMPTS = ["My dog died", "How do I cook rice?", "Write a haiku about rain.", "What is 17 times 23?"]


def check(what, fine, seen=""):
    print(f"{'ok' if fine else 'FAILED':8}{what} {seen}")
    if not fine:
        raise SystemExit(1)


def refused(what, kind, call):
    try:
        call()
    except kind as e:
        check(what, True, f"{e.status_code} {e.body.get('message') if isinstance(e.body, dict) else e.body}")
    else:
        check(what, False, "was answered")


def started(command):
    """A server that was started, and its base URL."""
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in server.stderr:
        print("   ", line, end="", flush=True)
        if line.startswith("serving"):
            threading.Thread(target=lambda: [None for _ in server.stderr], daemon=True).start()
            return server, line.split()[1]
    raise SystemExit("the server did not start")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("server", nargs="+", help="its base URL, or the command that starts it")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--key", default="none")
    parser.add_argument("--rounds", action="store_true", help="in bf16, where answers at once may round otherwise than alone")
    args = parser.parse_args()
    server, url = (None, args.server[0]) if args.server[0].startswith("http") else started(args.server)
    try:
        talk(args, url)
    finally:
        if server:
            server.terminate()
            server.wait()


def talk(args, url):
    client = openai.OpenAI(base_url=url, api_key=args.key, max_retries=0)
    names = [m.id for m in client.models.list()]
    check("models", len(names) >= 1, names)
    turns = [{"role": "user", "content": PROMPTS[0]}]

    def chat(model=names[0], messages=turns, **more):
        more = {"temperature": 0, "max_tokens": args.tokens, **more}
        return client.chat.completions.create(model=model, messages=messages, **more)

    answers = {}
    for name in names:
        whole = chat(name)
        answers[name] = whole.choices[0].message.content
        usage = whole.usage
        check(f"chat of {name}", usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, repr(answers[name][:60]))
        chunks = list(chat(name, stream=True, stream_options={"include_usage": True}))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        check("the same as a stream", text == answers[name] and len(chunks) > 3, f"{len(chunks)} chunks")
        check("usage of the stream", chunks[-1].usage == usage, chunks[-1].usage.completion_tokens)
        ends = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
        check("its end", ends == [whole.choices[0].finish_reason], ends)
    check("adapters answer otherwise", len(set(answers.values())) == len(names) or len(names) == 1)
    parts = [{"role": "user", "content": [{"type": "text", "text": PROMPTS[0]}]}]
    check("content in parts", chat(messages=parts).choices[0].message.content == answers[names[0]])

    told = chat(logprobs=True, top_logprobs=3, max_tokens=5).choices[0].logprobs.content
    check("log-probs", len(told) <= 5 and all(t.logprob == t.top_logprobs[0].logprob and len(t.top_logprobs) == 3 for t in told))
    several = chat(n=3, temperature=1, seed=7)
    check("n answers", len({c.index for c in several.choices}) == 3 and len({c.message.content for c in several.choices}) > 1)
    again = chat(n=3, temperature=1, seed=7)
    check("a seed gives them again", [c.message.content for c in several.choices] == [c.message.content for c in again.choices])
    word = next((w for w in answers[names[0]].split()[1:] if w.isalpha()), None)
    if word:
        stopped = chat(stop=word).choices[0]
        expected = answers[names[0]].split(word)[0]
        check("a stop string", stopped.message.content == expected and stopped.finish_reason == "stop", repr(word))
    one = client.completions.create(model=names[0], prompt="The weather", max_tokens=8, temperature=0, echo=True)
    check("completion", one.choices[0].text.startswith("The weather") and one.usage.completion_tokens <= 8, repr(one.choices[0].text))
    two = client.completions.create(model=names[0], prompt=["The weather", "A dog"], max_tokens=8, temperature=0, logprobs=2)
    check("completions of two prompts", len(two.choices) == 2 and "The weather" + two.choices[0].text == one.choices[0].text)
    check("their log-probs", all(len(c.logprobs.tokens) == len(c.logprobs.token_logprobs) > 0 for c in two.choices))
    stream = client.completions.create(model=names[0], prompt="The weather", max_tokens=8, temperature=0, stream=True)
    check("a completion's stream", "The weather" + "".join(c.choices[0].text for c in stream) == one.choices[0].text)

    refused("an unknown model", openai.NotFoundError, lambda: chat("other"))
    refused("an unknown field", openai.BadRequestError, lambda: chat(extra_body={"temprature": 1}))
    refused("a field out of range", openai.BadRequestError, lambda: chat(temperature=-1))
    refused("tools", openai.BadRequestError, lambda: chat(tools=[{"type": "function", "function": {"name": "f"}}]))
    refused("JSON mode", openai.BadRequestError, lambda: chat(response_format={"type": "json_object"}))
    refused("a picture", openai.BadRequestError, lambda: chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]))
    refused("no messages", openai.BadRequestError, lambda: chat(messages=[]))
    refused("a prompt that is too long", openai.BadRequestError, lambda: chat(messages=[{"role": "user", "content": "rice " * 200_000}]))
    refused("a body that is too large", openai.APIStatusError, lambda: chat(messages=[{"role": "user", "content": "x" * (9 << 20)}]))

    # A client that leaves in the middle, and one that does not read, hold up nobody.
    leaving = chat(stream=True, max_tokens=200)
    next(iter(leaving))
    leaving.close()
    slow = chat(stream=True)
    check("beside slow clients", chat().choices[0].message.content == answers[names[0]])
    check("a slow one reads all", "".join(c.choices[0].delta.content or "" for c in slow if c.choices) == answers[names[0]])

    jobs = [(names[i % len(names)], PROMPTS[i // len(names) % len(PROMPTS)]) for i in range(args.requests)]
    long = {"ignore_eos": True}

    def alone(name, prompt):
        return chat(name, [{"role": "user", "content": prompt}], extra_body=long)

    start, few = time.perf_counter(), jobs[: 2 * len(names)]
    singles = {job: alone(*job) for job in few}
    seconds = time.perf_counter() - start
    speed = sum(a.usage.completion_tokens for a in singles.values()) / seconds
    print(f"one by one      {speed:9.1f} tokens/s")

    async def together():
        client = openai.AsyncOpenAI(base_url=url, api_key=args.key, max_retries=0)
        call = lambda name, prompt: client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=args.tokens, extra_body=long)
        return await asyncio.gather(*(call(*job) for job in jobs))

    start = time.perf_counter()
    all_answers = asyncio.run(together())
    seconds = time.perf_counter() - start
    count = sum(a.usage.completion_tokens for a in all_answers)
    print(f"{args.requests} at once      {count / seconds:9.1f} tokens/s")
    same = sum(a.choices[0].message.content == singles[job].choices[0].message.content
               for job, a in zip(jobs, all_answers) if job in singles)
    of = sum(job in singles for job in jobs)
    check("answers at once are those of each alone", same == of or args.rounds, f"{same} of {of}")


main()
