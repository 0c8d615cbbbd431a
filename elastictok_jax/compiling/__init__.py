"""What a training step costs on a pod, from its compiled program alone."""
