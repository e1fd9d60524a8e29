"""The parts that decide on and carry out early exits."""
