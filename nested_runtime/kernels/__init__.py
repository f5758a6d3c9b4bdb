"""Pure operations: tensors in, tensors out, pools updated in place."""
