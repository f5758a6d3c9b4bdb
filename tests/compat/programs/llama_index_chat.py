"""LlamaIndex' OpenAILike, only the new message each turn; the last turn is streamed."""

import json
import os

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

model = OpenAILike(
    model=os.environ["MODEL"],
    api_base=os.environ["BASE_URL"],
    api_key=os.environ["API_KEY"],
    is_chat_model=True,
    context_window=2048,
    temperature=0,
    max_tokens=12,
    max_retries=0,
    default_headers={"X-Session-ID": os.environ["SESSION"]},
)
turns = json.loads(os.environ["TURNS"])
replies = [model.chat([ChatMessage(role="user", content=turn)]).message.content for turn in turns[:-1]]
*_, last = model.stream_chat([ChatMessage(role="user", content=turns[-1])])
replies.append(last.message.content)
print(json.dumps(replies))
