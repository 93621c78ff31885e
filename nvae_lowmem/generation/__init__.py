"""Pictures from a trained model: the top-down pass without training."""
