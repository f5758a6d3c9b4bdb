"""lm-eval's local-completions (log-likelihoods of token-id prompts) and local-chat-completions, four times each.

Idle; while others chat in sessions; eight at a time; after LEARNED turns in other sessions. Prints every answer.
"""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import requests
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

BASE_URL, API_KEY, MODEL = os.environ["BASE_URL"], os.environ["API_KEY"], os.environ["MODEL"]
LEARNED = int(os.environ["LEARNED"])
TASKS = TaskManager(include_path=os.environ["TASKS"], include_defaults=False)


def evaluate(concurrent: int) -> dict[str, object]:
    """Answers and scores of both APIs."""
    known = {"model": MODEL, "num_concurrent": concurrent, "max_retries": 1, "max_length": 1024}
    completions = simple_evaluate(
        model="local-completions",
        model_args={**known, "base_url": f"{BASE_URL}/completions", "tokenizer_backend": "auto", "auth_token": API_KEY},
        task_manager=TASKS,
        tasks=["nested_choice"],
        bootstrap_iters=0,
    )
    chat = simple_evaluate(
        model="local-chat-completions",
        model_args={**known, "base_url": f"{BASE_URL}/chat/completions", "eos_string": "<|end|>"},
        task_manager=TASKS,
        tasks=["nested_generate"],
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    return {"choice": answers(completions, "nested_choice"), "generate": answers(chat, "nested_generate")}


def answers(results: dict, task: str) -> dict[str, object]:
    scores = {name: value for name, value in results["results"][task].items() if not name.startswith("alias")}
    said = [sample["resps"] for sample in sorted(results["samples"][task], key=lambda sample: sample["doc_id"])]
    return {"scores": scores, "answers": said}


def turn(session: str, number: int) -> None:
    """One learned turn."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": f"remember number {number}"}], "max_tokens": 8}
    headers = {"X-Session-ID": session, "Authorization": f"Bearer {API_KEY}"}
    reply = requests.post(f"{BASE_URL}/chat/completions", json=body, headers=headers, timeout=300)
    assert reply.status_code == 200, reply.text


def under_load() -> tuple[dict[str, object], int]:
    over, turns = threading.Event(), []

    def chat(name: int) -> None:
        while not over.is_set():
            turn(f"load-{name}", len(turns))
            turns.append(name)

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(chat, name) for name in range(4)]
        try:
            found = evaluate(1)
        finally:
            over.set()
        for one in running:
            one.result()
    return found, len(turns)


runs = {"idle": evaluate(1)}
runs["loaded"], turns = under_load()
runs["eight"] = evaluate(8)
with ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda number: turn(f"taught-{number % 20}", number), range(LEARNED)))
runs["taught"] = evaluate(1)
print(json.dumps({"turns": turns, "runs": runs}))
