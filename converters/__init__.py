"""Host side: build or load a model, quantize it, hold it against the original, write a bundle."""
