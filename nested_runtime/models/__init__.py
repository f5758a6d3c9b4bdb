"""Model families built from memories and blocks."""
