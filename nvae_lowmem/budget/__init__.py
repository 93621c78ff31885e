"""Hours as a budget: which model, which batch and which schedule for the images, the machine and the time."""
