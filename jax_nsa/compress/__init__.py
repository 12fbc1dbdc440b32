"""The window of original tokens that a decode step completes, summarised into the cache."""
