"""Prove on this machine what can be proved: short runs, compared with one another, into one table."""
