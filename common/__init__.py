"""What the three steps share: data, alignment, models, engine, feedback, evaluation, tracking."""
