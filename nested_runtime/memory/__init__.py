"""Update rules: the inner loops that learn at test time."""
