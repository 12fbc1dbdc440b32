"""The compress window that a decode step completes, summarised into the cache.

Throughout this package a window is a compress window, never the sliding one, and a slot the row of
the cache that `slot_mapping` names, never a sequence's place in a batch.
"""
