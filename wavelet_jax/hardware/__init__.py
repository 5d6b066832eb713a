"""Machines: what devices can compute, and how much memory there is. Needs nothing else of this package but errors."""
