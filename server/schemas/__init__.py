"""Request bodies as pydantic models, and the builders of reply bodies."""
