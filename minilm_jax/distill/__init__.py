"""What the project exists for: relations, objectives, baselines and the student's start."""
