"""`linsight app` in a real browser, by `make test-app`."""
