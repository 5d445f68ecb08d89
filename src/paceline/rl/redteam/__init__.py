"""Red-teaming: an auditor learns to make a target say what a scorer looks for."""
