"""The HTTP server: OpenAI's API with a memory behind it."""
