"""Fit exits to a base model, choose thresholds and certify them."""
