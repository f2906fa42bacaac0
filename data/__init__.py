"""The data set of digit scenes that linsight draws, and readers for real data sets."""
