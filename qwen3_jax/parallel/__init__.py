"""Meshes: the table of axes, abstract models."""
