"""The embedded data set, and readers for the real ones."""
