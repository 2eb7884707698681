"""Several processes as one program: they find each other, agree, and end together."""
