"""The selected and the window branch: attention over chosen blocks and over the newest tokens."""
