"""Skeletons: the body of a model, which does not know the mixer it holds."""
