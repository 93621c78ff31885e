"""Peaks of training on a card, from a trace, what no trace sees, and the allocator."""
