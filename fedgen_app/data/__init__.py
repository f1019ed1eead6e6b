"""What a client owns: its documents, how they are dealt out in simulation, and arrays worth keeping."""
