"""What a session is as tensors: specs, slots, snapshots and their bytes."""
