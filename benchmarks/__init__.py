"""What benchmark.py compares, and how it measures."""
