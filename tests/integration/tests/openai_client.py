"""The unmodified `openai` package against a running router: arguments are the base URL and the model's name.

Prints one line per check that passed; any exception fails the run.
"""

import sys

import openai

base_url, model = sys.argv[1], sys.argv[2]
client = openai.OpenAI(base_url=base_url, api_key="not needed", max_retries=0, timeout=120)
messages = [
    {"role": "system", "content": "You are a helpful assistant. " + "Remember the page. " * 60},
    {"role": "user", "content": "Name a colour."},
]
greedy = {"model": model, "messages": messages, "max_tokens": 12, "temperature": 0}


def check(name, holds, shown=None):
    if not holds:
        sys.exit(f"FAILED {name}: {shown}")
    print("ok", name)


models = client.models.list().data
check("models", [m.id for m in models] == [model], models)
check("one model", client.models.retrieve(model).id == model)

whole = client.chat.completions.create(**greedy)
check("chat", whole.choices[0].message.role == "assistant" and whole.choices[0].message.content, whole)
check("finish_reason", whole.choices[0].finish_reason in ("stop", "length"), whole)
check("usage", whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens, whole.usage)

again = client.chat.completions.create(**greedy)
check("cached tokens", again.usage.prompt_tokens_details.cached_tokens >= 64, again.usage)
check("the same text", again.choices[0].message.content == whole.choices[0].message.content, again)

pieces = list(client.chat.completions.create(**greedy, stream=True, stream_options={"include_usage": True}))
text = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
check("streamed text", text == whole.choices[0].message.content, text)
check("first piece has the role", pieces[0].choices[0].delta.role == "assistant", pieces[0])
check("usage comes last", pieces[-1].choices == [] and pieces[-1].usage.prompt_tokens == whole.usage.prompt_tokens, pieces[-1])
check("one finish_reason", sum(bool(p.choices and p.choices[0].finish_reason) for p in pieces) == 1)
check("kvasir in the last piece", pieces[-1].model_extra["kvasir"]["cached_tokens"] >= 64, pieces[-1])

plain = list(client.chat.completions.create(**greedy, stream=True))
check("no usage unless asked for", all(p.usage is None for p in plain))

own = client.chat.completions.create(**greedy, extra_body={"kvasir": {"no_cache": True}})
check("extra_body", own.usage.prompt_tokens_details.cached_tokens == 0, own.usage)
check("the same text without cache", own.choices[0].message.content == whole.choices[0].message.content, own)

stop = whole.choices[0].message.content.strip().split(" ")[-1]
stopped = client.chat.completions.create(**greedy, stop=[stop])
check("stop strings are not in the text", stop not in stopped.choices[0].message.content, stopped)

seeded = [
    client.chat.completions.create(**{**greedy, "temperature": 1.0}, top_p=0.9, seed=7).choices[0].message.content
    for _ in range(2)
]
check("a seed repeats", seeded[0] == seeded[1], seeded)

completion = client.completions.create(model=model, prompt=["One two three", "Four five six"], max_tokens=4, temperature=0)
check("several prompts", [c.index for c in completion.choices] == [0, 1], completion)
streamed = client.completions.create(model=model, prompt="One two three", max_tokens=4, temperature=0, stream=True)
check("streamed completion", "".join(p.choices[0].text for p in streamed) == completion.choices[0].text)


def refused(name, kind, expected, **changes):
    try:
        client.chat.completions.create(**{**greedy, **changes})
    except kind as error:
        said = f"{error} (code {error.code}, param {error.param})"
        check(name, expected in said, said)
    else:
        sys.exit(f"FAILED {name}: was not refused")


refused("another model", openai.NotFoundError, "model_not_found", model="gpt-4o")
refused("tools", openai.BadRequestError, "tools", tools=[{"type": "function", "function": {"name": "f"}}])
refused("unknown field", openai.BadRequestError, "max_token", extra_body={"max_token": 1})
refused("unknown own field", openai.BadRequestError, "kvasir", extra_body={"kvasir": {"atention": "full"}})
refused("bad value", openai.BadRequestError, "temperature", temperature=-1)
refused("too long", openai.BadRequestError, "context_length_exceeded", messages=[{"role": "user", "content": "word " * 9000}])
