"""What a model is made of, as tables and as a picture."""
