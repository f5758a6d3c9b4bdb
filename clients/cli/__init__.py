"""The `nested` command: chat, sessions, doctor."""
