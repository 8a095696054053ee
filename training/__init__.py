"""What a run is made of: flags, building, checkpoints, stopping, non-finite steps, log, run folder."""
