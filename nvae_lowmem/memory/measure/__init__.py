"""Real steps in a process of their own, recorded, and held against the prediction."""
