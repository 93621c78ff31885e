"""This machine and its card: what there is, what is left of it, which precision it computes in."""
