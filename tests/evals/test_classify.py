"""The class-incremental stream and the haystack: what is read, in which order, and how answers are judged."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from nested_runtime.evals import classify, niah
from nested_runtime.evals.cli import main
from nested_runtime.evals.fluency import token_losses
from nested_runtime.evals.reader import Reader, Reading
from nested_runtime.models.loading import LoadedModel


@pytest.fixture(scope="module")
def intents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six classes of five texts to learn and three to be tested on, in the format of cl_text."""
    folder = tmp_path_factory.mktemp("intents")
    rows = [
        {"task": "banking77", "split": split, "text": f"{label} {split} {i}", "label": label}
        for label in ("card_arrival", "lost_card", "top_up", "exchange", "fees", "cash")
        for split, count in (("train", 5), ("test", 3))
        for i in range(count)
    ]
    (folder / "cl_text_small.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def options(**fields: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"seed": 0, "classes": 4, "shots": 3, "tests": 2, "streams": 2, **fields})


def test_streams_hold_other_classes_and_no_test_text_is_learned(intents: Path) -> None:
    first, second = classify.streams(intents, "banking77", options())
    assert len(first.classes) == 4
    assert first.classes != second.classes
    for stream in (first, second):
        learned = {text for texts in stream.learn.values() for text in texts}
        tested = {text for texts in stream.test.values() for text in texts}
        assert (len(learned), len(tested)) == (12, 8)
        assert not learned & tested
    assert classify.streams(intents, "banking77", options()) == [first, second]


def test_scores_are_mean_log_probabilities_after_the_text(loaded: LoadedModel) -> None:
    """Against a plain reading of the whole sequence by `scan`."""
    tokenizer = loaded.tokenizer
    learned = tokenizer.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}], False)
    (outcome,) = Reader(loaded).read([Reading(learned, keep=True)])
    (found,) = classify._scores(Reader(loaded), outcome.memory, ["hello"], ["lost_card", "fees"])
    for label, score in zip(("lost card", "fees"), found, strict=True):
        name = [*tokenizer.encode(f" {label}"), tokenizer.end_id]
        asked = tokenizer.render([{"role": "user", "content": "hello"}], True)
        whole = torch.tensor([[*learned, *asked, *name]])
        losses = token_losses(loaded.model, whole)[0, -len(name) :]
        assert score == pytest.approx(-float(losses.mean()), rel=1e-4)


def test_classify_prints_three_memories(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: Path, intents: Path
) -> None:
    argv = ["classify", "--model", str(folder), "--data", str(intents), "--tasks", "banking77", "--out", str(tmp_path)]
    main([*argv, "--classes", "3", "--shots", "2", "--tests", "2", "--streams", "1"])
    (path,) = tmp_path.iterdir()
    body = json.loads(path.read_text(encoding="utf-8"))
    assert "in context" in capsys.readouterr().out
    assert [(row["memory"], row["tests"]) for row in body["rows"]] == [(name, 6) for name in classify.MEMORIES]
    assert all(answer["named"] in {a["class"] for a in body["answers"]} for answer in body["answers"])
    assert all(row["right"] == sum(a["right"] for a in body["answers"] if a["memory"] == row["memory"])
               for row in body["rows"])  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["classify"], "classify needs --data"),
        (["classify", "--data", "{data}", "--classes", "9"], "has 0 classes of clinc150 with enough texts, not 9"),
        (["classify", "--data", "{data}", "--classes", "1"], "--classes must be at least 2"),
        (["niah", "--lengths", "0"], "--lengths and --needles must be at least 1"),
        (["mad", "--tasks", "chess"], "--tasks 'chess' is unknown; known: recall"),
        (["formal", "--models", "lstm"], "--models 'lstm' is unknown; known: hope, C=1"),
    ],
)
def test_impossible_options_are_one_line(
    capsys: pytest.CaptureFixture[str], intents: Path, folder: Path, argv: list[str], says: str
) -> None:
    model = ["--model", str(folder)] if argv[0] in ("classify", "niah") else []
    with pytest.raises(SystemExit):
        main([*(word.format(data=intents) for word in argv), *model])
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_needle_lies_at_its_depth() -> None:
    straw, needle = list(range(100)), [-1, -2]
    for depth, at in ((0.0, 0), (0.25, 25), (1.0, 100)):
        stack = niah.haystack(straw, needle, depth)
        assert stack[at : at + 2] == needle
        assert [t for t in stack if t >= 0] == straw


def test_niah_asks_for_what_lies_in_the_stack(capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: Path) -> None:
    main(["niah", "--model", str(folder), "--lengths", "80", "160", "--needles", "1", "--out", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    body = json.loads(path.read_text(encoding="utf-8"))
    assert "depth 0.25" in capsys.readouterr().out
    assert [row["name"] for row in body["rows"][:2]] == ["80", "160"]
    assert len(body["answers"]) == 10
    assert all(answer["expected"] for answer in body["answers"])


def test_straw_has_the_length_asked_for(loaded: LoadedModel) -> None:
    straw = niah._Straw(loaded.tokenizer, argparse.Namespace(data=None))
    assert len(straw.draw(random.Random(0), 333)) == 333
