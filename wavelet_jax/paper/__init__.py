"""The paper's numbers, and ours beside them."""
