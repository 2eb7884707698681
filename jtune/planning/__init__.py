"""What a run takes before it runs: shapes, memory, FLOPs, time."""
