"""A matrix memory with decay, momentum and erasing: the general linear recurrence of the delta-rule family."""
