"""Training: the optimizer, the train step, the loop, and what a run will take (`plan`)."""
