"""Pictures, plots and pages of an evaluation."""
