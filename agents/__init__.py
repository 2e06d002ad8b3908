"""Motion: what moves events through the fold and the model, one file per agent."""
