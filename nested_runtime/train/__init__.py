"""Training: dialogues, data, the trainer."""
