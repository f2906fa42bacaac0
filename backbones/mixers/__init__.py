"""Token mixers: one attention mechanism a file, any of which any skeleton can hold."""
