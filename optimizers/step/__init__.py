"""The parts of one step: measure, refresh, move, and when."""
