"""The best memory plan for a card, and why."""
