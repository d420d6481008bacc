"""What the networks are trained for and how the result is judged: losses, metrics, tasks."""
