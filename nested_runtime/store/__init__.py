"""Session stores: versioned bytes, leases, compare-and-set. No torch."""
