"""Meaning: what a pipeline says, and the pure functions that give events, features and scores their values."""
