"""Random calls over the whole domain of every operator, legal and illegal; `python -m fuzz`."""
