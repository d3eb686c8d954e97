"""Talks to a router with the unmodified `openai` package: argument 1 is its address, argument 2 the model's name.

Prints one JSON object for the test that runs it.
"""

import json
import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="unused", max_retries=0)
model = sys.argv[2]
messages = [{"role": "user", "content": "hello"}]
found = {"models": [entry.id for entry in client.models.list()]}

whole = client.chat.completions.create(model=model, messages=messages, max_completion_tokens=5, temperature=0)
found["whole"] = [whole.choices[0].message.content, whole.choices[0].finish_reason, whole.usage.completion_tokens]
found["cached"] = whole.usage.prompt_tokens_details.cached_tokens
found["worker"] = whole.kvasir["worker"]
found["request_id"] = bool(whole._request_id)

# The answer goes back as it came, which is how conversations are kept.
conversation = messages + [whole.choices[0].message, {"role": "user", "content": "and?"}]
stream = client.chat.completions.create(
    model=model,
    messages=conversation,
    stream=True,
    stream_options={"include_usage": True},
    extra_body={"kvasir": {"attention": "rows", "k": 8}},
)
chunks = list(stream)
found["stream"] = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
found["role"] = chunks[0].choices[0].delta.role
found["usage"] = chunks[-1].usage.completion_tokens

text = client.completions.create(model=model, prompt=["a", "b"], max_tokens=3)
found["texts"] = sorted(choice.text for choice in text.choices)
found["text_stream"] = "".join(c.choices[0].text for c in client.completions.create(model=model, prompt=[1, 2], stream=True))


def refused(call):
    try:
        call()
    except openai.APIStatusError as error:
        return [type(error).__name__, error.status_code, error.code, error.param]
    except openai.APIError as error:
        return [type(error).__name__, error.code]
    return "accepted"


create = client.chat.completions.create
found["no_model"] = refused(lambda: create(model="gpt-4", messages=messages))
found["tools"] = refused(lambda: create(model=model, messages=messages, extra_body={"tools": [{"type": "function"}]}))
found["busy"] = refused(lambda: create(model=model, messages=messages))
found["broken"] = refused(lambda: list(create(model=model, messages=messages, stream=True)))
print(json.dumps(found))
