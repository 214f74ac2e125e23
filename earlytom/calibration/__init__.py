"""Frame budgets that follow what the released rules do on a user's own clips (docs/calibration.md)."""
