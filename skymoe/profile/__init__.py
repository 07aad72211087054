"""Floor 5, a job: what this machine does, measured. The planner reads it in place of the catalogue."""
