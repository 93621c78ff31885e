"""Real steps in a process of their own, recorded, and compared with the prediction."""
