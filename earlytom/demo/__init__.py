"""A small world that a small model can understand: clips drawn from a seed, and questions with one right answer."""
