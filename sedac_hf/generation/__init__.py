"""What plugs into `generate()`."""
