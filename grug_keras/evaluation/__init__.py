"""What a trained model is measured by besides its run's own score: a suite and lm-eval's tasks."""
