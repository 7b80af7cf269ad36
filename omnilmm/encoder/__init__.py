"""Pictures to vectors: the vision tower and resampler behind a queue."""
