"""Perplexity, speed and reports of wrapped models."""
