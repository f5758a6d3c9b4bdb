"""The `nested` command: chat, sessions, admin, doctor."""
