"""LangChain's ChatOpenAI, which resends the whole conversation; the last turn is streamed."""

import json
import os

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_openai import ChatOpenAI

model = ChatOpenAI(
    model=os.environ["MODEL"],
    base_url=os.environ["BASE_URL"],
    api_key=os.environ["API_KEY"],
    temperature=0,
    max_tokens=12,
    max_retries=0,
    default_headers={"X-Session-ID": os.environ["SESSION"]},
)
turns = json.loads(os.environ["TURNS"])
history: list[BaseMessage] = []
replies = []
for turn in turns[:-1]:
    history.append(HumanMessage(turn))
    answer = model.invoke(history)
    assert answer.usage_metadata["output_tokens"] > 0
    replies.append(answer.content)
    history.append(AIMessage(answer.content))
history.append(HumanMessage(turns[-1]))
replies.append("".join(chunk.content for chunk in model.stream(history)))
print(json.dumps(replies))
