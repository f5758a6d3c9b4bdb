"""Which models vLLM can serve: those whose memories have a fixed size and change by reading alone."""

from __future__ import annotations

from nested_runtime.engine.runner import state_specs
from nested_runtime.errors import ConfigError
from nested_runtime.models.base import LanguageModel
from nested_runtime.state.spec import TensorSpec

__all__ = ["supported"]


def supported(model: LanguageModel, name: str) -> tuple[TensorSpec, ...]:
    """The state of a model vLLM can serve; ConfigError names what it cannot."""
    specs = state_specs(model)
    levels = sorted({spec.level for spec in specs if spec.level.startswith("cms.")})
    growing = [spec.name for spec in specs if spec.grows]
    if model.update_chunk:
        why = (
            f"its levels {', '.join(levels)} step after every {model.update_chunk} tokens, which vLLM has no place for"
        )
    elif growing:
        why = f"its attention keeps keys and values with a session ({growing[0]} and {len(growing) - 1} more)"
    elif not specs:
        why = "it has no memory"
    else:
        return specs
    raise ConfigError(f"--backend vllm cannot serve {name!r}: {why}; use --backend native")
