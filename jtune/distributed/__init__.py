"""Several processes as one program: they connect, agree, and end together."""
