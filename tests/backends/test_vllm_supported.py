"""What vLLM cannot serve is refused by name, before vLLM is needed."""

from __future__ import annotations

from typing import Any

import pytest

from nested_runtime.backends.vllm.supported import supported
from nested_runtime.errors import ConfigError
from nested_runtime.models.loading import build
from nested_runtime.registry import FAMILIES

LEVEL = {"chunk": 4, "hidden": 6, "rate": 0.05, "rank": 2}


def tiny(family: str, **fields: Any) -> Any:
    return build(family, {**FAMILIES.get(family).TINY, **fields})


@pytest.mark.parametrize("family", ["hope", "transformer"])
def test_fixed_memories_are_served(family: str) -> None:
    model = tiny(family)
    assert supported(model, "fine") == tuple(model.state_spec())


@pytest.mark.parametrize(
    ("family", "fields", "says"),
    [
        (
            "hope",
            {"levels": [LEVEL, {**LEVEL, "chunk": 8}]},
            "'mine': its levels cms.1, cms.2 step after every 4 tokens",
        ),
        ("hope-attention", {}, "'mine': its attention keeps keys and values"),
    ],
)
def test_others_are_refused_by_name(family: str, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        supported(tiny(family, **fields), "mine")
