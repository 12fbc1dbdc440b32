"""The compressed branch: attention over compressed positions, and the choice of blocks."""
