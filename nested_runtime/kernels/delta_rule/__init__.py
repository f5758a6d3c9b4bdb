"""The stacked self-modifying delta rule: one gated delta rule per head over five associative memories."""
