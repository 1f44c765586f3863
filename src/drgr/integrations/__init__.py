"""Adapters to the libraries that hold the models."""
