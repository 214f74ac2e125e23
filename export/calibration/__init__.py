"""`earlytom-calibrate`: frame budgets from a user's own clips."""
