"""LiteLLM's completion(), which resends the whole conversation; the last turn is streamed."""

import json
import os

import litellm

known = {
    "model": f"openai/{os.environ['MODEL']}",
    "api_base": os.environ["BASE_URL"],
    "api_key": os.environ["API_KEY"],
    "extra_headers": {"X-Session-ID": os.environ["SESSION"]},
    "temperature": 0,
    "max_tokens": 12,
    "num_retries": 0,
}
turns = json.loads(os.environ["TURNS"])
messages = []
replies = []
for turn in turns[:-1]:
    messages.append({"role": "user", "content": turn})
    answer = litellm.completion(messages=messages, **known)
    assert answer.usage.completion_tokens > 0
    replies.append(answer.choices[0].message.content)
    messages.append({"role": "assistant", "content": replies[-1]})
messages.append({"role": "user", "content": turns[-1]})
chunks = litellm.completion(messages=messages, stream=True, **known)
replies.append("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
print(json.dumps(replies))
