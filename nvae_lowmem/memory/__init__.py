"""Watches the floors below: trace, simulate, predict, fit, measure, report."""
