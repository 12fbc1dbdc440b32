"""Changes formulas, bounds and checks one at a time, and sees which no test notices."""
