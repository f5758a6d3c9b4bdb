"""Sessions: one user's memory, kept in a store and changed by turns on an engine."""

from nested_runtime.sessions.consolidation import Consolidator
from nested_runtime.sessions.manager import SessionManager
from nested_runtime.sessions.runtime import Runtime
from nested_runtime.sessions.turns import Answer, Delta, Finished, Report, Started, Turn
from nested_runtime.sessions.vault import ServedModel, Vault

__all__ = [
    "Answer",
    "Consolidator",
    "Delta",
    "Finished",
    "Report",
    "Runtime",
    "ServedModel",
    "SessionManager",
    "Started",
    "Turn",
    "Vault",
]
