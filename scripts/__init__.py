"""Command-line programs over a bundle."""
