"""The web page on a trained run."""
