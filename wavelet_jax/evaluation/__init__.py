"""Evaluation past the training length."""
