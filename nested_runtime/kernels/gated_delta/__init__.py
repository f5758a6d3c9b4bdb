"""The plain gated delta rule: keys, values and gates are given, so prefill runs chunks side by side."""
