"""How good a model is: bounds, bits per dimension, image distances."""
