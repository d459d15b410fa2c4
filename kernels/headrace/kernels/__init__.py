"""Floor 0: ops (arrays in, arrays out), the step program that strings them together, and its executors."""
