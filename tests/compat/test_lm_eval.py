"""lm-eval measures the same thing whatever else the server does: a request without a session id is memoryless."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import httpx
import pytest

from .conftest import HERE, KEY, Run, installed

LEARNED = 200


@pytest.mark.timeout(3600)
def test_the_same_scores(run: Run, client: httpx.Client, tmp_path: Path, is_full: bool) -> None:
    python = installed("lm-eval")
    if not is_full:
        pytest.skip("minutes: `make test-compat` runs it")
    shutil.copy(HERE / "tasks" / "questions.jsonl", tmp_path)
    output = run(
        *(python, HERE / "programs" / "lm_eval_runs.py"),
        timeout=3500,
        TASKS=str(HERE / "tasks"),
        LEARNED=str(LEARNED),
        OPENAI_API_KEY=KEY,
    )
    said = json.loads(output.strip().splitlines()[-1])
    idle = said["runs"].pop("idle")
    assert idle["choice"]["scores"]["acc,none"] >= 0
    likelihoods = [float(choice[0][0]) for answer in idle["choice"]["answers"] for choice in answer]
    assert len(set(likelihoods)) == len(likelihoods) == 15
    assert len({json.dumps(answer) for answer in idle["generate"]["answers"]}) > 3  # it does depend on the question
    assert said["turns"] > 0
    for name, found in said["runs"].items():
        assert found == idle, name
    sessions = client.get("/v1/sessions?limit=1000").json()["data"]
    taught = [one["version"] for one in sessions if one["id"].startswith("taught-")]
    assert sum(taught) == LEARNED
