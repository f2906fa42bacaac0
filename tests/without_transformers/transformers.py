"""What processes that the tests start import in the place of transformers; see conftest.py."""

raise ImportError("transformers is kept from the processes that tests start")
